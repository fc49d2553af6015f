"""Reading files from outside: only regular files are opened, so a FIFO or a device cannot block or flood a process."""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def irregular(file: Path) -> str:
    """Why a file cannot be read as data, e.g. ``"is a FIFO, not a regular file"``; empty for a regular file.

    Links are followed. A missing file is ``"is a link to a missing file"`` or ``"is missing"``.
    """
    try:
        return _fault(file.stat().st_mode)
    except FileNotFoundError:
        return "is a link to a missing file" if file.is_symlink() else "is missing"
    except OSError as error:  # a loop of links, no permission
        return f"cannot be read ({error.strerror})"


def open_regular(file: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, a FIFO, a socket or a device; names the file.
        OSError: it cannot be read.
    """
    try:
        if fault := _fault(file.stat().st_mode):  # before opening: that alone can have effects on a device
            raise ValueError(f"{file}: {fault}")
        # Without O_NONBLOCK, opening a FIFO that took the file's place meanwhile would wait for its writer.
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except OSError as error:
        raise OSError(f"{file}: cannot be read ({error.strerror})") from error
    stream = os.fdopen(descriptor, "rb")
    if fault := _fault(os.fstat(descriptor).st_mode):
        stream.close()
        raise ValueError(f"{file}: {fault}")
    return stream


def read_bytes(file: Path) -> bytes:
    """The content of a regular file; raises the errors of `open_regular`."""
    with open_regular(file) as stream:
        try:
            return stream.read()
        except OSError as error:
            raise OSError(f"{file}: cannot be read ({error.strerror})") from error


def read_json(file: Path) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte-order mark.

    Raises:
        FileNotFoundError, OSError: see `open_regular`.
        ValueError: not a regular file, or not JSON; names the file.
    """
    content = read_bytes(file)
    try:
        return json.loads(content.decode("utf-8-sig"))  # an editor on Windows may add a byte-order mark
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as JSON ({error})") from error


def sha256_of(file: Path) -> str:
    """SHA-256 of a regular file as 64 hexadecimal digits; raises the errors of `open_regular`."""
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def _fault(mode: int) -> str:
    return "" if stat.S_ISREG(mode) else f"is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a regular file"
