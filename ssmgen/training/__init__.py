"""The loop, the moving average, the order of examples, and checkpoints."""

from ssmgen.training.checkpoint import (
    CheckpointError,
    checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from ssmgen.training.ema import moving_average
from ssmgen.training.loop import TrainResult, TrainSettings, find_checkpoint, parameter_groups, train
from ssmgen.training.order import StepOrder, derived_seed

__all__ = [
    "CheckpointError",
    "StepOrder",
    "TrainResult",
    "TrainSettings",
    "checkpoints",
    "derived_seed",
    "find_checkpoint",
    "load_checkpoint",
    "moving_average",
    "parameter_groups",
    "prune_checkpoints",
    "save_checkpoint",
    "train",
    "verify_checkpoint",
]
