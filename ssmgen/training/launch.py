"""The processes of a training: their devices and memory. The settings alone decide the arithmetic.

accelerate also reads gradient accumulation, precision, compilation and sharding from the environment, which
``accelerate launch`` fills from the user's file of defaults. No run records them, so they are ignored or rejected.
"""

import ctypes
import os
import platform
import sys
from datetime import timedelta
from typing import Any

import torch

from ssmgen.extras import require

_SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
# Variable, its neutral value, and what decides instead.
_IGNORED = (
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", "accumulate={accumulate} of the run decides"),
    ("ACCELERATE_MIXED_PRECISION", "no", "precision={precision} of the run decides"),
    ("ACCELERATE_DYNAMO_BACKEND", "no", "compile={compile} of the run decides"),
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
#: How long a process waits for another, which may save or sample for long; the watchdog notices one that does not live.
PATIENCE = timedelta(days=1)
_LARGEST = 32 * 2**20  # glibc takes no larger threshold for mmap on 64 bits


def make_accelerator(settings: Any, *, quiet: bool = False) -> Any:
    """accelerate's `Accelerator` for a training, which does not scale, round or compile anything.

    On a CPU the process keeps the memory it frees from now on, see `keep_freed_memory`.

    Args:
        settings: a `ssmgen.training.TrainSettings`.
        quiet: do not warn about variables that have no effect.

    Raises:
        ValueError: see `check_launch`.
    """
    check_launch()
    accelerate = require("accelerate", extra="train")
    accelerator = accelerate.Accelerator(
        # The step enters autocast: accelerate's setting cannot change within a process, so a second run with another
        # precision in one notebook would fail.
        mixed_precision="no",
        cpu=on_cpu(),
        dynamo_backend="no",
        # As a plugin: the variable would override a plain number.
        gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[accelerate.utils.InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.is_main_process and not quiet:
        for name, neutral, instead in _IGNORED:
            value = os.environ.get(name, neutral)
            if value.lower() != neutral:
                print(f"{name}={value} has no effect: {instead.format(**vars(settings))}", file=sys.stderr)
    return accelerator


def check_launch() -> None:
    """Reject an environment in which accelerate would shard the model: the run's setting ``shard`` decides.

    Raises:
        ValueError: a variable asks for it; names it.
    """
    for name, what in _SHARDING.items():
        if os.environ.get(name, "false").lower() == "true":
            raise ValueError(
                f"{name}={os.environ[name]}: {what} of the launcher is not supported. Unset it, or launch with "
                "torchrun or accelerate launch --multi_gpu; the run's setting shard=true divides the model (FSDP2)."
            )


def on_cpu() -> bool:
    """Whether to run on the CPU: there is no other device, or ``ACCELERATE_USE_CPU`` says so."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    return asked or not (torch.cuda.is_available() or torch.backends.mps.is_available())


def loader_processes(wanted: int) -> int:
    """``wanted`` loader processes, but no more than this process has cores. No example depends on the number."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(wanted, len(allowed))


def keep_freed_memory() -> bool:
    """Let the process keep freed memory for the next tensors; returns whether it did, which needs glibc.

    Every training step frees and allocates the same tensors. By default, glibc returns much of that memory to the
    system and requests it again, and the system clears every page it hands out: a sixth of the time of a training step,
    measured on two cores. The process then stays as large as its largest step until it ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
