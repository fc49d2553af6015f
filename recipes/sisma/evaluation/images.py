"""The images of an evaluation: held-out pairs, which training does not see, and images generated from their masks."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmgen.data import LabelSet
from ssmgen.data.images import read_image
from ssmgen.training import progress_bar

MIRRORED = " mirrored"


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs in memory.

    Attributes:
        ids: of the pairs.
        masks: labels ``(n, h, w)``, or a list where shapes differ.
        images: the real image of each mask, uint8 ``(n, 3, h, w)``, or a list.
        labels: the classes.
    """

    ids: Sequence[str]
    masks: Tensor | list[Tensor]
    images: Tensor | list[Tensor]
    labels: LabelSet


@dataclass(frozen=True)
class TrainingImages:
    """The images that a model was trained on.

    Attributes:
        pairs: image-mask pairs.
        ids: of the pairs.
        mirrored: whether the mirrored images count too, under ``<id> mirrored``.
    """

    pairs: Any
    ids: Sequence[str]
    mirrored: bool

    def find(self, id: str) -> Tensor:
        """The image ``(3, h, w)``, uint8, of this id."""
        name = id if id in self.ids else id.removesuffix(MIRRORED)
        image: Tensor = self.pairs[self.ids.index(name)][0]
        return image if name == id else image.flip(-1)


@dataclass(frozen=True)
class Images:
    """The images to measure.

    Attributes:
        held_out: the masks and their real images.
        generated: an image of each mask, uint8 ``(n, 3, h, w)``, or a list where shapes differ.
        sample_files: files of several images of a mask, by its id; may be empty.
        source: of the generated images, for protocols, such as ``seed=0``.
        training: the training images, if the nearest one of each generated image is to be found.
    """

    held_out: HeldOut
    generated: Tensor | list[Tensor]
    sample_files: Mapping[str, Sequence[Path]]
    source: str
    training: TrainingImages | None = None

    def samples(self) -> Iterator[Tensor]:
        """The images in ``sample_files``, uint8 ``(samples, 3, h, w)`` for each mask; all may not fit into memory."""
        return (torch.stack(list(read_images(files))) for files in self.sample_files.values())


def read_held_out(pairs: Any, count: int, labels: LabelSet) -> HeldOut:
    """The first ``count`` of these pairs, with masks of these classes.

    Raises:
        ValueError: no two of them have one shape: floor and diversity compare those that do.
    """
    items = []
    with progress_bar(count, "img", what="real images") as bar:
        for index in range(count):
            items.append(pairs[index])
            bar.update()
    images, masks = (together(part) for part in zip(*items, strict=True))
    if len(by_shape(masks)) == count > 1:
        raise ValueError(
            f"no two of the {count} unseen masks have one shape: evaluate more masks, or use fewer buckets"
        )
    return HeldOut(pair_ids(pairs)[:count], masks, images, labels)


def available(pairs: Any, wanted: int, *, requested: bool = True) -> int:
    """The number of pairs to use; a note says so where it is below the number the user requested."""
    if requested and wanted > len(pairs):
        print(f"note: there are {len(pairs)} unseen masks, not {wanted}", file=sys.stderr)
    return min(wanted, len(pairs))


def pair_ids(pairs: Any) -> list[str]:
    """The ids of image-mask pairs; drawn pairs are numbered."""
    return [str(id) for id in getattr(pairs, "ids", None) or [f"{index:05d}" for index in range(len(pairs))]]


def read_images(files: Sequence[Path]) -> Tensor | list[Tensor]:
    """The images, uint8 ``(count, 3, height, width)``, or a list where shapes differ."""
    return together([read_image(file) for file in files])


def together(tensors: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """The tensors as one if they have one shape, or else as a list."""
    return torch.stack(list(tensors)) if len({one.shape for one in tensors}) == 1 else list(tensors)


def by_shape(tensors: Tensor | Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """The positions of the tensors of each shape, in the order of their first ones, and those tensors as one."""
    if isinstance(tensors, Tensor):
        return [(list(range(len(tensors))), tensors)]
    places: dict[torch.Size, list[int]] = {}
    for place, one in enumerate(tensors):
        places.setdefault(one.shape, []).append(place)
    return [(found, torch.stack([tensors[place] for place in found])) for found in places.values()]


def mapped(function: Callable[[Tensor], Tensor], images: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """A function of a batch, applied to the images of each shape at a time; the results in the order of the images."""
    results: dict[int, Tensor] = {}
    for places, group in by_shape(images):
        results |= zip(places, function(group), strict=True)
    return together([results[place] for place in range(len(images))])
