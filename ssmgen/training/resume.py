"""Resuming a run: from which checkpoint, in which precision, and on which learning-rate schedule."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ssmgen.extras import require
from ssmgen.precision import Choice, choose_precision
from ssmgen.training.checkpoint import CheckpointError, checkpoints, read_state, verify_checkpoint
from ssmgen.training.settings import TrainSettings

#: With ``[{"step": 0, "lr_decay_steps": 1000}, {"step": 1000, "lr_decay_steps": 3000}]`` the second schedule holds from
#: step 1000 on. A checkpoint keeps it as ``schedule``.
History = list[dict[str, int]]


def find_checkpoint(run: Path, resume: Path | str | None, record: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from, verified; None to start afresh.

    Args:
        run, resume: as in `train`.
        record: what the checkpoint must have been made with.

    Raises:
        CheckpointError: it is damaged (for ``"auto"``: all of them are), belongs to another configuration, or is not
            the newest of the run.
    """
    candidates = _candidates(run, resume)
    for path in reversed(candidates):
        try:
            state = verify_checkpoint(path)
        except CheckpointError as error:
            if path == candidates[0]:
                raise
            print(f"{error}\nfalling back to the checkpoint before it", file=sys.stderr)
            continue
        check_record(path, state.get("record", {}), record)
        newer = [other.name for other in checkpoints(run / "checkpoints") if other.name > path.name]
        if newer and resume != "auto":
            raise CheckpointError(
                f"{path}: the run has newer checkpoints ({', '.join(newer)}), which would mix with those written from "
                "here on: delete them, or resume into a new run folder"
            )
        return path
    return None


def _candidates(run: Path, resume: Path | str | None) -> list[Path]:
    """Checkpoints that ``resume`` asks for, oldest first."""
    if resume is None:
        return []
    return checkpoints(run / "checkpoints") if resume == "auto" else [Path(resume)]


def check_record(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Compare what a checkpoint was made with to what it is to be resumed with.

    Raises:
        CheckpointError: they differ; lists the differences.
    """
    current = json.loads(json.dumps(current))
    differences = [
        f"{key}: {saved.get(key)!r} there, {current.get(key)!r} now"
        + (", which may only grow or become 0" if key == "lr_decay_steps" else "")
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
        and not (key == "lr_decay_steps" and _may_follow(saved.get(key) or 0, current.get(key) or 0))
        and (key != "precision" or key in saved.keys() & current.keys())
    ]
    if differences:
        raise CheckpointError(
            f"{path}: belongs to another configuration ({'; '.join(differences)}). Resume with the same settings, or "
            "start a new run in another folder."
        )


def _may_follow(before: int, after: int) -> bool:
    """A cosine may become longer or end, and a constant rate may begin to fall; a shorter cosine is often a slip."""
    return not before or not after or after >= before


def settle_precision(settings: TrainSettings, run: Path, resume: Path | str | None, processes: Any) -> TrainSettings:
    """Replace ``precision="auto"`` by ``"no"`` or ``"bf16"`` and print which, and why.

    A resumed run keeps the precision in its checkpoint. A new one takes what `ssmgen.precision.choose_precision` finds
    on the first process, for all of them.

    Args:
        settings, run, resume: as in `train`.
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
    for path in reversed(_candidates(run, resume)):
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


def schedule_of(state: dict[str, Any], lr_decay_steps: int = 0) -> History:
    """The schedule in a checkpoint's state; without one, the record's ``lr_decay_steps``, or the given one."""
    recorded = state.get("record", {}).get("lr_decay_steps", lr_decay_steps)
    return state.get("schedule") or [{"step": 0, "lr_decay_steps": recorded}]


def continued(history: History, step: int, lr_decay_steps: int) -> History:
    """The history of a run that continues after ``step`` with ``lr_decay_steps``; unchanged if that is the same."""
    if history[-1]["lr_decay_steps"] == lr_decay_steps:
        return history
    return [*history, {"step": step, "lr_decay_steps": lr_decay_steps}]


def schedule_changes(history: History) -> list[str]:
    """A sentence about every change, oldest first."""
    return [
        f"learning-rate schedule changed at step {now['step']}: lr_decay_steps={now['lr_decay_steps']}, "
        f"{before['lr_decay_steps']} until then"
        for before, now in zip(history, history[1:], strict=False)
    ]
