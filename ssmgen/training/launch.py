"""What a launcher decides about a training: devices and processes. The settings alone decide the arithmetic.

accelerate also reads gradient accumulation, precision, compilation and sharding from the environment, which
``accelerate launch`` fills from the user's file of defaults. No run records them, so they are ignored or rejected.
"""

from __future__ import annotations

import os
import sys
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
    ("ACCELERATE_DYNAMO_BACKEND", "no", "training does not compile the model"),
)


def make_accelerator(settings: Any, *, quiet: bool = False) -> Any:
    """accelerate's `Accelerator` for a training, which does not scale, round or compile anything.

    Args:
        settings: a `ssmgen.training.TrainSettings`, named in the warnings about ignored variables.
        quiet: do not warn.

    Raises:
        ValueError: the environment asks for sharding, see `check_launch`.
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
    )
    if accelerator.is_main_process and not quiet:
        for name, neutral, instead in _IGNORED:
            value = os.environ.get(name, neutral)
            if value.lower() != neutral:
                print(f"{name}={value} has no effect: {instead.format(**vars(settings))}", file=sys.stderr)
    return accelerator


def check_launch() -> None:
    """Reject an environment in which accelerate would shard the model.

    Raises:
        ValueError: a variable asks for it; names it.
    """
    for name, what in _SHARDING.items():
        if os.environ.get(name, "false").lower() == "true":
            raise ValueError(
                f"{name}={os.environ[name]}: {what} is not supported, every process holds the whole model. Unset it, "
                "or launch with torchrun, or with accelerate launch --multi_gpu."
            )


def on_cpu() -> bool:
    """Whether to run on the CPU: there is no other device, or ``ACCELERATE_USE_CPU`` says so."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    return asked or not (torch.cuda.is_available() or torch.backends.mps.is_available())


def loader_processes(wanted: int) -> int:
    """``wanted`` loader processes, but no more than this process has cores. No example depends on the number."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(wanted, len(allowed))
