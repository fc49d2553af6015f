"""One step of training, and the batches that steps take: what the loop repeats and `seconds_per_step` tries."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ssmgen.training.launch import loader_processes
from ssmgen.training.order import StepOrder, derived_seed
from ssmgen.training.settings import TrainSettings


def batches_from(
    first: int, data: Dataset[tuple[Tensor, Tensor]], settings: TrainSettings, accelerator: Any
) -> DataLoader[tuple[Tensor, Tensor]]:
    """This process's share of the batches of step ``first`` and those after it, without end."""
    count, rank, world = len(data), accelerator.process_index, accelerator.num_processes  # type: ignore[arg-type]
    return DataLoader(
        data,
        batch_sampler=StepOrder(count, settings.batch_size, settings.seed, first, rank, world),
        num_workers=loader_processes(settings.num_workers),
        generator=torch.Generator(),
        worker_init_fn=_ignore_stop_requests,
    )


def training_step(
    accelerator: Any,
    model: nn.Module,
    objective: Any,
    optimizer: Any,
    x: Tensor,
    mask: Tensor,
    settings: TrainSettings,
    step: int,
    stop: bool,
) -> tuple[float, float, bool]:
    """One optimiser step; returns the mean loss, the gradient norm, and whether any process was asked to stop.

    A loss or norm that is not finite changes no weight. All processes get the same answers, so they decide alike.
    """
    parts = settings.accumulate
    total = torch.zeros((), device=accelerator.device)
    pieces = list(zip(x.chunk(parts), mask.chunk(parts), strict=True))
    for part, (x_part, mask_part) in enumerate(pieces):
        torch.manual_seed(derived_seed(settings.seed, "step", step, part, accelerator.process_index))
        x_part, mask_part = x_part.to(accelerator.device), mask_part.to(accelerator.device)
        with _sync_only_if(part == parts - 1, accelerator, model):
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = objective.loss(model, x_part, mask=mask_part) / parts
            accelerator.backward(loss)
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), settings.clip or math.inf)
    shared = accelerator.reduce(torch.stack([total, torch.full_like(total, stop)]), reduction="mean").tolist()
    loss_value, norm_value, asked = shared[0], float(norm), shared[1] > 0
    if math.isfinite(loss_value) and math.isfinite(norm_value):
        optimizer.step()
    optimizer.zero_grad()
    return loss_value, norm_value, asked


@contextmanager
def _sync_only_if(last: bool, accelerator: Any, model: nn.Module) -> Iterator[None]:
    if last:
        yield
    else:
        with accelerator.no_sync(model):
            yield


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every group, times its own ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def _ignore_stop_requests(worker: int) -> None:
    """For a loader process, which a terminal's Ctrl-C and a scheduler's SIGTERM reach as well.

    The step that is being finished needs its batches; it is ended with the loop.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
