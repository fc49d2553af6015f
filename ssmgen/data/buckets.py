"""Aspect-ratio buckets: a few sizes, so that images of many shapes are cropped little and still fill batches."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ssmgen.data.images import mask_shape
from ssmgen.data.transforms import center_crop_resize, check_same_shape

Shape = tuple[int, int]  # (height, width)
#: Side of a square; (height, width); several of those; None: the largest square of each image; "whole": all of it.
Size = int | Shape | Sequence[Shape] | Literal["whole"] | None
_LEAST_KEPT = 0.5


def aspect_buckets(pixels: int, multiple: int, lowest: float = 0.5, highest: float = 2.0) -> list[Shape]:
    """Sizes of about equally many pixels, from wide to tall.

    For every width that is a multiple there is the largest height, and for every height the largest width, as in the
    buckets of NovelAI; of several with the same aspect ratio, the largest.

    Args:
        pixels: most pixels of a size, e.g. ``256 * 256``.
        multiple: of which heights and widths are multiples: the autoencoder's factor times the patch size.
        lowest, highest: range of height / width.

    Returns:
        Pairs (height, width), ascending by height / width.

    Raises:
        ValueError: no size has so few pixels and an aspect ratio in the range.
    """
    if multiple < 1 or not 0 < lowest <= highest:
        raise ValueError(f"multiple must be at least 1 and 0 < lowest <= highest, got {multiple}, {lowest}, {highest}")
    largest: dict[float, Shape] = {}
    for one in range(multiple, pixels // multiple + 1, multiple):
        other = pixels // one // multiple * multiple
        for height, width in ((one, other), (other, one)):
            if lowest <= height / width <= highest:
                kept = largest.get(height / width, (0, 0))
                largest[height / width] = max(kept, (height, width))
    if not largest:
        raise ValueError(
            f"no size has at most {pixels} pixels, sides that are multiples of {multiple}, and a height / width from "
            f"{lowest:g} to {highest:g}: raise pixels or widen the range"
        )
    return [largest[aspect] for aspect in sorted(largest)]


def check_buckets(buckets: Sequence[Shape], multiple: int = 1) -> None:
    """Reject sizes that cannot be the buckets of a model.

    Args:
        buckets: pairs (height, width).
        multiple: of which heights and widths must be multiples: the autoencoder's factor times the patch size.

    Raises:
        ValueError: no bucket, one that is no pair of positive integers or no multiple, or one twice; names them.
    """
    if not buckets:
        raise ValueError("the list of buckets is empty: expected pairs (height, width)")
    for bucket in buckets:
        if len(bucket) != 2 or not all(type(side) is int and side > 0 for side in bucket):
            raise ValueError(f"a bucket is a pair (height, width) of pixels, got {bucket!r}")
    odd = [f"{height} x {width}" for height, width in buckets if height % multiple or width % multiple]
    if odd:
        raise ValueError(f"heights and widths of buckets must be multiples of {multiple}, got {', '.join(odd)}")
    twice = [f"{height} x {width}" for (height, width), count in Counter(map(tuple, buckets)).items() if count > 1]
    if twice:
        raise ValueError(f"every bucket must be given once, twice is {', '.join(twice)}")


def nearest_bucket(shape: Shape, buckets: Sequence[Shape]) -> int:
    """Index of the bucket whose aspect ratio is nearest to an image's: the one of which most is kept, the first of
    equals."""
    return max(range(len(buckets)), key=lambda index: (kept_share(shape, buckets[index]), -index))


def kept_share(shape: Shape, bucket: Shape) -> float:
    """Share of an image of (height, width) that the largest crop with a bucket's aspect ratio keeps, in (0, 1]."""
    ratio = shape[0] * bucket[1] / (shape[1] * bucket[0])
    return min(ratio, 1 / ratio)


def frequent_buckets(masks: Sequence[Path], buckets: Sequence[Shape], least: int) -> list[Shape]:
    """The buckets without rare ones, whose few images would fill a batch by repetition.

    While a bucket has fewer than ``least`` images, the rarest is left out, and its images go to another one.

    Args:
        masks: the files of the masks, such as those of ``PairFolder(root, labels, "whole").mask_files()``.
        buckets: pairs (height, width).
        least: fewest images of a bucket, e.g. the batch size.

    Raises:
        FileNotFoundError: a mask is missing.
        ValueError: fewer masks than ``least``; a mask is no PNG file; or see `check_buckets`.
    """
    check_buckets(buckets)
    if len(masks) < least:
        raise ValueError(f"no bucket can have {least} images: there are {len(masks)}")
    shapes = Counter(mask_shape(file) for file in masks)
    kept = list(buckets)
    while True:
        images = dict.fromkeys(range(len(kept)), 0)
        for shape, count in shapes.items():
            images[nearest_bucket(shape, kept)] += count
        rarest = min(images, key=images.__getitem__)
        if images[rarest] >= least:
            return kept
        del kept[rarest]


class Sizing:
    """The size that each pair of a data set is cropped and scaled to.

    Args:
        size: see `Size`.
        masks: the files of the masks. With several sizes, the shapes are read from their headers: unlike photos, masks
            are not turned by EXIF data.

    Raises:
        FileNotFoundError: a mask is missing.
        ValueError: see `parse_size` and `check_buckets`; a mask is no PNG file; or more than half of an image would be
            cut off in its bucket: says of how many, and which loses most.
    """

    def __init__(self, size: Size, masks: Sequence[Path]) -> None:
        self.size = parse_size(size)
        self._bucket: list[int] | None = None
        if isinstance(self.size, list):
            check_buckets(self.size)
            shapes = [mask_shape(file) for file in masks]
            self._bucket = [nearest_bucket(shape, self.size) for shape in shapes]
            _check_kept(masks, shapes, [self.size[bucket] for bucket in self._bucket])

    def fitted(self, index: int, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Image ``(3, H, W)`` and mask ``(H, W)`` of a pair, cropped and scaled to its size: ``(3, h, w)``, ``(h, w)``.

        Raises:
            ValueError: their aspect ratios differ.
        """
        if self.size == "whole":
            check_same_shape(image, mask)
            return image, mask
        return center_crop_resize(image, mask, self.of(index))

    def of(self, index: int) -> Any:
        """The size of a pair: a side, (height, width) or None."""
        return self.size[self.bucket_of(index)] if isinstance(self.size, list) else self.size

    def bucket_of(self, index: int) -> int:
        """Index of an image's bucket, 0 if there is one size."""
        return self._bucket[index] if self._bucket is not None else 0


def parse_size(size: Size) -> int | Shape | list[Shape] | Literal["whole"] | None:
    """A size in one form: tuples for pairs, and a list for several, also where lists were read from a file.

    Raises:
        ValueError: another form, or a side below 1.
    """
    found = _parsed(size)
    sides = (found,) if isinstance(found, int) else found if isinstance(found, tuple) else ()
    if any(side < 1 for side in sides):
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    return found


def _parsed(size: Size) -> int | Shape | list[Shape] | Literal["whole"] | None:
    if size is None or size == "whole" or type(size) is int:
        return size  # type: ignore[return-value]
    try:
        if all(type(side) is int for side in size):  # type: ignore[union-attr]
            height, width = size  # type: ignore[misc]
            return height, width  # type: ignore[return-value]
        return [(height, width) for height, width in size]  # type: ignore[union-attr, misc]
    except (TypeError, ValueError):
        raise ValueError(
            f"size must be a side, (height, width), a list of those, 'whole' or None, got {size!r}"
        ) from None


def _check_kept(masks: Sequence[Path], shapes: Sequence[Shape], sizes: Sequence[Shape]) -> None:
    kept = [kept_share(shape, size) for shape, size in zip(shapes, sizes, strict=True)]
    far = sum(share < _LEAST_KEPT for share in kept)
    if far:
        worst = min(range(len(kept)), key=kept.__getitem__)
        (height, width), (bucket_height, bucket_width) = shapes[worst], sizes[worst]
        raise ValueError(
            f"{far} of {len(kept)} images would lose more than half to every bucket; {masks[worst]} of {height} x "
            f"{width} (height x width) would keep {math.floor(100 * kept[worst])} % in {bucket_height} x "
            f"{bucket_width}: add buckets of such shapes, or leave those images out"
        )
