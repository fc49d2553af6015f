"""Image names ``<mask>--<number>``, for several images of one mask: `sample` and `evaluate` write and read them.

Two hyphens, because ``p-1`` is a common name for a mask of its own beside ``p``.
"""

from __future__ import annotations

from collections.abc import Sequence


def image_name(mask: str, number: int) -> str:
    """The name of one of several images of a mask."""
    return f"{mask}--{number}"


def split_image_name(name: str) -> tuple[str, int] | None:
    """The mask and the number in an image name; None for any other name."""
    mask, separator, number = name.rpartition("--")
    return (mask, int(number)) if separator and number.isdecimal() else None


def check_mask_names(masks: Sequence[str], numbers: Sequence[int]) -> None:
    """Reject a mask whose name is also an image name of another mask.

    Raises:
        ValueError: names both masks.
    """
    known = set(masks)
    for mask in masks:
        parts = split_image_name(mask)
        if parts and parts[0] in known and parts[1] in numbers and image_name(*parts) == mask:
            raise ambiguous_name(mask)


def ambiguous_name(name: str) -> ValueError:
    """The error for a mask whose name is also an image name of another mask."""
    mask = name.rpartition("--")[0]
    return ValueError(
        f"{name} is the name of a mask and of an image of the mask {mask}, since images are named <mask>--<number>: "
        f"rename the mask {name}"
    )
