"""Merging many labels into few classes by a table in a text file.

One line per class, in the order of the new ids: its name, optionally its colour, and its labels, by name or id.

    # of 59 labels of clothes
    background: null
    skin #f0c8a0: skin
    hair: hair
    shoes: boots, flats, heels, 39
"""

import colorsys
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ssmgen.data.labels import LabelSet, check_labels
from ssmgen.reading import read_bytes
from ssmgen.registry import closest

Colour = tuple[int, int, int]
_MOST = 256  # ids of an 8-bit mask
_ID = re.compile(r"[0-9]{1,9}")  # Python converts no text of thousands of digits to an integer
_CLASS = re.compile(r"(?P<name>[^:#]*?)\s*(#(?P<colour>[0-9a-fA-F]{6}))?\s*")


@dataclass(frozen=True)
class MergeTable:
    """Which class each label becomes.

    Attributes:
        source: the labels that are merged.
        labels: the classes they become. Left and right are those of ``source``, where they stay apart.
        ids: the new id of each label of ``source``.
    """

    source: LabelSet
    labels: LabelSet
    ids: tuple[int, ...]

    def lookup(self) -> Tensor:
        """``(256,)`` uint8, the new id of every label; 255 for ids outside ``source``, which `merge` rejects."""
        return torch.tensor([*self.ids, *[255] * (_MOST - len(self.ids))], dtype=torch.uint8)

    def merge(self, mask: Tensor, where: str = "mask") -> Tensor:
        """Convert labels ``(..., height, width)`` of ``source`` to uint8 ids of ``labels``, of the same shape.

        Raises:
            ValueError: a label outside ``source``; the message begins with ``where``.
        """
        check_labels(mask, len(self.source), where=where)
        return self.lookup().to(mask.device)[mask.long()]


def read_merge_table(path: str | Path, source: LabelSet, name: str = "") -> MergeTable:
    """Read and check a merge table. Empty lines and lines that begin with ``#`` are skipped.

    Args:
        path: the file, UTF-8. A line is ``name: label, label, ...`` or ``name #rrggbb: label, label, ...``. A label is
            one of ``source``, by name, or by id where no label has that name.
        source: the labels that are merged.
        name: name of the new label set; by default the file's name without suffix.

    Returns:
        The table. Classes without a colour get distinct ones, always the same for the same file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a label that is left out, named twice or unknown, a class twice or without labels, a colour twice,
            more than 256 classes or labels, or a line of another form. Names the file and lists all faults.
    """
    file = Path(path).expanduser()
    if len(source) > _MOST:
        raise ValueError(f"{source.name}: has {len(source)} labels, but an 8-bit mask holds {_MOST}")
    reader = _Reader(source)
    try:
        lines = read_bytes(file).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            reader.read(number, line.strip())
    faults = reader.all_faults()
    if faults:
        raise ValueError("\n  ".join([f"{file}: {len(faults)} fault(s) in the table of classes:", *faults]))
    ids = tuple(reader.new[label] for label in range(len(source)))
    try:
        mirrored = _mirrored(source, ids)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    labels = LabelSet(name or file.stem, tuple(reader.classes), _filled(reader.colours), mirrored)
    return MergeTable(source, labels, ids)


def distinct_colours(count: int) -> tuple[Colour, ...]:
    """Palette of ``count`` different RGB triples (0..255), black first; the same for every call.

    Raises:
        ValueError: ``count`` outside 0 to 256.
    """
    if not 0 <= count <= _MOST:
        raise ValueError(f"an 8-bit mask has up to {_MOST} classes, got {count}")
    return _filled([None] * count)


class _Reader:
    """Collects classes and faults line by line."""

    def __init__(self, source: LabelSet) -> None:
        self.source, self.by_name = source, {name: id for id, name in enumerate(source.classes)}
        self.classes: dict[str, int] = {}  # the line of each
        self.colours: list[Colour | None] = []
        self.new: dict[int, int] = {}
        self.lines: dict[int, int] = {}  # in which a label is named
        self.faults: list[str] = []

    def read(self, number: int, line: str) -> None:
        head, colon, rest = line.partition(":")
        found = _CLASS.fullmatch(head)
        if not colon or found is None or not found["name"]:
            expected = "'name: label, ...' or 'name #rrggbb: label, ...'"
            self.faults.append(f"line {number}: expected {expected}, got {line!r}")
            return
        name, labels = found["name"], [label for label in map(str.strip, rest.split(",")) if label]
        if name in self.classes:
            self.faults.append(f"line {number}: class {name!r} is also in line {self.classes[name]}: join the lines")
        else:
            self.classes[name] = number
            self.colours.append(self._colour(number, found["colour"]))
        if not labels:
            self.faults.append(f"line {number}: class {name!r} has no labels")
        for label in labels:
            self._add(number, list(self.classes).index(name), label)

    def _colour(self, number: int, code: str | None) -> Colour | None:
        if code is None:
            return None
        red, green, blue = bytes.fromhex(code)
        if (red, green, blue) in self.colours:
            self.faults.append(f"line {number}: colour #{code} is that of another class")
        return red, green, blue

    def _add(self, number: int, new: int, label: str) -> None:
        id = self.by_name.get(label)
        if id is None and _ID.fullmatch(label) and int(label) < len(self.source):
            id = int(label)
        if id is None:
            known = f"{closest(label, self.by_name)} {self.source.name} has the ids 0 to {len(self.source) - 1}."
            self.faults.append(f"line {number}: unknown label {label!r}{known}")
        elif id in self.new:
            self.faults.append(f"line {number}: label {self._named(id)} is also in line {self.lines[id]}")
        else:
            self.new[id], self.lines[id] = new, number

    def _named(self, id: int) -> str:
        return f"{self.source.classes[id]!r} ({id})"

    def all_faults(self) -> list[str]:
        missing = [self._named(id) for id in range(len(self.source)) if id not in self.new]
        faults = list(self.faults)
        if missing:
            faults.append(f"left out: {', '.join(missing)}")
        if len(self.classes) > _MOST:
            faults.append(f"{len(self.classes)} classes, but an 8-bit mask holds {_MOST}")
        return faults


def _mirrored(source: LabelSet, ids: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Pairs of new ids that a flip swaps.

    Raises:
        ValueError: a class takes one label of a left-right pair in a way that no swap of classes can follow.
    """
    other: dict[int, int] = {}
    for label, partner in enumerate(source.swap_table().tolist()):
        if other.setdefault(ids[label], ids[partner]) != ids[partner]:
            pair = f"{source.classes[label]!r} and {source.classes[partner]!r}"
            raise ValueError(
                f"a mirrored image swaps {pair}, but the table separates them so that no swap of classes does the "
                "same: put both into one class, or each into a class of its own"
            )
    return tuple((left, right) for left, right in sorted(other.items()) if left < right)


def _filled(colours: Sequence[Colour | None]) -> tuple[Colour, ...]:
    """The colours, and distinct ones where there are none; black goes to the first class."""
    taken = {colour for colour in colours if colour is not None}
    result: list[Colour] = []
    tried = 0
    for colour in colours:
        while colour is None:
            candidate = _candidate(tried)
            tried += 1
            if candidate not in taken:
                colour = candidate
                taken.add(candidate)
        result.append(colour)
    return tuple(result)


def _candidate(number: int) -> Colour:
    """Black, then hues that are far apart, in turns lighter and darker, stronger and paler."""
    if number == 0:
        return (0, 0, 0)
    hue = number * 0.618034 % 1  # the golden ratio never comes close to an earlier hue
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.95, 0.55, 0.75)[number % 3], (0.95, 0.6, 0.8, 0.45)[number // 3 % 4])
    return round(255 * red), round(255 * green), round(255 * blue)
