"""How long a training step takes on this machine, measured by taking a few."""

import copy
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ssmgen.extras import require
from ssmgen.precision import set_product_precision
from ssmgen.training.launch import make_accelerator
from ssmgen.training.settings import TrainSettings
from ssmgen.training.step import Batch, batches_from, prepare, training_step
from ssmgen.training.watchdog import watched

# The first steps allocate memory and choose kernels. A few of the others are enough: they differ by some percent.
_WARM_UP, _MOST = 2, 14


def seconds_per_step(
    model: nn.Module, objective: Any, data: Dataset[Batch], settings: TrainSettings, limit: float = 5.0
) -> float:
    """Median seconds of the first steps that `train` would take with the same arguments.

    The steps are those of `train`, including reading data and the moving average, but on a copy of the model that is
    thrown away: nothing is written, and training afterwards computes the same numbers to the bit.

    Args:
        model, objective, data, settings: as for `train`; the model is not changed.
        limit: seconds after which no further step begins; two are always taken.

    Returns:
        The same number in every process of a distributed training; all of them must call this.
    """
    set_product_precision(settings.matmul_precision)
    accelerator = make_accelerator(settings, quiet=True)
    state = prepare(copy.deepcopy(model), settings, accelerator)
    loader = batches_from(0, data, settings, accelerator)
    taken: list[float] = []
    # The loader's processes end before training starts others.
    with torch.random.fork_rng(), watched() as watchdog, watchdog.batches(loader, 0) as batches:
        while len(taken) < 2 or (len(taken) < _MOST and _agreed(accelerator, sum(taken)) < limit):
            started = time.perf_counter()
            training_step(state, objective, next(batches), settings, len(taken))
            if state.late:  # the step was only launched
                torch.cuda.synchronize(accelerator.device)
            taken.append(time.perf_counter() - started)
    return _agreed(accelerator, statistics.median(taken[min(_WARM_UP, len(taken) - 1) :]))


def _agreed(accelerator: Any, seconds: float) -> float:
    """The first process's number: clocks differ between processes, which must all decide alike."""
    number = torch.tensor(seconds, device=accelerator.device)
    return require("accelerate.utils", extra="train").broadcast(number).item()
