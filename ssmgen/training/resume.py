"""Which checkpoint a run is resumed from, and whether it belongs to the same configuration."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ssmgen.training.checkpoint import CheckpointError, checkpoints, verify_checkpoint
from ssmgen.training.schedule import may_follow


def find_checkpoint(run: Path, resume: Path | str | None, record: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from, verified; None to start afresh.

    Args:
        run: the run's folder.
        resume: as in `train`.
        record: what the checkpoint must have been made with.

    Raises:
        CheckpointError: it is damaged (for ``"auto"``: all of them are), belongs to another configuration, or is not
            the newest of the run.
    """
    if resume is None:
        return None
    candidates = checkpoints(run / "checkpoints") if resume == "auto" else [Path(resume)]
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


def check_record(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Compare what a checkpoint was made with to what it shall be resumed with.

    Raises:
        CheckpointError: they differ; lists the differences.
    """
    current = json.loads(json.dumps(current))
    differences = [
        f"{key}: {saved.get(key)!r} there, {current.get(key)!r} now"
        + (", which may only grow or become 0" if key == "lr_decay_steps" else "")
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
        and not (key == "lr_decay_steps" and may_follow(saved.get(key) or 0, current.get(key) or 0))
        and (key != "precision" or key in saved.keys() & current.keys())
    ]
    if differences:
        raise CheckpointError(
            f"{path}: belongs to another configuration ({'; '.join(differences)}). Resume with the same settings, or "
            "start a new run in another folder."
        )
