"""Atomic writes: files and folders are written under a temporary name beside the target, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary file to write, which replaces ``target`` at the end and is deleted on any error.

    Raises:
        OSError: the disk is full or not writable; names ``target``.
    """
    partial = _beside(target)
    try:
        with written_for(target, partial):
            yield partial
            partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes ``target`` at the end and is deleted on any error.

    Raises:
        OSError: ``target`` exists and is not empty, or the disk is full or not writable; names ``target``.
    """
    partial = _beside(target)
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process of the same id
    try:
        with written_for(target, partial):
            partial.mkdir(parents=True)
            yield partial
            if target.is_dir():
                target.rmdir()
            partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8; raises the errors of `whole_file`."""
    with whole_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def written_for(target: Path, partial: Path) -> Iterator[None]:
    """Make errors of writing to ``partial`` name ``target``; errors about other files stay unchanged."""
    try:
        yield
    except OSError as error:
        message = str(error).replace(str(partial), str(target))
        # Errors of the system carry a number; those of a write carry no name, those of open and rename do.
        if error.errno is not None and (error.filename is None or message != str(error)):
            raise OSError(f"{target}: writing failed ({message}); nothing of it was kept") from error
        if message != str(error):  # it already names a file in the folder
            raise OSError(message) from error
        raise


def _beside(target: Path) -> Path:
    return target.with_name(f"{target.name}.tmp-{os.getpid()}")
