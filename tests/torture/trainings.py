"""Toy trainings, and what two of them are compared by."""

import contextlib
import hashlib
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from toy_training import run

from ssmgen.training import CheckpointError, checkpoints, find_checkpoint, verify_checkpoint
from torture.campaign import Failed
from torture.process import threads

#: Not the same in two equal trainings: they are times.
_TIMES = ("seconds", "images_per_second")


def trained(folder: Path, **options: Any) -> None:
    """A toy training in a folder, resumed from what is there."""
    folder.mkdir(exist_ok=True)
    run(folder, resume="auto", **options)


def warm_up() -> None:
    """Import and initialise in this process what a training needs, so that forked ones begin at once."""
    from accelerate.state import AcceleratorState

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        run(Path(folder), steps=2)
    AcceleratorState._reset_state(True)
    assert threads() == 1, "a process with threads cannot be forked safely"


def contents(checkpoint: Path) -> dict[str, Any]:
    """Hashes of a checkpoint's tensors, and its state without times."""
    found: dict[str, Any] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(checkpoint.glob("*.safetensors"))
    }
    state = json.loads((checkpoint / "state.json").read_text())
    return found | {"state.json": {key: value for key, value in state.items() if key not in _TIMES}}


def log_lines(run_folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log, without times."""
    file = run_folder / "log.jsonl"
    lines = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        lines.append({key: value for key, value in values.items() if key not in _TIMES})
    return lines


def same_end(one: Path, other: Path, *, log: bool = True) -> None:
    """Require that two runs ended with the same bits: weights, average, optimiser, state, and if asked the log."""
    ends = [contents(checkpoints(run / "checkpoints")[-1]) for run in (one, other)]
    differing = [name for name in ends[0].keys() | ends[1].keys() if ends[0].get(name) != ends[1].get(name)]
    if differing:
        raise Failed(f"{', '.join(sorted(differing))} of the last checkpoint differ from those of an uncut run")
    if log and log_lines(one) != log_lines(other):
        raise Failed(f"the log differs from that of an uncut run: {log_lines(one)} and {log_lines(other)}")


def verified(run_folder: Path) -> list[Path]:
    """The checkpoints of a run that verify, oldest first."""
    return [path for path in checkpoints(run_folder / "checkpoints") if verifies(path)]


def verifies(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete and whole."""
    try:
        verify_checkpoint(checkpoint)
    except (CheckpointError, OSError):
        return False
    return True


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def resumable(run_folder: Path, least: int) -> Path:
    """Require that a run has a checkpoint of at least a step that is found and verified without hand-work."""
    good = verified(run_folder)
    if not good:
        raise Failed(f"{run_folder}: no verified checkpoint on disk")
    found = find_checkpoint(copy_of(run_folder), "auto", json.loads((good[-1] / "state.json").read_text())["record"])
    if found is None or found.name != good[-1].name:
        raise Failed(f"resume=auto finds {found}, though {good[-1].name} is verified")
    if step_of(good[-1]) < least:
        raise Failed(f"the newest verified checkpoint is {good[-1].name}, though step {least} was saved")
    return good[-1]


def copy_of(run_folder: Path) -> Path:
    """A copy beside a run, for what may change its folder."""
    copy = run_folder.with_name(run_folder.name + "-copy")
    shutil.rmtree(copy, ignore_errors=True)
    return shutil.copytree(run_folder, copy)


def no_leftovers(folder: Path) -> None:
    """Require that nothing half-made stays below a folder."""
    left = [str(path.relative_to(folder)) for path in folder.rglob("*") if ".tmp-" in path.name]
    left += [str(path.relative_to(folder)) for path in folder.rglob(".write-test-*")]
    if left:
        raise Failed(f"left behind: {', '.join(sorted(left))}")
