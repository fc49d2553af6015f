"""How long a training step takes on this machine, found out by taking a few."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ssmgen.extras import require
from ssmgen.training.ema import moving_average
from ssmgen.training.launch import make_accelerator
from ssmgen.training.memory import keep_freed_memory
from ssmgen.training.optimizers import make_optimizer
from ssmgen.training.settings import TrainSettings
from ssmgen.training.step import batches_from, set_lr, training_step

# The first steps allocate memory and choose kernels. Of the others a few are enough: they differ by some percent.
_WARM_UP, _MOST = 2, 14


def seconds_per_step(
    model: nn.Module, objective: Any, data: Dataset[tuple[Tensor, Tensor]], settings: TrainSettings, limit: float = 5.0
) -> float:
    """Median seconds of the first steps that `train` would take with the same arguments.

    The steps are those of `train`, reading of the data and moving average included, but on a copy of the model that is
    thrown away: nothing is written, and a training afterwards computes the same numbers to the bit.

    Args:
        model: a mask-conditioned model; left as it is.
        objective: has ``loss(model, x, mask=...)``.
        data: the examples.
        settings: how to train.
        limit: seconds after which no further step is begun; two are always taken.

    Returns:
        The seconds, the same number in every process of a distributed training, where all must call this.
    """
    torch.set_float32_matmul_precision(settings.matmul_precision)
    accelerator = make_accelerator(settings, quiet=True)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    tried = copy.deepcopy(model)
    ema = moving_average(tried, settings.ema_decay).to(accelerator.device)
    optimizer = make_optimizer(
        tried, settings.optimizer, settings.lr, settings.weight_decay, precision=settings.precision
    )
    trained, optimizer = accelerator.prepare(tried, optimizer)
    batches = iter(batches_from(0, data, settings, accelerator))
    trained.train()
    taken: list[float] = []
    with torch.random.fork_rng():
        while len(taken) < 2 or (len(taken) < _MOST and _agreed(accelerator, sum(taken)) < limit):
            started = time.perf_counter()
            x, mask = next(batches)
            set_lr(optimizer, settings.lr_at(len(taken)))
            training_step(accelerator, trained, objective, optimizer, x, mask, settings, len(taken), False)
            ema.update_parameters(tried)
            taken.append(time.perf_counter() - started)
    del batches  # its processes end before training starts its own
    return _agreed(accelerator, statistics.median(taken[min(_WARM_UP, len(taken) - 1) :]))


def _agreed(accelerator: Any, seconds: float) -> float:
    """The first process's number: each process's clock has its own, but all must do the same."""
    number = torch.tensor(seconds, device=accelerator.device)
    return require("accelerate.utils", extra="train").broadcast(number).item()
