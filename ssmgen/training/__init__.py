"""Training: the loop, the moving average, the order of examples, and checkpoints."""

from ssmgen.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    read_average,
    save_checkpoint,
)
from ssmgen.training.launch import check_launch, loader_processes, on_cpu
from ssmgen.training.lock import RunLockError, run_lock
from ssmgen.training.loop import TrainResult, train
from ssmgen.training.manifest import CheckpointError, NewerFormatError, read_manifest, read_state, verify_checkpoint
from ssmgen.training.optimizers import MuonAdamW, make_optimizer, moving_average, parameter_groups
from ssmgen.training.order import StepOrder, derived_seed
from ssmgen.training.pace import seconds_per_step
from ssmgen.training.progress import progress_bar
from ssmgen.training.resume import find_checkpoint, schedule_changes, schedule_of, settle_precision
from ssmgen.training.settings import TrainSettings
from ssmgen.training.watchdog import RankError

__all__ = [
    "CheckpointError",
    "MuonAdamW",
    "NewerFormatError",
    "RankError",
    "RunLockError",
    "StepOrder",
    "TrainResult",
    "TrainSettings",
    "check_launch",
    "checkpoints",
    "derived_seed",
    "find_checkpoint",
    "load_checkpoint",
    "loader_processes",
    "make_optimizer",
    "moving_average",
    "newest_checkpoint",
    "on_cpu",
    "parameter_groups",
    "progress_bar",
    "prune_checkpoints",
    "read_average",
    "read_manifest",
    "read_state",
    "run_lock",
    "save_checkpoint",
    "schedule_changes",
    "schedule_of",
    "seconds_per_step",
    "settle_precision",
    "train",
    "verify_checkpoint",
]
