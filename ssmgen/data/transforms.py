"""Transforms applied to an image and its mask together, so that they stay aligned."""

from torch import Tensor

from ssmgen.data.images import from_pil, to_pil
from ssmgen.data.labels import LabelSet, check_labels


def center_crop_resize(image: Tensor, mask: Tensor, size: int | tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Crop the centre of a pair and resize both to one size.

    The crop is the largest with the aspect ratio of ``size``. Image and mask may differ in resolution (CelebAMask-HQ
    has 1024 and 512): both are cropped to the same part. The image is resized with antialiasing, the mask by nearest
    neighbour.

    Args:
        image: ``(3, height, width)`` uint8.
        mask: ``(height, width)`` uint8 labels.
        size: side of a square, or ``(height, width)``, in pixels; None keeps the largest square that both have
            pixels for.

    Returns:
        Image ``(3, h, w)`` and mask ``(h, w)``.

    Raises:
        ValueError: the aspect ratios of image and mask differ, or a size below 1.
    """
    return crop_resize(image, mask, min(*image.shape[-2:], *mask.shape[-2:]) if size is None else size)


def crop_resize(
    image: Tensor,
    mask: Tensor,
    size: int | tuple[int, int],
    share: float = 1.0,
    place: tuple[float, float] = (0.5, 0.5),
) -> tuple[Tensor, Tensor]:
    """`center_crop_resize` with a choice of the crop.

    Args:
        image, mask, size: as in `center_crop_resize`, ``(3, H, W)`` and ``(H, W)``, but a size is needed.
        share: side of the crop relative to the largest crop with that aspect ratio, in (0, 1].
        place: vertical and horizontal position of the crop, from top and left (0) to bottom and right (1).

    Raises:
        ValueError: the aspect ratios of image and mask differ, a size below 1, or ``share`` or ``place`` out of range.
    """
    check_same_shape(image, mask)
    if not 0 < share <= 1 or not all(0 <= at <= 1 for at in place):
        raise ValueError(f"share must be in (0, 1] and place in [0, 1], got {share} and {place}")
    return _resized(image, size, share, place), _resized(mask, size, share, place)


def center_crop_resize_mask(mask: Tensor, size: int | tuple[int, int]) -> Tensor:
    """`center_crop_resize` of a mask ``(height, width)`` uint8 without an image.

    Raises:
        ValueError: a size below 1.
    """
    return _resized(mask, size)


def check_same_shape(image: Tensor, mask: Tensor) -> None:
    """Reject a mask ``(..., h, w)`` whose aspect ratio is not the image's ``(..., H, W)`` up to a pixel's rounding.

    Raises:
        ValueError: the aspect ratios differ; the message gives both sizes.
    """
    (ih, iw), (mh, mw) = image.shape[-2:], mask.shape[-2:]
    tolerance = 0 if ih == mh or iw == mw else max(iw, mw)
    if abs(ih * mw - iw * mh) > tolerance:
        raise ValueError(
            f"image is {ih} x {iw} and mask {mh} x {mw} (height x width): their aspect ratios differ, so they cannot "
            "be aligned"
        )


def flip_pair(image: Tensor, mask: Tensor, labels: LabelSet) -> tuple[Tensor, Tensor]:
    """Mirror a pair horizontally and swap its left and right labels, which mean the person's left and right.

    Args:
        image: ``(..., height, width)``.
        mask: ``(..., height, width)`` integer labels.
        labels: the classes; ``labels.mirrored`` lists the ids to swap.

    Raises:
        ValueError: a label outside the set.
    """
    check_labels(mask, len(labels))
    table = labels.swap_table().to(mask.device, mask.dtype)
    return image.flip(-1), table[mask.flip(-1).long()]


def _resized(
    pixels: Tensor, size: int | tuple[int, int], share: float = 1.0, place: tuple[float, float] = (0.5, 0.5)
) -> Tensor:
    """Crop and resize in one step, with a box in fractions of a pixel: a separate crop would round it."""
    from PIL import Image

    height, width = size if isinstance(size, tuple) else (size, size)
    if height < 1 or width < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    full_height, full_width = pixels.shape[-2:]
    if (full_height, full_width) == (height, width) and share == 1:
        return pixels
    # The box is computed from fractions of the image, so that a 1024 image and its 512 mask get the same part.
    scale = min(full_height / height, full_width / width) * share
    top, left = (full_height - height * scale) * place[0], (full_width - width * scale) * place[1]
    box = (left, top, min(left + width * scale, full_width), min(top + height * scale, full_height))
    method = Image.Resampling.NEAREST if pixels.dim() == 2 else Image.Resampling.LANCZOS  # labels cannot be averaged
    return from_pil(to_pil(pixels).resize((width, height), method, box))
