"""Ways to damage a file, drawn from a generator: bits, bytes, JSON values, and what stands under the file's name."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BLOCK = 64


def injure(file: Path, draw: random.Random, donor: Path) -> str:
    """Damage a file in a drawn way and return its name.

    Args:
        file: the file.
        draw: the generator.
        donor: another file, whose content may take its place.
    """
    kinds = _OF_BYTES | _OF_NAMES | (_OF_JSON if file.suffix == ".json" else {})
    kind = draw.choice(sorted(kinds))
    if kind in _OF_BYTES:
        file.write_bytes(_OF_BYTES[kind](file.read_bytes(), draw, donor.read_bytes()))
    elif kind in _OF_NAMES:
        file.unlink()
        _OF_NAMES[kind](file)
    else:
        file.write_text(_OF_JSON[kind](json.loads(file.read_text()), draw))
    return kind


def _flip(content: bytes, draw: random.Random, donor: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _replace_byte(content: bytes, draw: random.Random, donor: bytes) -> bytes:
    position = draw.randrange(len(content))
    return content[:position] + bytes([draw.randrange(256)]) + content[position + 1 :]


def _truncate(content: bytes, draw: random.Random, donor: bytes) -> bytes:
    return content[: draw.randrange(len(content))]


def _append(content: bytes, draw: random.Random, donor: bytes) -> bytes:
    return content + draw.randbytes(draw.randint(1, _BLOCK))


def _zero(content: bytes, draw: random.Random, donor: bytes) -> bytes:
    start = draw.randrange(len(content))
    length = min(draw.randint(1, 4 * _BLOCK), len(content) - start)
    return content[:start] + bytes(length) + content[start + length :]


def _splice(content: bytes, draw: random.Random, donor: bytes) -> bytes:
    """A block of the file stands in the place of another one."""
    length = min(draw.randint(1, _BLOCK), len(content))
    start, other = (draw.randrange(len(content) - length + 1) for _ in range(2))
    return content[:start] + content[other : other + length] + content[start + length :]


def _mixed(content: bytes, draw: random.Random, donor: bytes) -> bytes:
    """The file begins as itself and ends as another one."""
    position = draw.randrange(len(content))
    return content[:position] + donor[position:]


def _header(content: bytes, draw: random.Random, donor: bytes) -> bytes:
    """The first eight bytes, in safetensors the length of the header, are others."""
    length = draw.choice((0, 1, 8, 2**20, 2**31, 2**40, 2**63 - 1, 2**64 - 1, draw.randrange(2**64)))
    return length.to_bytes(8, "little") + content[8:]


_OF_BYTES: dict[str, Callable[[bytes, random.Random, bytes], bytes]] = {
    "bits flipped": _flip,
    "byte replaced": _replace_byte,
    "truncated": _truncate,
    "extended": _append,
    "zeroed in part": _zero,
    "all zeros": lambda content, draw, donor: bytes(len(content)),
    "spliced": _splice,
    "mixed with another file": _mixed,
    "another file's content": lambda content, draw, donor: donor,
    "first bytes replaced": _header,
    "emptied": lambda content, draw, donor: b"",
    "random bytes": lambda content, draw, donor: draw.randbytes(len(content)),
}

_OF_NAMES: dict[str, Callable[[Path], object]] = {
    "deleted": lambda file: None,
    "a folder": Path.mkdir,
    "a FIFO": os.mkfifo,
    "a link to nothing": lambda file: file.symlink_to(file.with_name("nothing")),
    "a link to itself": lambda file: file.symlink_to(file),
    "an endless device": lambda file: file.symlink_to("/dev/zero"),
}


def _other_type(content: Any, draw: random.Random) -> str:
    return draw.choice(("[]", "{}", "null", '"text"', "3", "NaN", "true", "[{}]", '{"a": 1}', '[["a", 1]]'))


def _nested(content: Any, draw: random.Random) -> str:
    depth = draw.choice((1000, 100_000))
    return draw.choice(("[" * depth, "[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))


def _value_replaced(content: Any, draw: random.Random) -> str:
    owner, key = _place(content, draw)
    values = (
        None,
        True,
        -1,
        0,
        1e400,
        float("nan"),
        2**63,
        "",
        "text",
        [],
        {},
        [[]],
        {"a": {}},
        "../" * 20 + "etc/passwd",
    )
    owner[key] = draw.choice(values)
    return json.dumps(content)


def _number_changed(content: Any, draw: random.Random) -> str:
    owner, key = _place(content, draw)
    for _ in range(50):
        if isinstance(owner[key], int):
            break
        owner, key = _place(content, draw)
    owner[key] = owner[key] + draw.choice((-1, 1)) if isinstance(owner[key], int) else 7
    return json.dumps(content)


def _key_dropped(content: Any, draw: random.Random) -> str:
    owner, key = _place(content, draw)
    del owner[key]
    return json.dumps(content)


def _key_renamed(content: Any, draw: random.Random) -> str:
    owner, key = _place(content, draw)
    value = owner.pop(key)
    if isinstance(owner, dict):
        owner[draw.choice((str(key) + "x", "", "../" + str(key), "/etc/passwd", str(key).upper() + "\u0000"))] = value
    return json.dumps(content)


def _key_added(content: Any, draw: random.Random) -> str:
    owner, key = _place(content, draw)
    if isinstance(owner, dict):
        owner[draw.choice(("extra", "../../secret", "/dev/zero", "a" * 10_000))] = draw.choice((1, {}, owner[key]))
    else:
        owner.append(0)
    return json.dumps(content)


def _huge_number(content: Any, draw: random.Random) -> str:
    owner, key = _place(content, draw)
    owner[key] = "HERE"
    return json.dumps(content).replace('"HERE"', "9" * draw.choice((30, 400, 100_000)))


def _place(content: Any, draw: random.Random) -> tuple[Any, Any]:
    """A container somewhere in a JSON value, and one of its keys or indices."""
    places: list[tuple[Any, Any]] = []

    def visit(value: Any) -> None:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            places.append((value, key))
            if isinstance(inner, dict | list):
                visit(inner)

    visit(content)
    return draw.choice(places)


_OF_JSON: dict[str, Callable[[Any, random.Random], str]] = {
    "JSON of another type": _other_type,
    "deeply nested JSON": _nested,
    "a JSON value replaced": _value_replaced,
    "a JSON number changed": _number_changed,
    "a JSON key dropped": _key_dropped,
    "a JSON key renamed": _key_renamed,
    "a JSON key added": _key_added,
    "a huge JSON number": _huge_number,
    "JSON in another encoding": lambda content, draw: (
        json.dumps(content) + "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")
    ),
}


def injure_folder(folder: Path, draw: random.Random) -> str:
    """Damage a whole folder in a drawn way and return its name."""
    kind = draw.choice(("folder emptied", "a file in the folder's place"))
    shutil.rmtree(folder)
    folder.mkdir() if kind == "folder emptied" else folder.write_bytes(b"no folder")
    return kind
