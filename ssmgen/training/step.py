"""One step of training, and its batches: what the loop repeats and `seconds_per_step` measures."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from ssmgen.training.launch import ignore_stop_requests, loader_processes
from ssmgen.training.optimizers import make_optimizer, moving_average
from ssmgen.training.order import StepOrder, derived_seed
from ssmgen.training.settings import TrainSettings

#: ``data``, one entry per condition of the model under its name, and an optional ``weight``.
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class TrainState:
    """What a step changes."""

    accelerator: Any  # accelerate's `Accelerator`
    model: nn.Module
    wrapped: nn.Module  # the same model as accelerate prepared it, which averages gradients over the processes
    optimizer: Any  # as accelerate prepared it
    ema: AveragedModel

    @property
    def saved(self) -> dict[str, Any]:
        """What a checkpoint holds; the optimiser without accelerate's wrapper."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return {"model": self.model, "ema": self.ema, "optimizer": optimizer}


@dataclass(frozen=True)
class StepResult:
    """Mean loss, gradient norm, and whether any process was asked to stop; the same in every process.

    A norm that is not finite in one process alone is finite in none.
    """

    loss: float
    norm: float
    stop: bool

    @property
    def finite(self) -> bool:
        """Whether the step changed the weights."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def prepare(model: nn.Module, settings: TrainSettings, accelerator: Any) -> TrainState:
    """Place a model on the run's device in training mode, with a fresh optimiser and moving average.

    Raises:
        ValueError: a batch that does not divide into processes and accumulated parts.
    """
    pieces = accelerator.num_processes * settings.accumulate
    if settings.batch_size % pieces:
        raise ValueError(f"batch_size={settings.batch_size} must be a multiple of processes x accumulate = {pieces}")
    optimizer = make_optimizer(model, settings.optimizer, settings.lr, settings.weight_decay, settings.precision)
    ema = moving_average(model, settings.ema_decay).to(accelerator.device)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    wrapped.train()
    return TrainState(accelerator, accelerator.unwrap_model(wrapped), wrapped, optimizer, ema)


def batches_from(first: int, data: Dataset[Batch], settings: TrainSettings, accelerator: Any) -> DataLoader[Batch]:
    """This process's share of the batches from step ``first`` on, without end."""
    count, rank, world = len(data), accelerator.process_index, accelerator.num_processes  # type: ignore[arg-type]
    return DataLoader(
        data,
        batch_sampler=StepOrder(count, settings.batch_size, settings.seed, first, rank, world),
        num_workers=loader_processes(settings.num_workers),
        generator=torch.Generator(),
        worker_init_fn=ignore_stop_requests,
    )


def training_step(
    state: TrainState, objective: Any, batch: Batch, settings: TrainSettings, step: int, stop: bool = False
) -> StepResult:
    """One optimiser step, and one of the moving average.

    A loss or norm that is not finite changes no weight. All processes get the same result, so they decide alike.
    """
    accelerator, optimizer, parts = state.accelerator, state.optimizer, settings.accumulate
    set_lr(optimizer, settings.lr_at(step))
    total = torch.zeros((), device=accelerator.device)
    seeds = seeds_of(step, settings, accelerator.process_index)
    for index, (seed, part) in enumerate(zip(seeds, split(batch, parts), strict=True)):
        torch.manual_seed(seed)
        part = {name: x.to(accelerator.device) if isinstance(x, Tensor) else x for name, x in part.items()}
        # The gradients are averaged over the processes once, after the last part.
        with nullcontext() if index == parts - 1 else accelerator.no_sync(state.wrapped):
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = objective.loss(state.wrapped, **part) / parts
            accelerator.backward(loss)
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(state.wrapped.parameters(), settings.clip or math.inf)
    found = torch.stack([total, norm.to(total), torch.full_like(total, stop)])
    loss, shared_norm, stops = accelerator.reduce(found, reduction="mean").tolist()
    result = StepResult(loss, shared_norm, stops > 0)
    if result.finite:
        optimizer.step()
        state.ema.update_parameters(state.model)
    optimizer.zero_grad()
    return result


def seeds_of(step: int, settings: TrainSettings, process: int = 0) -> list[int]:
    """What ``torch.manual_seed`` gets for each accumulated part of a step, counted from 0: noise, times and dropout."""
    return [derived_seed(settings.seed, "step", step, part, process) for part in range(settings.accumulate)]


def origin_of(step: int, count: int, settings: TrainSettings) -> dict[str, Any]:
    """What the ``step``-th step, counted from 1 as in the log, was made of.

    Args:
        step: the step.
        count: examples in the data set.
        settings: of the run.

    Returns:
        ``examples``, the (index, draw) of each example of the batch, and ``seeds``, those of `seeds_of`.
    """
    order = StepOrder(count, settings.batch_size, settings.seed)
    return {"examples": order.batch(step - 1), "seeds": seeds_of(step - 1, settings)}


def split(batch: Batch, parts: int) -> list[dict[str, Any]]:
    """Cut every entry of a batch into ``parts`` equal parts along its first dimension.

    Raises:
        TypeError: the batch is no mapping with an entry ``data``.
        ValueError: an entry of another length than ``data``.
    """
    if not isinstance(batch, Mapping) or "data" not in batch:
        found = f"the entries {', '.join(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(
            "an example must be a mapping with 'data' and the model's conditions by name, "
            f"{{'data': x, NAME: condition}}; got {found}"
        )
    count = len(batch["data"])
    for name, x in batch.items():
        if len(x) != count:
            raise ValueError(f"{name!r} has {len(x)} items and 'data' {count}: a batch has one of each per example")
    size = count // parts
    return [{name: x[i * size : (i + 1) * size] for name, x in batch.items()} for i in range(parts)]


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every group, times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
