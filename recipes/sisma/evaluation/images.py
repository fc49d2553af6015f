"""The images of an evaluation: held-out pairs, which training does not see, and images generated from their masks."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmgen.data import LabelSet
from ssmgen.data.images import read_image
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


@dataclass(frozen=True)
class Images:
    """The images to measure.

    Attributes:
        held_out: the masks and their real images.
        generated: an image of each mask, uint8 ``(n, 3, h, w)``.
        sample_files: files of several images of a mask, by its id; may be empty.
        source: of the generated images, for protocols, such as ``seed=0``.
    """

    held_out: HeldOut
    generated: Tensor
    sample_files: Mapping[str, Sequence[Path]]
    source: str

    def samples(self) -> Iterator[Tensor]:
        """The images in ``sample_files``, uint8 ``(samples, 3, h, w)`` for each mask; all may not fit into memory."""
        return map(read_images, self.sample_files.values())


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


def read_images(files: Sequence[Path]) -> Tensor:
    """The images, uint8 ``(count, 3, size, size)``."""
    return torch.stack([read_image(file) for file in files])
