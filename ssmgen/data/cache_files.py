"""The record of a latent cache, ``cache.json``: its format, its checks, and the verification of the files it lists."""

import hashlib
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssmgen.atomic import write_text
from ssmgen.data.shards import CacheError, Shard
from ssmgen.reading import irregular, read_json, sha256_of

FORMAT = 2  # 1 had no hashes
RECORD = "cache.json"
_KEYS_OF_FORMAT_1 = {"autoencoder", "source", "flip", "count"}
PATTERN, _SHARD_NAME = "shard-*.safetensors", re.compile(r"shard-\d{5,9}\.safetensors")


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
    if version != FORMAT:
        raise CacheError(f"{file}: has format {version!r}; this version of ssmgen reads 1 and {FORMAT}")
    checksum = record.pop("sha256", None)
    if checksum != _checksum(record):
        raise CacheError(f"{file}: is damaged: its checksum is not that of its content")
    shards = record.get("shards")
    if not isinstance(shards, list) or not all(map(_is_entry, shards)):
        raise CacheError(f"{file}: is damaged: its list of shards is malformed")
    if sum(entry["count"] for entry in shards) != record["count"] or len({e["file"] for e in shards}) != len(shards):
        raise CacheError(f"{file}: is damaged: its shards do not add up to {record['count']} examples")
    return record


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(type(entry.get(key)) is int and entry[key] > 0 for key in ("bytes", "count"))
        and all(isinstance(entry.get(key), str) for key in ("file", "sha256"))
        and _SHARD_NAME.fullmatch(entry["file"]) is not None  # which cannot lead outside the folder
    )


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
            if shard.count != entry["count"] or not needed <= shard.shapes().keys():
                raise CacheError(f"{shard.file}: holds {shard.shapes()}, not {entry['count']} rows of {sorted(needed)}")
            return shard
        except CacheError as error:
            return error

    needed = {"latents", "masks"} | ({"latents_flipped"} if record["flip"] else set())
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
    new = record | {"format": FORMAT, "shards": [entry_of(shard.file, shard.count) for shard in shards]}
    with suppress(OSError):  # on a read-only disk it is hashed at every opening
        write_record(root, new)
    return new


def entry_of(file: Path, count: int) -> dict[str, Any]:
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256_of(file), "count": count}
