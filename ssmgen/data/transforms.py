"""Transforms that act on an image and its mask alike, so the two stay aligned."""

from __future__ import annotations

from torch import Tensor

from ssmgen.data.images import from_pil, to_pil
from ssmgen.data.labels import LabelSet, check_labels


def center_crop_resize(image: Tensor, mask: Tensor, size: int | tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Cut the centre out of a pair and bring both to one size.

    The crop is the largest one with the shape of ``size``. Image and mask may differ in resolution (CelebAMask-HQ has
    1024 and 512): the same part of both is cut. The image is resized with antialiasing, the mask by nearest neighbour.

    Args:
        image: ``(3, height, width)`` uint8.
        mask: ``(height, width)`` uint8 labels.
        size: side of a square, or ``(height, width)``, in pixels; None takes the largest square that both have pixels
            for.

    Returns:
        image ``(3, h, w)`` and mask ``(h, w)``.

    Raises:
        ValueError: the aspect ratios of image and mask differ, or a size below 1.
    """
    check_same_shape(image, mask)
    if size is None:
        size = min(*image.shape[-2:], *mask.shape[-2:])
    return crop_resize(image, mask, size)


def crop_resize(
    image: Tensor,
    mask: Tensor,
    size: int | tuple[int, int],
    share: float = 1.0,
    place: tuple[float, float] = (0.5, 0.5),
) -> tuple[Tensor, Tensor]:
    """Cut the same part out of an image and its mask and bring both to one size; see `center_crop_resize`.

    Args:
        image: ``(3, height, width)`` uint8.
        mask: ``(height, width)`` uint8 labels.
        size: side of a square, or ``(height, width)``, in pixels.
        share: how much of the side of the largest crop with that shape is cut out, in (0, 1].
        place: where, from top and left (0) to bottom and right (1).

    Raises:
        ValueError: the aspect ratios of image and mask differ, a size below 1, a share or place out of range.
    """
    check_same_shape(image, mask)
    if not 0 < share <= 1 or not all(0 <= at <= 1 for at in place):
        raise ValueError(f"share must be in (0, 1] and place in [0, 1], got {share} and {place}")
    return _resized(image, size, False, share, place), _resized(mask, size, True, share, place)


def center_crop_resize_mask(mask: Tensor, size: int | tuple[int, int]) -> Tensor:
    """The mask's half of `center_crop_resize`, for a mask ``(height, width)`` uint8 that has no image.

    Raises:
        ValueError: a size below 1.
    """
    return _resized(mask, size, nearest=True)


def check_same_shape(image: Tensor, mask: Tensor) -> None:
    """Refuse a mask that cannot belong to the image: other aspect ratio, to within one pixel of rounding.

    Raises:
        ValueError: says both sizes.
    """
    (ih, iw), (mh, mw) = image.shape[-2:], mask.shape[-2:]
    same_scale = ih == mh or iw == mw
    tolerance = 0 if same_scale else max(iw, mw)
    if abs(ih * mw - iw * mh) > tolerance:
        raise ValueError(
            f"image is {ih} x {iw} and mask {mh} x {mw} (height x width): their aspect ratios differ, so they cannot "
            "be aligned"
        )


def flip_pair(image: Tensor, mask: Tensor, labels: LabelSet) -> tuple[Tensor, Tensor]:
    """Mirror a pair horizontally and swap left and right labels, which are the person's own.

    Args:
        image: ``(..., height, width)``.
        mask: ``(..., height, width)`` integer labels.
        labels: says which ids are mirror images of each other.

    Raises:
        ValueError: a label outside the set.
    """
    check_labels(mask, len(labels))
    table = labels.swap_table().to(mask.device, mask.dtype)
    return image.flip(-1), table[mask.flip(-1).long()]


def _resized(
    pixels: Tensor,
    size: int | tuple[int, int],
    nearest: bool,
    share: float = 1.0,
    place: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    """Crop and resize in one step, with a box in fractions of a pixel: cropping first would round it off."""
    from PIL import Image

    height, width = size if isinstance(size, tuple) else (size, size)
    if height < 1 or width < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    full_height, full_width = pixels.shape[-2:]
    if (full_height, full_width) == (height, width) and share == 1:
        return pixels
    # The box is derived from fractions of the picture, so a 1024 image and its 512 mask get the same part.
    scale = min(full_height / height, full_width / width) * share
    top, left = (full_height - height * scale) * place[0], (full_width - width * scale) * place[1]
    box = (left, top, min(left + width * scale, full_width), min(top + height * scale, full_height))
    method = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
    return from_pil(to_pil(pixels).resize((width, height), method, box))
