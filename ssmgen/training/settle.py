"""The precision of a run that asks for ``"auto"``: decided once."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssmgen.extras import require
from ssmgen.precision import Choice, choose_precision
from ssmgen.training.checkpoint import CheckpointError, checkpoints, read_state

if TYPE_CHECKING:
    from ssmgen.training.settings import TrainSettings


def settle_precision(settings: TrainSettings, run: Path, resume: Path | str | None, processes: Any) -> TrainSettings:
    """Replace ``precision="auto"`` by ``"no"`` or ``"bf16"`` and print which, and why.

    A resumed run keeps the precision in its checkpoint. A new one takes what `ssmgen.precision.choose_precision` finds
    on the first process, for all of them.

    Args:
        settings: the run's settings.
        run, resume: as in `train`.
        processes: accelerate's ``PartialState`` or ``Accelerator``.
    """
    if settings.precision != "auto":
        return settings
    bf16 = torch.zeros((), dtype=torch.int64, device=processes.device)
    if processes.is_main_process:
        choice = _recorded(run, resume) or _measured(settings.matmul_precision, processes.device)
        print(choice, file=sys.stderr)
        bf16 += choice.precision == "bf16"
    bf16 = require("accelerate", extra="train").utils.broadcast(bf16, from_process=0)
    return replace(settings, precision="bf16" if bf16.item() else "no")


def _recorded(run: Path, resume: Path | str | None) -> Choice | None:
    """What the newest readable checkpoint records; `find_checkpoint` checks whether it can be resumed."""
    if resume is None:
        return None
    for path in reversed(checkpoints(run / "checkpoints") if resume == "auto" else [Path(resume)]):
        try:
            recorded = read_state(path).get("record", {}).get("precision")
        except CheckpointError:
            continue
        return Choice(recorded, f"as {path.name} was made") if recorded else None
    return None


def _measured(rounding: str, device: torch.device) -> Choice:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(rounding)
    try:
        return choose_precision("auto", device)
    finally:
        torch.set_float32_matmul_precision(before)
