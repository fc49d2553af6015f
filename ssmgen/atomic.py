"""Files and folders that are complete or absent: written beside their name, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A sibling of ``target`` to write: takes its name at the end, and vanishes if anything goes wrong.

    A file of that name is replaced.

    Raises:
        OSError: the disk is full or cannot be written; names ``target``.
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
    """A sibling of ``target`` to write in: becomes ``target`` at the end, and vanishes if anything goes wrong.

    Raises:
        OSError: ``target`` exists and is not empty, or the disk is full or cannot be written; names ``target``.
    """
    partial = _beside(target)
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed and had the same id
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
    """Write a text file, UTF-8, that is complete or absent; raises what `whole_file` does."""
    with whole_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def written_for(target: Path, partial: Path) -> Iterator[None]:
    """Errors of writing to ``partial`` are said of ``target``; one that names a file elsewhere stays as it is.

    Raises:
        OSError: any of them; names ``target``.
    """
    try:
        yield
    except OSError as error:
        told = str(error).replace(str(partial), str(target))
        # The system's own errors carry a number. Those of a write carry no name, those of open and rename do.
        if error.errno is not None and (error.filename is None or told != str(error)):
            raise OSError(f"{target}: writing failed ({told}); nothing of it was kept") from error
        if told != str(error):  # said of a file in it already
            raise OSError(told) from error
        raise


def _beside(target: Path) -> Path:
    return target.with_name(f"{target.name}.tmp-{os.getpid()}")
