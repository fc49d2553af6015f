"""Hashes of many files, remembered between runs: an unchanged file is not read again."""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ssmgen.atomic import write_text
from ssmgen.reading import read_json, sha256_of

# A file written within the resolution of the clock after it was hashed would keep its time stamps.
_SETTLED = 2 * 10**9  # nanoseconds


def file_hashes(root: Path, names: Sequence[str], index: Path | None = None) -> dict[str, str]:
    """SHA-256 of files by name relative to ``root``.

    Args:
        root: their folder.
        names: the files, relative to ``root``.
        index: JSON file that remembers the hashes. A file is read again unless its size, its times of modification and
            of status change, and its inode are those remembered. The status change cannot be set back, so a file that
            is replaced with one of the same size and date is read as well. A damaged or missing index only costs time,
            as does one that cannot be written. None reads all files.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a regular file; names it.
        OSError: a file cannot be read.
    """
    known = _read_index(index) if index else {}
    stats = {name: _stat(root / name) for name in names}
    current = {name: known[name][1] for name in names if known.get(name, [None])[0] == stats[name]}
    changed = [name for name in names if name not in current]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # hashing releases the lock
        current |= zip(changed, pool.map(lambda name: sha256_of(root / name), changed), strict=True)
    if index and changed:
        settled = time.time_ns() - _SETTLED
        entries = {name: [stats[name], current[name]] for name in names if max(stats[name][1:3]) < settled}
        _write_index(index, entries)
    return {name: current[name] for name in names}


def _stat(file: Path) -> list[int]:
    try:
        found = file.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read_index(index: Path) -> dict[str, Any]:
    """The entries that have the right form; none if the file is missing or damaged."""
    try:
        content = read_json(index)
    except (OSError, ValueError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {name: entry for name, entry in entries if _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], list) and isinstance(entry[1], str)


def _write_index(index: Path, entries: dict[str, Any]) -> None:
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        write_text(index, json.dumps(entries))
    except OSError:
        return  # on a read-only disk the files are read again next time
