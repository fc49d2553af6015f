"""Resuming a run: from which checkpoint, in which precision, and on which learning-rate schedule."""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ssmgen.atomic import whole_file
from ssmgen.extras import require
from ssmgen.precision import Choice, choose_precision
from ssmgen.signals import say
from ssmgen.training.checkpoint import checkpoint_folders, listed, replaced_by
from ssmgen.training.log import last_logged
from ssmgen.training.manifest import NAME, CheckpointError, NewerFormatError, read_state, verify_checkpoint
from ssmgen.training.settings import TrainSettings

#: With ``[{"step": 0, "lr_decay_steps": 1000}, {"step": 1000, "lr_decay_steps": 3000}]`` the second schedule holds from
#: step 1000 on. A checkpoint keeps it as ``schedule``.
History = list[dict[str, int]]


def find_checkpoint(run: Path, resume: Path | str | None, record: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from, verified; None to start afresh.

    With ``"auto"``, damaged checkpoints newer than it are set aside: each is renamed to ``damaged-step-*`` and named on
    stderr with the reason.

    Args:
        run, resume: as in `train`.
        record: what the checkpoint must have been made with.

    Raises:
        NewerFormatError: a later ssmgen wrote it (for ``"auto"``: it, or a newer one); nothing is set aside.
        CheckpointError: it is damaged (for ``"auto"``: all of them are), belongs to another configuration, or is not
            the newest of the run.
        OSError: it, or the folder of checkpoints, cannot be read, although it may be intact.
    """
    if resume is None:
        return None
    if resume == "auto":
        return _newest_usable(run, record)
    path = Path(resume)
    check_record(path, verify_checkpoint(path).get("record", {}), record)
    newer = [other.name for other in checkpoint_folders(run / "checkpoints") if other.name > path.name]
    if newer:
        raise CheckpointError(
            f"{path}: the run has newer checkpoints ({', '.join(newer)}), which would mix with those written from "
            "here on: delete them, or resume into a new run folder"
        )
    return path


def _newest_usable(run: Path, record: dict[str, Any]) -> Path | None:
    reasons: dict[Path, str] = {}
    for path in _newest_first(run / "checkpoints"):
        try:
            state = verify_checkpoint(path)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            reasons[path] = str(error)
            continue
        check_record(path, state.get("record", {}), record)
        for damaged, reason in reasons.items():
            say(f"{reason}\nfalling back to {path.name}, the newest intact checkpoint")
            _try_to_set_aside(damaged)
        return path
    reasons_by_name = present(run / "checkpoints") | {path.name: reason for path, reason in reasons.items()}
    if reasons_by_name:
        raise CheckpointError(
            f"{run / 'checkpoints'}: none of its checkpoints can be used, and a run does not begin anew by itself:\n"
            + "".join(f"  {name}: {reason}\n" for name, reason in reasons_by_name.items())
            + f"ssmgen fsck {run} --mend restores what can be restored. To train anew, move these folders away or give "
            "another run folder"
        )
    return None


def _newest_first(folder: Path) -> Iterator[Path]:
    """Checkpoints of a folder. One that makes way for another of its step comes after that."""
    for path in reversed(checkpoint_folders(folder)):
        yield path
        if os.path.lexists(replaced_by(path)):
            yield replaced_by(path)


def check_lost(run: Path, checkpoint_every: int) -> None:
    """Reject to begin anew a run whose log tells of steps that must have had a checkpoint.

    Its disk may not be mounted, or only a part of it was copied.

    Args:
        run: a run without checkpoints.
        checkpoint_every: steps between two. A kill during the first save leaves a log of about so many steps.

    Raises:
        CheckpointError: the log has at least twice as many.
    """
    last = last_logged(run)
    if last >= 2 * checkpoint_every:
        raise CheckpointError(
            f"{run / 'checkpoints'}: holds no checkpoint, though the log has {last:,} steps. Restore it (is its disk "
            f"mounted?), or give another run folder. To begin this run anew, delete {run / 'log.jsonl'}"
        )


def present(folder: Path) -> dict[str, str]:
    """Names of everything that is or was a checkpoint, with why it may not count as one. Leftovers do not.

    Raises:
        OSError: the folder exists, but cannot be listed.
    """
    found = {}
    for path in listed(folder):
        if path.name.startswith("damaged-step-"):
            found[path.name] = f"was set aside: {_fault(path)}"
        elif NAME.fullmatch(path.name):
            found[path.name] = "is damaged"
        elif path.name.startswith("step-") and ".tmp-" not in path.name:
            found[path.name] = "is not named step- and eight digits; rename it if it is a checkpoint"
    return found


def _fault(path: Path) -> str:
    try:
        verify_checkpoint(path)
    except (CheckpointError, OSError) as error:
        return str(error)
    return "it verifies again"


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint to ``damaged-step-*``, so that it no longer counts as one, and return its new path.

    Raises:
        OSError: it cannot be renamed.
    """
    target = _free_name(path.with_name(f"damaged-{path.name}"))
    path.rename(target)
    return target


def _try_to_set_aside(path: Path) -> None:
    """Or leave it, which costs nothing but its name: it is not counted, and never resumed."""
    try:
        say(f"{path}: set aside as {set_aside(path).name}")
    except OSError as error:
        say(f"{path}: could not be set aside ({error})")


def _free_name(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, ... that does not exist."""
    names = (path.name + (f"-{count}" if count > 1 else "") for count in itertools.count(1))
    return next(target for name in names if not os.path.lexists(target := path.with_name(name)))


def check_free(run: Path, resume: Path | str | None) -> None:
    """Reject a folder with checkpoints of a run that is not continued: they would be mixed with the new ones.

    Args:
        run, resume: as in `train`.

    Raises:
        FileExistsError: says how to continue the run.
    """
    kept = checkpoint_folders(run / "checkpoints")
    continued = resume == "auto" or (resume is not None and run.resolve() in Path(resume).resolve().parents)
    if kept and not continued:
        raise FileExistsError(
            f"{run}: holds checkpoints of an earlier training, the last is {kept[-1].name}: continue it with "
            "resume='auto', or choose another folder"
        )


def keep_earlier_log(run: Path, step: int) -> None:
    """Copy the log of a run that begins anew at step 0 to ``log.jsonl.before``, and say so on stderr.

    Raises:
        OSError: it cannot be copied; nothing was changed.
    """
    log = run / "log.jsonl"
    if step > 0 or not log.is_file() or not log.stat().st_size:
        return
    target = _free_name(run / "log.jsonl.before")
    with whole_file(target, needed=log.stat().st_size) as partial:
        shutil.copyfile(log, partial)
    say(f"{run}: has a log but no checkpoint, so training begins at step 0; the earlier log is kept as {target.name}")


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
        say(str(choice))
        bf16 += choice.precision == "bf16"
    bf16 = require("accelerate", extra="train").utils.broadcast(bf16, from_process=0)
    return replace(settings, precision="bf16" if bf16.item() else "no")


def _recorded(run: Path, resume: Path | str | None) -> Choice | None:
    """What the newest readable checkpoint records; `find_checkpoint` checks whether it can be resumed."""
    paths = checkpoint_folders(run / "checkpoints") if resume == "auto" else [Path(resume)] if resume else []
    for path in reversed(paths):
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
