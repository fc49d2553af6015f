"""Check a run's folder as loading does, and mend what can be mended without guessing."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ssmgen.atomic import leftovers, remove_folder, remove_leftovers, write_text
from ssmgen.training.checkpoint import checkpoint_folders, listed
from ssmgen.training.log import last_logged
from ssmgen.training.manifest import (
    FORMAT,
    MANIFEST,
    NAME,
    CheckpointError,
    NewerFormatError,
    read_manifest,
    rendered,
    size_of,
    verify_checkpoint,
)
from ssmgen.training.resume import present, set_aside

Status = Literal["ok", "damaged", "set aside", "leftover", "note", "unknown"]


@dataclass(frozen=True)
class Finding:
    """One thing in a run's folder.

    Attributes:
        name: its name in the folder.
        status: ``"ok"``; ``"damaged"``; ``"set aside"``, which no command reads; ``"leftover"`` of a write that was
            killed; ``"note"``, which needs no action; ``"unknown"`` if it cannot be read.
        detail: the reason, or what it is.
        bytes: its size.
        step, format: of a checkpoint, if known.
    """

    name: str
    status: Status
    detail: str
    bytes: int = 0
    step: int | None = None
    format: int | None = None

    @property
    def mendable(self) -> bool:
        """Whether mending does something about it."""
        return self.status == "leftover" or (self.status == "damaged" and "step-" in self.name)

    @property
    def wrong(self) -> bool:
        """Whether someone has to act."""
        return self.status in ("damaged", "leftover", "unknown")


def check_run(run: Path) -> list[Finding]:
    """Everything worth knowing in a run's folder, or in a folder of checkpoints.

    Args:
        run: its folder; that of its checkpoints stands for it, see `run_of`.

    Raises:
        FileNotFoundError: it is not a folder, or holds neither checkpoints nor a log.
        OSError: it cannot be listed.
    """
    run = run_of(run)
    folder = _checkpoints_of(run)
    found = [*_checkpoints(folder), *_set_aside(folder), *_others(folder), *_leftovers(folder)]
    if folder != run:
        found += _leftovers(run)
    found += _files(run)
    usable = any(finding.status in ("ok", "unknown") for finding in found if finding.step is not None)
    if not present(folder) and (last := last_logged(run)):
        found.append(Finding("checkpoints/", "note", f"holds no checkpoint, though the log has {last:,} steps"))
    if present(folder) and not usable:
        found.append(Finding(f"{folder.name}/", "damaged", "no checkpoint is intact, so the run is not resumed"))
    return found


def run_of(folder: Path) -> Path:
    """The run that a folder belongs to: the parent of its ``checkpoints``, or the folder itself."""
    whole = Path(os.path.abspath(folder))  # links are kept: the checkpoints may lie on another disk
    itself_a_run = os.path.lexists(whole / "checkpoints") or os.path.lexists(whole / "log.jsonl")
    return whole.parent if whole.name == "checkpoints" and whole.is_dir() and not itself_a_run else folder


def mend_run(run: Path) -> list[str]:
    """Mend a run's folder; returns a sentence for each thing done.

    Abandoned leftovers are deleted, what was set aside and verifies again is restored, damaged checkpoints are set
    aside, and manifests of an older format are replaced by one of today's. Nothing else is deleted.

    Args:
        run: as in `check_run`. Hold its lock, see `ssmgen.training.run_lock`.

    Raises:
        FileNotFoundError: see `check_run`.
        NewerFormatError: a later ssmgen wrote one of the checkpoints; nothing was changed.
        OSError: the folder cannot be read or written.
    """
    run = run_of(run)
    folder = _checkpoints_of(run)
    _refuse_newer(folder)
    done = [f"{path.name}: deleted, a leftover" for place in {folder, run} for path in remove_leftovers(place)]
    done += _finish_replacements(folder)
    for path in checkpoint_folders(folder):
        if _damage(path):
            done.append(f"{path.name}: set aside as {set_aside(path).name}")
    done += _restore(folder)
    for path in checkpoint_folders(folder):  # all of them verify now
        if read_manifest(path).format < FORMAT:
            write_text(path / MANIFEST, rendered(read_manifest(path).files))
            done.append(f"{path.name}: has a manifest of format {FORMAT} now")
    return done


def _checkpoints_of(run: Path) -> Path:
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: is not a folder; name the folder of a run")
    if os.path.lexists(run / "checkpoints"):
        return run / "checkpoints"
    if any("step-" in path.name for path in listed(run)) or (run / "log.jsonl").exists():
        return run
    raise FileNotFoundError(f"{run}: holds neither checkpoints nor a log; name the folder of a run")


def _refuse_newer(folder: Path) -> None:
    for path in listed(folder):
        try:
            if NAME.fullmatch(path.name):
                read_manifest(path)
        except CheckpointError as error:  # one that is damaged is mended
            if isinstance(error, NewerFormatError):
                raise


def _damage(path: Path) -> str:
    """Why a checkpoint does not verify; empty if it does."""
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    return ""


def _checkpoints(folder: Path) -> Iterator[Finding]:
    for path in checkpoint_folders(folder):
        match = NAME.fullmatch(path.name)
        assert match is not None
        step, size = int(match[1]), size_of(path)
        try:
            verify_checkpoint(path)
            known = read_manifest(path).format
            older = "" if known == FORMAT else f"an older format; --mend writes format {FORMAT}"
            yield Finding(path.name, "ok", older, size, step, known)
        except (OSError, NewerFormatError) as error:
            yield Finding(path.name, "unknown", str(error), size, step)
        except CheckpointError as error:
            yield Finding(path.name, "damaged", str(error), size, step)


def _set_aside(folder: Path) -> Iterator[Finding]:
    for path in _named(folder, "damaged-step-"):
        reason, home = _damage(path), _home(path)
        if home:
            yield Finding(path.name, "damaged", f"verifies as {home.name}; --mend restores it", size_of(path))
        else:
            reason = reason or "verifies, but another checkpoint has its step"
            yield Finding(path.name, "set aside", f"{reason}; no command reads it", size_of(path))


def _home(path: Path) -> Path | None:
    """The name that a set-aside checkpoint gets back; None if it is damaged, or another has the name."""
    if _damage(path):
        return None
    home = path.with_name(f"step-{verify_checkpoint(path)['step']:08d}")
    return None if os.path.lexists(home) else home


def _named(folder: Path, start: str) -> list[Path]:
    return [path for path in listed(folder) if path.name.startswith(start)]


def _others(folder: Path) -> Iterator[Finding]:
    current = checkpoint_folders(folder)
    for path in _named(folder, "step-"):
        if path in current or ".tmp-" in path.name:
            continue
        if NAME.fullmatch(path.name):
            yield Finding(path.name, "leftover", "makes way for another checkpoint of its step", size_of(path))
        else:
            detail = "is not named step- and eight digits; no command reads it"
            yield Finding(path.name, "note", detail, size_of(path))


def _leftovers(folder: Path) -> Iterator[Finding]:
    for path, abandoned in leftovers(folder):
        size = size_of(path) if path.is_dir() else path.lstat().st_size
        if abandoned:
            yield Finding(path.name, "leftover", "an unfinished write; its process is gone", size)
        else:
            yield Finding(path.name, "note", "is being written, or its process runs on another machine", size)


def _files(run: Path) -> Iterator[Finding]:
    log, config = run / "log.jsonl", run / "config.yaml"
    if log.is_file():
        lines = log.read_bytes().splitlines()
        broken = [number for number, line in enumerate(lines, 1) if not _is_log_line(line)]
        detail = f"{len(lines)} lines"
        if broken:
            detail += f", {len(broken)} of them broken, the first is line {broken[0]}; resuming drops them"
        yield Finding(log.name, "note" if broken else "ok", detail, log.stat().st_size)
    if config.exists():
        yield _config(config)


def _is_log_line(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line)["step"], int)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _config(file: Path) -> Finding:
    """Whether a configuration is YAML; whether its settings make sense is for the command that reads it."""
    size = file.stat().st_size
    if not file.is_file():
        return Finding(file.name, "damaged", f"{file}: is not a regular file", size)
    try:
        import yaml
    except ImportError:  # comes with the extra `train`
        return Finding(file.name, "note", "not checked, because PyYAML is not installed", size)
    try:
        yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = f"{file}: is not valid YAML ({' '.join(str(error).split())[:200]})"
        return Finding(file.name, "damaged", reason, size)
    return Finding(file.name, "ok", "readable YAML; its settings are not checked", size)


def _finish_replacements(folder: Path) -> list[str]:
    """End what a kill interrupted while a checkpoint was replaced by another of its step."""
    done = []
    for old in _named(folder, "step-"):
        new = old.with_suffix("")
        if not NAME.fullmatch(old.name) or old == new:
            continue
        if os.path.lexists(new) and not _damage(new):
            remove_folder(old)
            done.append(f"{old.name}: deleted, {new.name} replaces it")
        else:
            if os.path.lexists(new):
                done.append(f"{new.name}: set aside as {set_aside(new).name}")
            old.rename(new)
            done.append(f"{old.name}: renamed to {new.name}")
    return done


def _restore(folder: Path) -> list[str]:
    done = []
    for path in _named(folder, "damaged-step-"):
        if home := _home(path):
            path.rename(home)
            done.append(f"{path.name}: verifies, restored as {home.name}")
    return done
