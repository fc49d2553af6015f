"""The record of a latent cache, ``cache.json``: its format, its checks, and the verification of the files it lists."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from ssmgen.atomic import write_text
from ssmgen.data.shards import EXTRA, CacheError, Shard
from ssmgen.reading import irregular, read_json, sha256_of

FORMAT = 3  # 1 had no hashes, 2 one shape and no extras
_FORMATS_READ = (2, 3)
RECORD = "cache.json"
_KEYS_OF_FORMAT_1 = {"autoencoder", "source", "flip", "count"}
PATTERN, _SHARD_NAME = "shard-*.safetensors", re.compile(r"shard-\d{5,9}\.safetensors")
_RUNS = re.compile(r"\d{1,18}(-\d{1,18})?( \d{1,18}(-\d{1,18})?)*")


def read_record(root: Path) -> dict[str, Any]:
    """The record of a cache of any format, checked; only that of format 1 has no ``shards``.

    Raises:
        FileNotFoundError: there is none.
        CacheError: it is damaged; names it.
    """
    file = root / RECORD
    if irregular(file) == "is missing":
        raise FileNotFoundError(f"{file}: not found; {root} is no complete latent cache")
    try:
        record = read_json(file)
    except (OSError, ValueError) as error:
        raise CacheError(str(error)) from error
    if not isinstance(record, dict) or type(record.get("count")) is not int or type(record.get("flip")) is not bool:
        raise CacheError(f"{file}: is not the record of a latent cache, or is damaged")
    if record.keys() == _KEYS_OF_FORMAT_1:
        return record
    version = record.get("format")
    if version not in _FORMATS_READ:
        raise CacheError(f"{file}: has format {version!r}; this version of ssmgen reads 1 to {FORMAT}")
    checksum = record.pop("sha256", None)
    if checksum != _checksum(record):
        raise CacheError(f"{file}: is damaged: its checksum is not that of its content")
    shards = record.get("shards")
    if not isinstance(shards, list) or not all(map(_is_entry, shards)):
        raise CacheError(f"{file}: is damaged: its list of shards is malformed")
    if sum(entry["count"] for entry in shards) != record["count"] or len({e["file"] for e in shards}) != len(shards):
        raise CacheError(f"{file}: is damaged: its shards do not add up to {record['count']} examples")
    extras = record.get("extras", [])
    if not isinstance(extras, list) or not all(isinstance(name, str) for name in extras):
        raise CacheError(f"{file}: is damaged: its list of extras is malformed")
    return record


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(type(entry.get(key)) is int and entry[key] > 0 for key in ("bytes", "count"))
        and all(isinstance(entry.get(key), str) for key in ("file", "sha256"))
        and _SHARD_NAME.fullmatch(entry["file"]) is not None  # which cannot lead outside the folder
        and isinstance(entry.get("shape", []), list)
        and isinstance(entry.get("examples", "0"), str)
        and _RUNS.fullmatch(entry.get("examples", "0")) is not None
    )


def runs_of(examples: Sequence[int]) -> str:
    """Ascending numbers as text, such as ``"0-3 7"`` for 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for example in examples:
        if runs and runs[-1][1] == example - 1:
            runs[-1][1] = example
        else:
            runs.append([example, example])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def examples_of(root: Path, record: dict[str, Any]) -> list[Sequence[int]]:
    """The examples that each shard holds, in the order of its rows; those of formats before 3 follow each other.

    Raises:
        CacheError: they are not each of the recorded examples once.
    """
    found: list[Sequence[int]] = []
    start = 0
    for entry in record["shards"]:
        runs = [run.split("-") for run in entry.get("examples", f"{start}-{start + entry['count'] - 1}").split(" ")]
        ranges = [range(int(run[0]), int(run[-1]) + 1) for run in runs]
        if sum(map(len, ranges)) != entry["count"]:  # before they are listed: a number may be huge
            raise CacheError(f"{root / RECORD}: is damaged: {entry['file']} does not list {entry['count']} examples")
        found.append(ranges[0] if len(ranges) == 1 else [example for each in ranges for example in each])
        start += entry["count"]
    if sorted(example for each in found for example in each) != list(range(record["count"])):
        raise CacheError(f"{root / RECORD}: is damaged: its shards do not hold each of the examples once")
    return found


def write_record(root: Path, record: dict[str, Any]) -> None:
    record = {"format": FORMAT} | record
    write_text(root / RECORD, json.dumps(record | {"sha256": _checksum(record)}, indent=2) + "\n")


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def check_origin(root: Path, record: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        if record.get(key) != value:
            raise ValueError(
                f"{root}: was written with {key}={record.get(key)}, but {key}={value} was requested: "
                "delete the cache so that it is written again"
            )


def unrecorded(root: Path, record: dict[str, Any]) -> list[Path]:
    recorded = {entry["file"] for entry in record["shards"]}
    return sorted(file for file in root.glob(PATTERN) if file.name not in recorded)


def open_shards(root: Path, record: dict[str, Any], verify: bool) -> list[Shard]:
    """All shards, checked against the record.

    Raises:
        CacheError: any is damaged, missing or additional; all are named.
    """

    def opened(entry: dict[str, Any]) -> Shard | CacheError:
        try:
            shard = Shard(root / entry["file"], entry["bytes"], entry["sha256"])
            if verify:
                shard.verify()
            shapes = shard.shapes()
            if shard.count != entry["count"] or not needed <= shapes.keys():
                raise CacheError(f"{shard.file}: holds {shapes}, not {entry['count']} rows of {sorted(needed)}")
            if list(shapes["latents"][1:]) != entry.get("shape", list(shapes["latents"][1:])):
                raise CacheError(f"{shard.file}: holds {shapes}, not latents of the recorded shape {entry['shape']}")
            return shard
        except CacheError as error:
            return error

    needed = {"latents", "masks"} | ({"latents_flipped"} if record["flip"] else set())
    needed |= {EXTRA + name for name in record.get("extras", [])}
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # hashing releases the lock
        found = list(pool.map(opened, record["shards"]))
    faults = [str(item) for item in found if isinstance(item, CacheError)]
    faults += [f"{file}: is not one of the recorded shards" for file in unrecorded(root, record)]
    if faults:
        raise CacheError(f"{len(faults)} file(s) of the cache are damaged:\n  " + "\n  ".join(faults))
    return [item for item in found if isinstance(item, Shard)]


def upgraded(root: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record of a cache of format 1 with the hashes that its files have now; it is written if possible.

    Raises:
        CacheError: its shards do not hold the recorded number of examples.
    """
    print(
        f"{root}: a latent cache of format 1, without hashes: it is hashed now and verified from now on",
        file=sys.stderr,
    )
    shards = [Shard(file) for file in sorted(root.glob(PATTERN))]
    if sum(shard.count for shard in shards) != record["count"]:
        raise CacheError(f"{root}: holds {sum(s.count for s in shards)} examples, {record['count']} are recorded")
    ends = accumulate(shard.count for shard in shards)
    entries = [
        entry_of(shard.file, range(end - shard.count, end), shard.shapes().get("latents", ())[1:])
        for shard, end in zip(shards, ends, strict=True)
    ]
    new = record | {"format": FORMAT, "extras": [], "shards": entries}
    with suppress(OSError):  # on a read-only disk it is hashed at every opening
        write_record(root, new)
    return new


def entry_of(file: Path, examples: Sequence[int], shape: Sequence[int]) -> dict[str, Any]:
    """A shard's entry in the record: its file, its examples in the order of its rows, the shape of a latent."""
    size, sha256 = file.stat().st_size, sha256_of(file)
    entry = {"file": file.name, "bytes": size, "sha256": sha256, "count": len(examples)}
    return entry | {"shape": list(shape), "examples": runs_of(examples)}
