"""One step of training, and its batches: what the loop repeats and `seconds_per_step` measures."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ssmgen.signals import ignore_stop_requests
from ssmgen.training.launch import loader_processes
from ssmgen.training.optimizers import MovingAverage, make_optimizer, moving_average
from ssmgen.training.order import derived_seed, order_of
from ssmgen.training.parallel import check_parallel, host_copy_of, is_sharded, set_rank_slice, shard, whole_model
from ssmgen.training.processes import end_with_parent
from ssmgen.training.results import StepResult, reads_late
from ssmgen.training.settings import TrainSettings
from ssmgen.values import batch_of_value, mapped
from ssmgen.weights import full_tensor, unwrapped

#: ``data``, one entry per condition of the model under its name, and optional ``weight`` and ``contrasts``.
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class TrainState:
    """What a step changes."""

    accelerator: Any  # accelerate's `Accelerator`
    model: nn.Module
    # The same model as accelerate prepared it, which averages gradients over the processes; compiled if it is to be.
    wrapped: nn.Module
    optimizer: Any  # as accelerate prepared it
    ema: MovingAverage
    outline: nn.Module | None = None  # of a sharded model, for `averaged`
    late: bool = False  # whether the host reads the values of a step later, see `ssmgen.training.results`
    compiled: bool = False  # a compiled model reads no value of what it is given

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """The averaged model, in one piece in the main process; all processes must enter this if it is sharded."""
        return whole_model(self.ema.module, self.outline, self.accelerator.device)

    @property
    def saved(self) -> dict[str, Any]:
        """What a checkpoint holds; the optimiser without accelerate's wrapper."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return {"model": self.model, "ema": self.ema, "optimizer": optimizer}

    def checked(self, batch: Batch) -> AbstractContextManager[None]:
        """Check a batch on the host where the model does not, or would read it from a GPU."""
        check = getattr(unwrapped(self.model), "checked", None) if self.late or self.compiled else None
        return check(batch) if check is not None else nullcontext()

    def update(self, result: StepResult) -> None:
        """Step the optimiser and the average, which a step that is not finite leaves as they are."""
        if not self.late:
            if result.finite:
                self.optimizer.step()
                self.ema.update_parameters(self.model)
            return
        skipped, optimizer = result.skipped, self.saved["optimizer"]
        optimizer.found_inf = skipped.float()  # by which `torch.amp.GradScaler` has a fused optimiser skip a step
        self.optimizer.step()
        del optimizer.found_inf
        self.ema.update_parameters(self.model, skipped)


def prepare(model: nn.Module, settings: TrainSettings, accelerator: Any) -> TrainState:
    """Place a model on the run's device in training mode, with a fresh optimiser and moving average.

    Raises:
        ValueError: a batch that does not divide into processes and accumulated parts, or see `check_parallel`.
    """
    pieces = accelerator.num_processes * settings.accumulate
    if settings.batch_size % pieces:
        raise ValueError(f"batch_size={settings.batch_size} must be a multiple of processes x accumulate = {pieces}")
    check_parallel(model, settings)
    if settings.checkpoint_activations:
        unwrapped(model).checkpoint_activations = True  # type: ignore[assignment]
    set_rank_slice(model, accelerator)
    ema, outline = moving_average(model, settings.ema_decay), None
    if sharded := settings.shard and accelerator.num_processes > 1:
        outline = host_copy_of(model, accelerator)
        # The average is sharded like the model, so that each process averages its own parts.
        for each in (model, ema.module):
            shard(each, accelerator)
    optimizer = make_optimizer(model, settings.optimizer, settings.lr, settings.weight_decay, settings.precision)
    wrapped, optimizer = (model, accelerator.prepare(optimizer)) if sharded else accelerator.prepare(model, optimizer)
    wrapped.train()
    inner, averaged, late = (
        accelerator.unwrap_model(wrapped),
        ema.to(accelerator.device),
        reads_late(accelerator.device),
    )
    if settings.compile:  # data parallelism cuts the graph where it averages gradients
        wrapped = torch.compile(wrapped, fullgraph=accelerator.num_processes == 1, dynamic=False)
    return TrainState(accelerator, inner, wrapped, optimizer, averaged, outline, late, settings.compile)


def batches_from(first: int, data: Dataset[Batch], settings: TrainSettings, accelerator: Any) -> DataLoader[Batch]:
    """This process's share of the batches from step ``first`` on, without end.

    ``data.collate``, if there is one, makes a batch of a list of examples: it may pad what has no common length.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    return DataLoader(
        data,
        batch_sampler=order_of(data, settings.batch_size, settings.seed, first, rank, world),
        num_workers=loader_processes(settings.num_workers),
        collate_fn=getattr(data, "collate", None),
        generator=torch.Generator(),
        worker_init_fn=_loader_process,
        pin_memory=accelerator.device.type == "cuda",  # which copies to it need, or the host waits for each
    )


def _loader_process(worker: int) -> None:
    ignore_stop_requests(worker)
    end_with_parent()


def training_step(
    state: TrainState, objective: Any, batch: Batch, settings: TrainSettings, step: int, stop: bool = False
) -> StepResult:
    """One optimiser step, and one of the moving average.

    A loss or norm that is not finite changes no weight. All processes get the same result, so they decide alike. On
    CUDA the step is only launched: nothing in it waits for the device, see `ssmgen.training.results`.
    """
    accelerator, optimizer, parts = state.accelerator, state.optimizer, settings.accumulate
    device = accelerator.device
    set_lr(optimizer, settings.lr_at(step))
    total = torch.zeros((), device=device)
    rank, processes, sharded = accelerator.process_index, accelerator.num_processes, is_sharded(state.model)
    # What an objective draws for the whole batch is the same in all processes.
    draw = getattr(objective, "draw", None) if processes > 1 else None
    seeds = seeds_of(step, settings, 0 if draw else rank)
    for index, (seed, given) in enumerate(zip(seeds, split(batch, parts), strict=True)):
        torch.manual_seed(seed)
        # The gradients are averaged over the processes once, after the last part; sharded ones after each, because
        # whole ones would have to be kept until then.
        whole = nullcontext() if index == parts - 1 else accelerator.no_sync(state.wrapped)
        with state.checked(given), whole:
            part = {name: _moved(x, device) for name, x in given.items()}
            drawn = draw(part["data"], rank, processes) if draw else {}
            # The cache of autocast would keep the gathered weights of all blocks in bfloat16.
            with torch.autocast(device.type, torch.bfloat16, settings.precision == "bf16", cache_enabled=not sharded):
                loss = objective.loss(state.wrapped, **drawn | part) / parts
            accelerator.backward(loss)
        total += loss.detach()
    norm = full_tensor(accelerator.clip_grad_norm_(state.wrapped.parameters(), settings.clip or math.inf))
    found = torch.stack([total, norm.to(total), torch.full_like(total, stop)])
    result = StepResult(accelerator.reduce(found, reduction="mean"))
    state.update(result)
    optimizer.zero_grad()
    return result


def seeds_of(step: int, settings: TrainSettings, process: int = 0) -> list[int]:
    """What ``torch.manual_seed`` gets for each accumulated part of a step, counted from 0: noise, times and dropout."""
    return [derived_seed(settings.seed, "step", step, part, process) for part in range(settings.accumulate)]


def origin_of(step: int, data: Dataset[Batch], settings: TrainSettings) -> dict[str, Any]:
    """What the ``step``-th step, counted from 1 as in the log, was made of.

    Args:
        step: the step.
        data: the examples.
        settings: of the run.

    Returns:
        ``examples``, the (index, draw) of each example of the batch, and ``seeds``, those of `seeds_of`.
    """
    order = order_of(data, settings.batch_size, settings.seed)
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
        if (items := batch_of_value(x) if isinstance(x, Mapping) else len(x)) != count:
            raise ValueError(f"{name!r} has {items} items and 'data' {count}: a batch has one of each per example")
    size = count // parts
    return [{name: _sliced(x, slice(i * size, (i + 1) * size)) for name, x in batch.items()} for i in range(parts)]


def _sliced(x: Any, part: slice) -> Any:
    return mapped(lambda each: each[part], x) if isinstance(x, Mapping) else x[part]


def _moved(x: Any, device: torch.device) -> Any:
    return mapped(lambda each: each.to(device, non_blocking=True), x) if isinstance(x, Tensor | Mapping) else x


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every group, times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
