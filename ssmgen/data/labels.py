"""Label sets: class names, colours and left/right pairs of masks, which are 8-bit images of class ids."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Self

import torch
from torch import Tensor

from ssmgen.ops.label_check import check_labels

__all__ = ["BISENET19", "CELEBAMASK19", "LabelSet", "check_labels", "remap", "sides_crossed"]


@dataclass(frozen=True)
class LabelSet:
    """Names and colours of the classes of a mask.

    Attributes:
        name: name of the set, e.g. ``"celebamask19"``.
        classes: class names; the position is the class id.
        palette: one RGB triple (0..255) per class.
        mirrored: pairs of ids that a horizontal flip swaps, because they mean the person's left and right.

    Raises:
        ValueError: classes that are not a sequence of names, a colour outside 0..255 or none for a class, or
            ``mirrored`` with ids that are not classes or that occur twice.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    mirrored: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.classes, str) or not all(isinstance(each, str) for each in self.classes):
            raise ValueError(f"{self.name}: classes must be a sequence of names, got {self.classes!r}")
        for colour in self.palette:
            if not _are_ids(colour, 3, 256):
                raise ValueError(f"{self.name}: a colour is a triple of integers from 0 to 255, got {colour!r}")
        for pair in self.mirrored:
            if not _are_ids(pair, 2, len(self.classes)):
                raise ValueError(
                    f"{self.name}: mirrored holds pairs of class ids from 0 to {len(self.classes) - 1}, got {pair!r}"
                )
        ids = [id for pair in self.mirrored for id in pair]
        if twice := sorted({id for id in ids if ids.count(id) > 1}):
            raise ValueError(f"{self.name}: an id is mirrored to one other id; more than once occurs {twice[0]}")
        if len(self.palette) != len(self.classes):
            raise ValueError(f"{self.name}: {len(self.classes)} classes but {len(self.palette)} palette colours")

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Self:
        """The label set of a record in JSON, `dataclasses.asdict` of one.

        Raises:
            KeyError, TypeError, ValueError: it is not the record of a label set.
        """
        if not all(isinstance(stored[key], list | tuple) for key in ("classes", "palette", "mirrored")):
            raise ValueError("classes, palette and mirrored must be lists")
        palette, mirrored = (tuple(map(tuple, stored[key])) for key in ("palette", "mirrored"))
        return cls(str(stored["name"]), tuple(stored["classes"]), palette, mirrored)

    def __len__(self) -> int:
        return len(self.classes)

    def swap_table(self) -> Tensor:
        """``(classes,)`` uint8 table of the id that each id becomes in a horizontal flip."""
        table = torch.arange(len(self), dtype=torch.uint8)
        for left, right in self.mirrored:
            table[left], table[right] = right, left
        return table

    def colorize(self, mask: Tensor) -> Tensor:
        """RGB ``(..., 3, height, width)`` uint8 of labels ``(..., height, width)``."""
        colours = torch.tensor(self.palette, dtype=torch.uint8)
        return colours[mask.long()].movedim(-1, -3)


def _are_ids(values: Any, count: int, end: int) -> bool:
    """Whether these are ``count`` integers from 0 to below ``end``."""
    sized = hasattr(values, "__len__") and len(values) == count
    return sized and all(isinstance(value, Integral) and 0 <= int(value) < end for value in values)


# Name, colour, and mean share of the pixels of 808 CelebAMask-HQ masks (only the ratios of the large classes matter).
_CLASSES = (
    ("background", (0, 0, 0), 0.288),
    ("skin", (204, 0, 0), 0.254),
    ("nose", (76, 153, 0), 0.021),
    ("eye_g", (204, 204, 0), 0.003),
    ("l_eye", (51, 51, 255), 0.002),
    ("r_eye", (204, 0, 204), 0.002),
    ("l_brow", (0, 255, 255), 0.004),
    ("r_brow", (255, 204, 204), 0.004),
    ("l_ear", (102, 51, 0), 0.005),
    ("r_ear", (255, 0, 0), 0.004),
    ("mouth", (102, 204, 0), 0.003),
    ("u_lip", (255, 255, 0), 0.004),
    ("l_lip", (0, 0, 153), 0.007),
    ("hair", (0, 0, 204), 0.311),
    ("hat", (255, 51, 153), 0.010),
    ("ear_r", (0, 204, 204), 0.002),
    ("neck_l", (0, 51, 0), 0.001),
    ("neck", (255, 153, 51), 0.042),
    ("cloth", (0, 204, 0), 0.034),
)
_COLOURS = {name: colour for name, colour, _ in _CLASSES}
_AREAS = {name: area for name, _, area in _CLASSES}
_MIRRORED = (("l_eye", "r_eye"), ("l_brow", "r_brow"), ("l_ear", "r_ear"))


def _face_labels(name: str, classes: tuple[str, ...]) -> LabelSet:
    pairs = tuple((classes.index(left), classes.index(right)) for left, right in _MIRRORED)
    return LabelSet(name, classes, tuple(_COLOURS[c] for c in classes), pairs)


#: The order of CelebAMask-HQ's script: the parts in painting order. It is the default everywhere.
CELEBAMASK19 = _face_labels("celebamask19", tuple(_COLOURS))

#: The order of the widely used BiSeNet face parser. A mask file does not record its order: remap it explicitly.
BISENET19 = _face_labels(
    "bisenet19",
    (
        *("background", "skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "l_ear", "r_ear", "ear_r"),
        *("nose", "mouth", "u_lip", "l_lip", "neck", "neck_l", "cloth", "hair", "hat"),
    ),
)


def remap(mask: Tensor, source: LabelSet, target: LabelSet) -> Tensor:
    """Convert the ids of ``mask``, of any shape, from one order of the same classes to another.

    Raises:
        ValueError: the two sets have different classes, or the mask has an id outside ``source``.
    """
    missing = sorted(set(source.classes) ^ set(target.classes))
    if missing:
        raise ValueError(f"cannot remap {source.name} to {target.name}: only one of them has {', '.join(missing)}")
    check_labels(mask, len(source))
    table = torch.tensor([target.classes.index(name) for name in source.classes], dtype=torch.uint8)
    return table[mask.long()]


def sides_crossed(mask: Tensor, labels: LabelSet) -> bool:
    """Whether left and right are the wrong way round in the mask ``(height, width)`` of an upright face.

    The person's left lies on the image's right. Eyes, brows and ears have one vote each, where both sides are there.
    False for label sets other than the 19 face classes.
    """
    if set(labels.classes) != set(_AREAS):
        return False
    votes = 0
    for pair in labels.mirrored:
        left, right = ((mask == id).nonzero()[:, 1].float() for id in pair)
        if len(left) and len(right):
            votes += 1 if left.mean() > right.mean() else -1
    return votes < 0


# In nats per pixel. None of the 808 masks reaches it when read in the right order, 9 of 10 do in the wrong order.
_MARGIN = 0.4


def likelier_order(mask: Tensor, labels: LabelSet) -> LabelSet | None:
    """The other order of the 19 face classes, if areas in a mask of any shape fit it clearly better than ``labels``.

    The criterion is the mean log-likelihood of a pixel's class under typical areas. The result is None for other label
    sets and for masks that do not decide it.
    """
    if set(labels.classes) != set(_AREAS):
        return None
    share = torch.bincount(mask.flatten().long(), minlength=len(labels)).double() / mask.numel()

    def score(order: LabelSet) -> float:
        return float(share @ torch.tensor([_AREAS[name] for name in order.classes], dtype=torch.float64).log())

    best = max((CELEBAMASK19, BISENET19), key=score)
    return best if score(best) > score(labels) + _MARGIN else None
