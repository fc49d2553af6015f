"""The manifest of a checkpoint: its files with sizes and SHA-256, and a checksum of the manifest itself.

``MANIFEST.json`` of format 2 is ``{"format": 2, "files": {NAME: {"bytes": N, "sha256": HEX}}, "checksum": HEX}``. Later
formats keep the meaning of ``format`` and ``checksum``. Format 1 is the mapping of names alone, without a checksum.

Nothing that stands in a checkpoint's folder is trusted: every fault is a `CheckpointError` that names the file.
"""

import errno
import hashlib
import json
import math
import re
import reprlib
import stat
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ssmgen.training.health import Health

MANIFEST = "MANIFEST.json"
STATE = "state.json"
EMA = "ema.safetensors"
FILES = (EMA, "model.safetensors", "optimizer.safetensors", STATE)
FORMAT = 2
#: A checkpoint's folder. ``.replaced`` is one that makes way for another of the same step.
NAME = re.compile(r"step-([0-9]{8})(\.replaced)?")
#: Key of the state: updates of the moving average.
AVERAGED = "averaged"

_MOST_BYTES = {MANIFEST: 10**6, STATE: 2 * 10**7}
_MOST_LEVELS = 50
_MOST_COUNT = 2**63 - 1
#: Errors of the system that mean damage. Others, such as missing permission, say nothing about the checkpoint.
_DAMAGE = {
    getattr(errno, name)
    for name in ("ENOENT", "ENOTDIR", "ELOOP", "EIO", "EBADMSG", "EUCLEAN")  # not all of them exist on every system
    if hasattr(errno, name)
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


class NewerFormatError(CheckpointError):
    """A checkpoint of a later ssmgen. It is not damaged, so nothing falls back to another one or renames it."""


class Entry(NamedTuple):
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """What a checkpoint consists of: its format, and an entry for each of `FILES`."""

    format: int
    files: dict[str, Entry]


def write_manifest(folder: Path) -> None:
    """Write the manifest of a folder that holds all of `FILES`."""
    files = {name: Entry((folder / name).stat().st_size, _sha256(folder / name)) for name in FILES}
    (folder / MANIFEST).write_text(rendered(files))


def rendered(files: dict[str, Entry]) -> str:
    """The text of a manifest of format `FORMAT`."""
    content: dict[str, Any] = {"format": FORMAT, "files": {name: files[name]._asdict() for name in FILES}}
    return json.dumps(content | {"checksum": _checksum(content)}, indent=2) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint's folder, checked by itself; the files are not looked at.

    Raises:
        NewerFormatError: it was written by a later ssmgen.
        CheckpointError: it is missing, altered, or lists other files than `FILES`.
        OSError: it cannot be read for a reason that is no fault of the checkpoint, such as missing permission.
    """
    file = folder / MANIFEST
    text = _read(file)
    content = _parsed(file, text)
    if "format" not in content:
        return Manifest(1, _entries(file, content))
    checksum = content.pop("checksum", None)
    intact = checksum == _checksum(content)
    if _is_count(content["format"]) and content["format"] > FORMAT and intact:
        raise NewerFormatError(
            f"{file}: was written by a newer ssmgen (format {content['format']}, this one reads up to {FORMAT}): "
            "update ssmgen"
        )
    if not intact:
        raise CheckpointError(f"{file}: does not agree with its own checksum; it was altered or damaged")
    if content.keys() != {"format", "files"} or content["format"] != FORMAT or not isinstance(content["files"], dict):
        raise CheckpointError(f"{file}: is no manifest of format {FORMAT}")
    files = _entries(file, content["files"])
    if text != rendered(files):
        raise CheckpointError(f"{file}: was altered; its spacing or order is not as it was written")
    return Manifest(FORMAT, files)


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest and return the state.

    Symbolic links are followed, because the content is verified: a checkpoint may lie in a hub's cache.

    Raises:
        CheckpointError: a file is missing, truncated, altered or no regular file, the state has a wrong type or
            another step than the folder's name; names the file. A `NewerFormatError` if a later ssmgen wrote it.
        OSError: a file cannot be read for a reason that is no fault of the checkpoint, such as missing permission.
    """
    manifest = read_manifest(path)
    for name in FILES:
        _check_size(path / name, manifest.files[name])
    for name in FILES:
        if _sha256(path / name) != manifest.files[name].sha256:
            raise CheckpointError(f"{path / name}: its SHA-256 is not the manifest's; the file was altered or damaged")
    return _state(path)


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, verified; the weights are not looked at. Raises the errors of `verify_checkpoint`."""
    file, entry = path / STATE, read_manifest(path).files[STATE]
    _check_size(file, entry)
    if _sha256(file) != entry.sha256:
        raise CheckpointError(f"{file}: its SHA-256 is not the manifest's; the file was altered or damaged")
    return _state(path)


def size_of(path: Path) -> int:
    """Bytes of all regular files in a folder; a folder that cannot be read counts 0."""
    try:
        return sum(file.lstat().st_size for file in path.iterdir() if stat.S_ISREG(file.lstat().st_mode))
    except OSError:
        return 0


def _entries(file: Path, content: dict[str, Any]) -> dict[str, Entry]:
    missing = [name for name in FILES if name not in content]
    if missing:
        raise CheckpointError(f"{file}: does not list {missing[0]}; it is no complete manifest")
    unknown = sorted(content.keys() - set(FILES))
    if unknown:
        raise CheckpointError(f"{file}: lists {reprlib.repr(unknown[0])}, which is no file of a checkpoint")
    found = {}
    for name, entry in content.items():
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise CheckpointError(f"{file}: the entry of {name} must have bytes and sha256, got {reprlib.repr(entry)}")
        if not _is_count(entry["bytes"]):
            raise CheckpointError(f"{file}: bytes of {name} must be a size, got {reprlib.repr(entry['bytes'])}")
        if not isinstance(entry["sha256"], str) or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            raise CheckpointError(f"{file}: sha256 of {name} must be 64 digits, got {reprlib.repr(entry['sha256'])}")
        found[name] = Entry(entry["bytes"], entry["sha256"])
    return found


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _state(path: Path) -> dict[str, Any]:
    file = path / STATE
    state = checked_state(file, _read(file))
    named = NAME.fullmatch(path.name)
    if named and int(named[1]) != state["step"]:
        raise CheckpointError(f"{file}: is of step {state['step']}, but its folder is named {path.name}")
    return state


def checked_state(file: Path, text: str) -> dict[str, Any]:
    """The state in ``text``, with the keys that this library reads checked; others are the caller's.

    Raises:
        CheckpointError: it is too large, no JSON object, or has a value of the wrong type; names ``file``.
    """
    _check_length(file, len(text.encode()))
    state = _parsed(file, text)
    if "step" not in state:
        raise CheckpointError(f"{file}: has no step")
    for key, (fits, expected) in _KEYS.items():
        if key in state and not fits(state[key]):
            raise CheckpointError(f"{file}: {key} must be {expected}, got {reprlib.repr(state[key])}")
    return state


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST_COUNT


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) <= _MOST_COUNT)


def _is_schedule(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(part, dict) and part.keys() == {"step", "lr_decay_steps"} for part in value)
        and all(_is_count(number) for part in value for number in part.values())
    )


def _is_health(value: Any) -> bool:
    known = {field.name for field in fields(Health)}
    return isinstance(value, dict) and value.keys() <= known and all(map(_is_number, value.values()))


_KEYS = {
    **dict.fromkeys(("step", AVERAGED, "skipped"), (_is_count, "a number of steps")),
    "seconds": (lambda value: _is_number(value) and value >= 0, "a duration"),
    "pending": (
        lambda value: isinstance(value, list) and all(loss is None or _is_number(loss) for loss in value),
        "a list of losses",
    ),
    "schedule": (_is_schedule, "a list of step and lr_decay_steps"),
    "health": (_is_health, "the counts of a `Health`"),
    "record": (lambda value: isinstance(value, dict), "a mapping"),
}


def _check_size(file: Path, entry: Entry) -> None:
    size = _regular(file, "missing, though the manifest lists it").st_size
    if size != entry.bytes:
        raise CheckpointError(f"{file}: has {size} bytes, the manifest says {entry.bytes}")


def _regular(file: Path, absent: str = "missing; this is no complete checkpoint") -> Any:
    """The status of a regular file. Others are not opened: a pipe would wait for ever."""
    try:
        status = file.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{file}: {absent}") from None
    except OSError as error:
        _raise(file, error)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file}: is not a regular file")
    return status


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        _raise(file, error)


def _read(file: Path) -> str:
    _check_length(file, _regular(file).st_size)
    try:
        return file.read_bytes().decode()
    except OSError as error:
        _raise(file, error)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: is not valid JSON ({error})") from None


def _check_length(file: Path, size: int) -> None:
    most = _MOST_BYTES[file.name]
    if size > most:
        raise CheckpointError(f"{file}: has {size} bytes, more than the {most} of any checkpoint")


def _raise(file: Path, error: OSError) -> NoReturn:
    if error.errno in _DAMAGE:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    if error.filename is None and error.errno is not None:
        raise OSError(error.errno, error.strerror, str(file)) from error
    raise error


def _parsed(file: Path, text: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, values that JSON does not have, and absurd depth."""
    try:
        content = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise CheckpointError(f"{file}: is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(content).__name__}")
    level: list[Any] = [content]
    for _ in range(_MOST_LEVELS):
        level = [child for parent in level if isinstance(parent, dict | list) for child in _children(parent)]
    if level:
        raise CheckpointError(f"{file}: is nested too deeply")
    return content


def _children(parent: dict[str, Any] | list[Any]) -> list[Any]:
    return parent if isinstance(parent, list) else list(parent.values())


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"JSON has no {constant}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value
