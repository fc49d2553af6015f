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
from ssmgen.training.loop import TrainResult, TrainSettings, find_checkpoint, train
from ssmgen.training.optimizers import MuonAdamW, make_optimizer, parameter_groups
from ssmgen.training.order import StepOrder, derived_seed
from ssmgen.training.pace import seconds_per_step
from ssmgen.training.progress import progress_bar

__all__ = [
    "CheckpointError",
    "MuonAdamW",
    "StepOrder",
    "TrainResult",
    "TrainSettings",
    "checkpoints",
    "derived_seed",
    "find_checkpoint",
    "load_checkpoint",
    "make_optimizer",
    "moving_average",
    "parameter_groups",
    "progress_bar",
    "prune_checkpoints",
    "save_checkpoint",
    "seconds_per_step",
    "train",
    "verify_checkpoint",
]
