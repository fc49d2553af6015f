"""The check of every label map before it reaches a device."""

from torch import Tensor


def check_labels(mask: Tensor, num_classes: int, where: str = "mask") -> None:
    """Reject a label outside ``0..num_classes-1`` before it reaches a device.

    Args:
        mask: integer labels of any shape whose last two dimensions are rows and columns.
        num_classes: number of classes.
        where: what the message calls the mask, such as the path of its file.

    Raises:
        TypeError: the labels are not integers.
        ValueError: names the value, its number of pixels and the first of them.
    """
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{where}: labels must be integers, got {mask.dtype}; a one-hot mask has a class dimension")
    bad = (mask < 0) | (mask >= num_classes)
    if not bad.any():
        return
    first = bad.nonzero()[0].tolist()
    value = int(mask[tuple(first)])
    count = int((mask == value).sum())
    spot = f"(row, column) = ({first[-2]}, {first[-1]})" if len(first) >= 2 else f"position {first[0]}"
    if len(first) > 2:
        spot += f" of item {first[0]}"
    hint, fix = "", "Remap or relabel the mask, or build the model with the right num_classes."
    if value == 255:
        hint = " (255 is often an ignore label)"
        if (bad == (mask == 255)).all() and (mask[~bad] == 0).all() and not bad.all():
            hint, fix = "", "It holds 0 and 255 alone, as a binary mask does: divide it by 255 for the labels 0 and 1."
    raise ValueError(
        f"{where}: label {value}{hint} is outside 0..{num_classes - 1}; it covers {count} pixel(s), "
        f"the first at {spot}. {fix}"
    )
