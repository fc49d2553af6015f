"""Read the masks of a source: one file of labels, or one file per part."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ssmgen.data.images import read_image, read_mask
from ssmgen.data.labels import BISENET19, CELEBAMASK19, LabelSet, remap

LABEL_ORDERS = {labels.name: labels for labels in (CELEBAMASK19, BISENET19)}


def read_labels(mask: Path | dict[str, Path], order: LabelSet) -> Tensor:
    """Read a mask ``(height, width)`` uint8 in the order of `CELEBAMASK19`.

    Args:
        mask: a file of labels, or part files by class name.
        order: class order of a file of labels.

    Raises:
        ValueError: a file cannot be read, or has labels or a size that do not fit; names it.
    """
    if isinstance(mask, dict):
        return paint_parts(mask)
    labels = read_mask(mask, order)
    return labels if order is CELEBAMASK19 else remap(labels, order, CELEBAMASK19)


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


def check_not_empty(mask: Tensor) -> None:
    """Reject a mask of background only."""
    if not bool(mask.any()):
        raise ValueError("the mask is empty: background only")
