"""Atomic writes: files and folders are written under a temporary name beside the target, flushed, then renamed.

The temporary name is ``TARGET.tmp-HOST-PROCESS``. A process that is killed leaves it behind; the next writer of the
same target removes it, see `remove_leftovers`.
"""

import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EINVAL, ENOSPC, ENOTSUP
from pathlib import Path

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_LEFTOVER = re.compile(r"(?P<target>.+)\.tmp-(?:(?P<host>[0-9a-f]{8})-)?(?P<process>\d{1,9})", re.DOTALL)
_STARTED = time.time()
_DAY = 86400
_cleaned: set[Path] = set()


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
    if durable or target.parent not in _cleaned:  # a scan for each of many files would take long
        remove_leftovers(target.parent, target.name if durable else None)
        _cleaned.add(target.parent)
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
    _discard(partial)  # left by a killed process of the same id
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
    """Delete a folder so that a half-deleted one never stands under its name.

    Raises:
        OSError: it cannot be renamed, and is unchanged.
    """
    partial = _beside(path)
    _discard(partial)
    path.rename(partial)
    _flush_entry(path)
    _discard(partial)


def leftovers(folder: Path) -> list[tuple[Path, bool]]:
    """Temporary files and folders in ``folder``, and whether each is abandoned.

    Abandoned means that the process of this machine that wrote it is gone, or that nothing in it changed for a day.
    """
    try:
        found = [(path, match) for path in folder.iterdir() if (match := _LEFTOVER.fullmatch(path.name))]
    except OSError:
        return []
    return sorted((path, _abandoned(path, match["host"], int(match["process"]))) for path, match in found)


def remove_leftovers(folder: Path, target: str | None = None) -> list[Path]:
    """Delete abandoned temporary files and folders in ``folder``, see `leftovers`.

    Args:
        folder: where to look; it need not exist.
        target: only those of the target of this name.

    Returns:
        What was deleted.
    """
    removed = []
    for path, abandoned in leftovers(folder):
        match = _LEFTOVER.fullmatch(path.name)
        if abandoned and match and target in (None, match["target"]):
            _discard(path)
            removed.append(path)
    return removed


def _beside(target: Path) -> Path:
    return target.with_name(f"{target.name}.tmp-{_HOST}-{os.getpid()}")


def _abandoned(path: Path, host: str | None, process: int) -> bool:
    try:
        changed = path.lstat().st_mtime
    except OSError:
        return False  # its writer has just finished
    if time.time() - changed > _DAY:
        return True
    if host not in (None, _HOST) or os.name != "posix":
        return False
    if process == os.getpid():
        return changed < _STARTED  # of an earlier process with this id, as in a restarted container
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return False


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
