"""Atomic writes: files and folders are written under a temporary name beside the target, flushed, then renamed.

The temporary name is ``TARGET.tmp-MACHINE-PROCESS-START``. A process that is killed leaves it behind; the next writer
of the same target removes it, see `remove_leftovers`.
"""

import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EINVAL, ENOSPC, ENOTSUP
from pathlib import Path

from ssmgen.machine import machine, start_of

_MACHINE = hashlib.sha256(machine().encode()).hexdigest()[:8]
# Stands for the start of this process if the system does not tell it: no other process of the same id has it.
_RANDOM = uuid.uuid4().hex[:8]
_LEFTOVER = re.compile(
    r"(?P<target>.+)\.tmp-(?P<machine>[0-9a-f]{8})-(?P<process>\d{1,9})(?:-(?P<start>[0-9a-f]+))?", re.DOTALL
)
# Saves of checkpoints before the machine was part of the name.
_EARLIER = re.compile(r"step-\d{8}(\.replaced)?\.tmp-\d{1,9}")
_DAY = 86400
_abandoned_in: dict[Path, list[Path]] = {}  # folders that one process fills with many files


@contextmanager
def whole_file(target: Path, *, needed: int = 0, durable: bool = True) -> Iterator[Path]:
    """A temporary file to write, which replaces ``target`` at the end and is deleted on any error.

    Args:
        target: the file.
        needed: its size in bytes if known, which is compared with the free space first.
        durable: flush it to disk. False suits one of many files that can be made again, such as pictures.

    Raises:
        OSError: the disk is full or not writable; names ``target`` and the free space.
    """
    partial = _beside(target)
    if durable:
        remove_leftovers(target.parent, target.name)
    else:
        _remove_old_leftovers(target)
    check_space(target, needed)
    with written_for(target, partial, needed):
        try:
            yield partial
            if durable:
                flush(partial)
            partial.replace(target)
        except BaseException:
            _discard(partial)
            raise
    if durable:
        _flush_entry(target)


@contextmanager
def whole_folder(target: Path, *, needed: int = 0) -> Iterator[Path]:
    """A temporary folder to fill, which becomes ``target`` at the end and is deleted on any error.

    Args:
        target: the folder; it must not exist, or be empty.
        needed: the size of its files in bytes if known, which is compared with the free space first.

    Raises:
        OSError: ``target`` exists and is not empty, or the disk is full or not writable; names ``target`` and the free
            space.
    """
    partial = _beside(target)
    remove_leftovers(target.parent, target.name)
    _discard(partial)  # left by this process, if it could not be deleted
    check_space(target, needed)
    with written_for(target, partial, needed):
        try:
            partial.mkdir(parents=True)
            yield partial
            flush(partial)
            if target.is_dir():
                target.rmdir()
            partial.rename(target)
        except BaseException:
            _discard(partial)
            raise
    _flush_entry(target)


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8; raises the errors of `whole_file`."""
    content = text.encode()
    with whole_file(file, needed=len(content)) as partial:
        partial.write_bytes(content)


@contextmanager
def written_for(target: Path, partial: Path, needed: int = 0) -> Iterator[None]:
    """Make errors of writing to ``partial`` name ``target``; errors about other files stay unchanged."""
    try:
        yield
    except OSError as error:
        message = str(error).replace(str(partial), str(target))
        # Errors of the system carry a text; those of a write carry no name, those of open and rename do.
        if error.strerror is not None and (error.filename is None or message != str(error)):
            figures = _figures(target, needed)
            text = f"{target}: writing failed ({message}); nothing of it was kept{figures and f' ({figures})'}"
            raise disk_error(text, error.errno) from error
        if message != str(error):  # it already names a file in the folder
            raise disk_error(message, error.errno) from error
        raise


def check_space(target: Path, needed: int) -> None:
    """Compare the bytes needed with the free space, before anything is written.

    A disk that does not tell its size passes.

    Args:
        target: the file or folder to be written; it need not exist.
        needed: its size in bytes.

    Raises:
        OSError: fewer bytes are free; names ``target`` and both figures. Its ``errno`` is ``ENOSPC``.
    """
    free = free_space(target)
    if free is not None and free < needed:
        raise disk_error(
            f"{target}: needs {megabytes(needed)}, but only {megabytes(free)} are free on its disk; free some space "
            "or choose another folder",
            ENOSPC,
        )


def free_space(target: Path) -> int | None:
    """Free bytes on the disk that holds ``target``, which need not exist; None if the disk does not tell."""
    place = next((parent for parent in (target, *target.absolute().parents) if parent.exists()), Path("/"))
    try:
        usage = shutil.disk_usage(place)
    except OSError:
        return None
    return usage.free if usage.total else None  # network and user-space file systems may report zeros


def megabytes(count: int) -> str:
    """A number of bytes as text, in units of 10^6, or of 10^3 if it is small."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def disk_error(message: str, number: int | None) -> OSError:
    """An `OSError` whose text is ``message`` alone, with the system's error number for programs."""
    error = OSError(message)
    error.errno = number
    return error


def flush(path: Path) -> None:
    """Flush a file, or a folder with everything in it, to disk, so that a rename never precedes its contents."""
    if path.is_dir():
        for entry in path.iterdir():
            if not entry.is_symlink():
                flush(entry)
    _flush(path)


def _flush(path: Path) -> None:
    if os.name != "posix":  # Windows flushes no file that is open for reading only, and no folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (EINVAL, ENOTSUP):  # file systems that cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Delete a folder so that a half-deleted one never stands under its name. Not while `whole_folder` writes it anew.

    Raises:
        OSError: it cannot be renamed, and is unchanged.
    """
    partial = _beside(path)
    _discard(partial)
    path.rename(partial)
    _flush_entry(path)
    _discard(partial)


def leftovers(folder: Path, target: str | None = None) -> list[tuple[Path, bool]]:
    """Temporary files and folders in ``folder``, and whether each is abandoned.

    Abandoned means that the process of this machine that wrote it has ended. If another machine wrote it, whose
    processes cannot be seen, it means that nothing in it has changed for a day.

    Args:
        folder: where to look; it need not exist.
        target: only those of the target of this name. Without one, all of them, and those that earlier versions left
            of a checkpoint, ``step-00000001.tmp-PROCESS``.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        return []
    found = []
    for path in paths:
        match = _LEFTOVER.fullmatch(path.name)
        if match and target in (None, match["target"]):
            found.append((path, _abandoned(path, match)))
        elif target is None and _EARLIER.fullmatch(path.name):
            found.append((path, _unchanged_for_a_day(path)))
    return found


def remove_leftovers(folder: Path, target: str | None = None, *, idle: bool = False) -> list[Path]:
    """Delete abandoned temporary files and folders in ``folder``, see `leftovers`.

    Args:
        folder: where to look; it need not exist.
        target: only those of the target of this name. Only a folder that holds nothing but files of this library is
            cleared without one.
        idle: this process writes nothing there now, so that its own are abandoned too.

    Returns:
        What was deleted.
    """
    removed = []
    for path, abandoned in leftovers(folder, target):
        if abandoned or (idle and path.name.endswith(_suffix())):
            _discard(path)
            removed.append(path)
    return removed


def _remove_old_leftovers(target: Path) -> None:
    """As `remove_leftovers`, but the folder is listed once: a scan for each of many files would take long."""
    folder = target.parent
    if folder not in _abandoned_in:
        _abandoned_in[folder] = [path for path, abandoned in leftovers(folder) if abandoned]
    for path in _abandoned_in[folder]:
        match = _LEFTOVER.fullmatch(path.name)
        if match and match["target"] == target.name:
            _discard(path)


def _beside(target: Path) -> Path:
    return target.with_name(target.name + _suffix())


def _suffix() -> str:
    start = start_of(os.getpid())
    return f".tmp-{_MACHINE}-{os.getpid()}-{start if start.isdigit() else _RANDOM}"


def _abandoned(path: Path, match: re.Match[str]) -> bool:
    if match["machine"] != _MACHINE or os.name != "posix":  # Windows does not tell whether a process runs
        return _unchanged_for_a_day(path)
    process = int(match["process"])
    start = start_of(process)
    if start.isdigit():
        return start != match["start"]  # another process has got the same id
    if process == os.getpid():
        return match["start"] != _RANDOM
    return not start


def _unchanged_for_a_day(path: Path) -> bool:
    try:
        newest = max(entry.lstat().st_mtime for entry in (path, *path.rglob("*")))
    except OSError:  # its writer is at work, or has just finished
        return False
    return time.time() - newest > _DAY


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _flush_entry(target: Path) -> None:
    """Flush the folder that lists ``target``, so that the new name survives a power cut."""
    try:
        _flush(target.parent)
    except OSError as error:
        raise disk_error(f"{target}: its folder could not be flushed to disk ({error})", error.errno) from error


def _figures(target: Path, needed: int) -> str:
    free = free_space(target)
    wanted = [f"it needs {megabytes(needed)}"] if needed else []
    return ", ".join(wanted + ([] if free is None else [f"{megabytes(free)} are free on its disk"]))
