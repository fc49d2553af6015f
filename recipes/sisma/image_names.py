"""Names ``<mask>--<number>`` of several images of a mask; with two hyphens, since ``p-1`` may be another mask."""

from collections.abc import Sequence


def image_name(mask: str, number: int) -> str:
    """The name of one of several images of a mask."""
    return f"{mask}--{number}"


def split_image_name(name: str) -> tuple[str, int] | None:
    """The mask and the number in an image name; None for any other name."""
    mask, separator, number = name.rpartition("--")
    return (mask, int(number)) if separator and number.isdecimal() else None


def check_mask_names(masks: Sequence[str], numbers: Sequence[int]) -> None:
    """Reject a mask whose name is also an image name of another mask, with a `ValueError` that names both."""
    known = set(masks)
    for mask in masks:
        parts = split_image_name(mask)
        if parts and parts[0] in known and parts[1] in numbers and image_name(*parts) == mask:
            raise ambiguous_name(mask)


def ambiguous_name(name: str) -> ValueError:
    """The error for a mask whose name is also an image name of another mask."""
    return ValueError(
        f"{name} is the name of a mask and of an image of the mask {name.rpartition('--')[0]}, since images are named "
        f"<mask>--<number>: rename the mask {name}"
    )
