"""Names of several images of one mask: ``<mask>--<number>``, as `sample` and `evaluate` write and ``images=`` reads.

One hyphen would not do, since ``p-1`` is a name that people give to a mask of its own beside ``p``.
"""

from __future__ import annotations

from collections.abc import Sequence


def numbered(mask: str, number: int) -> str:
    """The name of one of several images of a mask."""
    return f"{mask}--{number}"


def parted(name: str) -> tuple[str, int] | None:
    """The mask and the number in such a name; None where it is not one."""
    mask, separator, number = name.rpartition("--")
    return (mask, int(number)) if separator and number.isdecimal() else None


def check_distinct(masks: Sequence[str], numbers: Sequence[int]) -> None:
    """Refuse masks one of which is called as an image of another would be.

    Raises:
        ValueError: names both.
    """
    known = set(masks)
    for mask in masks:
        own = parted(mask)
        if own and own[0] in known and own[1] in numbers and numbered(*own) == mask:
            raise ambiguous(mask)


def ambiguous(name: str) -> ValueError:
    """The error for the name of a mask that is also the name of another mask's image."""
    mask = name.rpartition("--")[0]
    return ValueError(
        f"{name} is the name of a mask and of an image of the mask {mask}, which goes by <mask>--<number>: rename the "
        f"mask {name}"
    )
