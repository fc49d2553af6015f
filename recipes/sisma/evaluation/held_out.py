"""Held-out pairs: masks that training does not see, and their real images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmgen.data import LabelSet
from ssmgen.training import progress_bar


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs in memory.

    Attributes:
        ids: of the pairs.
        masks: labels ``(n, h, w)``.
        images: the real image of each mask, uint8 ``(n, 3, h, w)``.
        labels: the classes.
    """

    ids: Sequence[str]
    masks: Tensor
    images: Tensor
    labels: LabelSet


def read_held_out(pairs: Any, count: int, labels: LabelSet) -> HeldOut:
    """The first ``count`` of these pairs, with masks of these classes."""
    items = []
    with progress_bar(count, "img", what="real images") as bar:
        for index in range(count):
            items.append(pairs[index])
            bar.update()
    images, masks = (torch.stack(part) for part in zip(*items, strict=True))
    return HeldOut(pair_ids(pairs)[:count], masks, images, labels)


def available(pairs: Any, wanted: int, *, requested: bool = True) -> int:
    """The number of pairs to use; a note says so where it is below the number the user requested."""
    if requested and wanted > len(pairs):
        print(f"note: there are {len(pairs)} unseen masks, not {wanted}", file=sys.stderr)
    return min(wanted, len(pairs))


def pair_ids(pairs: Any) -> list[str]:
    """The ids of image-mask pairs; drawn pairs are numbered."""
    return [str(id) for id in getattr(pairs, "ids", None) or [f"{index:05d}" for index in range(len(pairs))]]
