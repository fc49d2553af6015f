"""How the masks of a data set are read: parts or labels of CelebAMask-HQ, labels of your own, merged or not."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from recipes.sisma.arguments import UsageError
from recipes.sisma.prepare.settings import Settings
from ssmgen.data import MergeTable, distinct_colours, read_merge_table
from ssmgen.data.images import read_image, read_mask
from ssmgen.data.labels import BISENET19, CELEBAMASK19, LabelSet, remap
from ssmgen.reading import read_json
from ssmgen.registry import closest

#: Orders of the 19 classes of CelebAMask-HQ by name.
FACE_ORDERS = {labels.name: labels for labels in (CELEBAMASK19, BISENET19)}

# Names of classes that show nothing, in lower case.
_NOTHING = {"background", "none", "null"}

Mask = Path | dict[str, Path]


class Reader(Protocol):
    """Reads the masks of a data set.

    Attributes:
        source: the classes of the masks that `read` returns.
        labels: the classes of the masks that `merge` returns, which are written.
        empty: ids of ``source`` that show nothing, such as a background: a mask of these alone is a fault.
    """

    source: LabelSet
    labels: LabelSet
    empty: frozenset[int]

    def read(self, mask: Mask) -> Tensor:
        """Labels ``(height, width)`` uint8 of a file, or of part files by class name, in the classes of ``source``.

        Raises:
            ValueError, OSError: a file cannot be read or has a label outside the set; the message begins with its name.
        """

    def merge(self, mask: Tensor) -> Tensor:
        """Labels ``(height, width)`` of ``source``, as uint8 ids of ``labels``."""

    def notes(self, shares: Tensor, layout: str) -> list[str]:
        """What a user should know.

        Args:
            shares: the mean share of each class of ``source`` in all masks, ``(classes,)``.
            layout: of the source's folder, ``official`` or ``folder``.
        """

    def record(self) -> dict[str, Any]:
        """What ``prepared.json`` keeps of how the masks were read."""


@dataclass(frozen=True)
class DataSet:
    """A data set as a recipe describes it.

    Attributes:
        recipe: the recipe's package.
        train: the words after ``recipe.train`` that train on it, besides ``data=``.
        settings: the defaults of ``prepare``.
        reader: reads its masks, given the settings.
        drawn_faces: whether ``source=drawn`` draws faces instead.
    """

    recipe: str
    train: tuple[str, ...]
    settings: Settings
    reader: Callable[[Settings], Reader]
    drawn_faces: bool = False


class FaceMasks:
    """Masks of CelebAMask-HQ, as parts or in either order of the 19 classes; the result is in celebamask19."""

    source = labels = CELEBAMASK19
    empty = frozenset({0})

    def __init__(self, order: LabelSet) -> None:
        self.order = order

    def read(self, mask: Mask) -> Tensor:
        """See `Reader`."""
        return (
            paint_parts(mask) if isinstance(mask, dict) else remap(read_mask(mask, self.order), self.order, self.labels)
        )

    def merge(self, mask: Tensor) -> Tensor:
        """The mask itself."""
        return mask

    def notes(self, shares: Tensor, layout: str) -> list[str]:
        """Hair covers much of any face picture; the class that has the other order's hair id in this one is small."""
        if layout == "official":  # parts have names and no order
            return []
        order, classes = self.order, self.labels.classes
        other = BISENET19 if order is CELEBAMASK19 else CELEBAMASK19
        # Shares are in the target's order: look up the class that the other order's hair id became.
        hair, suspect = shares[classes.index("hair")], order.classes[other.classes.index("hair")]
        share = shares[classes.index(suspect)]
        if share <= 2 * hair or share < 0.05:
            return []
        return [
            f"WARNING: {suspect} covers {share:.0%} of the masks and hair {hair:.0%}: they look like the class order "
            f"{other.name}. If they are, prepare them with labels={other.name}."
        ]

    def record(self) -> dict[str, Any]:
        """See `Reader`."""
        return {"label_order": self.order.name}


class LabelMasks:
    """Masks of any classes: files of 8-bit ids or of the classes' colours."""

    def __init__(self, labels: LabelSet) -> None:
        self.source = self.labels = labels
        self.empty = frozenset(id for id, name in enumerate(labels.classes) if name.lower() in _NOTHING)

    def read(self, mask: Mask) -> Tensor:
        """See `Reader`."""
        if isinstance(mask, dict):
            raise ValueError(f"{next(iter(mask.values()))}: is a part of CelebAMask-HQ; expected a file of labels")
        return read_mask(mask, self.labels)

    def merge(self, mask: Tensor) -> Tensor:
        """The mask itself."""
        return mask

    def notes(self, shares: Tensor, layout: str) -> list[str]:
        """None: nothing is known of the classes."""
        return []

    def record(self) -> dict[str, Any]:
        """See `Reader`."""
        return {"label_order": self.labels.name}


class MergedMasks:
    """Masks of another reader, whose labels become the classes of a table."""

    def __init__(self, reader: Reader, table: MergeTable) -> None:
        self.reader, self.table, self.source, self.labels = reader, table, reader.source, table.labels
        self.became = self.merge(torch.arange(len(self.source), dtype=torch.uint8)).tolist()
        named = {id for id, new in enumerate(self.became) if self.labels.classes[new].lower() in _NOTHING}
        self.empty = reader.empty | named

    def read(self, mask: Mask) -> Tensor:
        """See `Reader`."""
        return self.reader.read(mask)

    def merge(self, mask: Tensor) -> Tensor:
        """See `Reader`."""
        return self.table.merge(self.reader.merge(mask))

    def notes(self, shares: Tensor, layout: str) -> list[str]:
        """Those of the other reader, and the classes that no mask has."""
        present = {new for new, share in zip(self.became, shares.tolist(), strict=True) if share}
        absent = [name for id, name in enumerate(self.labels.classes) if id not in present]
        notes = [f"no mask has the class {', '.join(absent)}"] if absent else []
        return [*self.reader.notes(shares, layout), *notes]

    def record(self) -> dict[str, Any]:
        """See `Reader`."""
        names = self.table.source.classes
        merged = {
            new: [name for name, id in zip(names, self.table.ids, strict=True) if id == number]
            for number, new in enumerate(self.labels.classes)
        }
        return self.reader.record() | {"merged": merged}


def reader_of(settings: Settings) -> Reader:
    """The reader that ``labels=`` and ``merge=`` ask for.

    Raises:
        UsageError: ``labels`` is neither a known order nor a file.
        FileNotFoundError, ValueError: what `label_masks` and `merged` reject.
    """
    if settings.labels in FACE_ORDERS:
        return merged(FaceMasks(FACE_ORDERS[settings.labels]), settings)
    if not settings.labels.endswith(".json"):
        expected = f"expected one of {', '.join(FACE_ORDERS)}, or a .json file of names"
        raise UsageError(f"labels={settings.labels}: {expected}{closest(settings.labels, FACE_ORDERS)}")
    return merged(label_masks(settings), settings)


def label_masks(settings: Settings) -> LabelMasks:
    """The reader of masks whose classes a file lists, ``labels=``.

    Raises:
        FileNotFoundError, ValueError: what `Settings.find_file` and `label_names` reject.
    """
    return LabelMasks(label_names(settings.find_file("labels")))


def merged(reader: Reader, settings: Settings) -> Reader:
    """The reader, or one that merges its labels by the table that ``merge=`` names.

    Raises:
        FileNotFoundError, ValueError: what `Settings.find_file` and `ssmgen.data.read_merge_table` reject.
    """
    if not settings.merge:
        return reader
    return MergedMasks(reader, read_merge_table(settings.find_file("merge"), reader.labels))


def label_names(file: Path) -> LabelSet:
    """The classes that a JSON file lists by id: ``["background", "skin", ...]``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a list of at most 256 different names; names the file.
    """
    names = read_json(file)
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f'{file}: expected a list of class names by id, such as ["background", "skin"]')
    if len(set(names)) != len(names) or not 1 <= len(names) <= 256:
        raise ValueError(
            f"{file}: expected 1 to 256 different names, got {len(names)}, {len(set(names))} of them different"
        )
    return LabelSet(file.stem, tuple(names), distinct_colours(len(names)))


def paint_parts(parts: dict[str, Path]) -> Tensor:
    """Merge part files into a mask ``(height, width)`` uint8; later classes of `CELEBAMASK19` cover earlier ones.

    Args:
        parts: file by class name; black pixels are outside the part, all others inside.

    Raises:
        ValueError: a file cannot be read, or its size differs from the others; names it.
    """
    mask: Tensor | None = None
    for id, name in enumerate(CELEBAMASK19.classes):
        if name not in parts:
            continue
        part = read_image(parts[name]).amax(dim=0) != 0
        if mask is None:
            mask = torch.zeros(part.shape, dtype=torch.uint8)
        if part.shape != mask.shape:
            raise ValueError(f"{parts[name]}: is {tuple(part.shape)}, other parts of this mask are {tuple(mask.shape)}")
        mask[part] = id
    if mask is None:
        raise ValueError("a mask needs at least one part")
    return mask
