"""Conversion of masks to labels: files, PIL images, arrays and tensors, as ids or colours, in either class order."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmgen.data.images import colours_to_labels, from_pil, pil_to_labels, read_mask, without_opaque_alpha
from ssmgen.data.labels import BISENET19, CELEBAMASK19, LabelSet, check_labels, likelier_order, remap
from ssmgen.registry import closest

#: Label sets by name, for ``palette=`` and ``remap=``.
LABEL_SETS = {labels.name: labels for labels in (CELEBAMASK19, BISENET19)}


def to_labels(
    mask: Any, labels: LabelSet, *, palette: str | LabelSet = "", order: str | LabelSet = "", name: str = "the mask"
) -> Tensor:
    """Labels ``(height, width)`` uint8 in the ids of ``labels``.

    Args:
        mask: path of a PNG file, PIL image, array or tensor. Arrays and tensors hold ids ``(h, w)`` of an integer
            dtype, or colours ``(h, w, 3)`` or ``(3, h, w)`` uint8.
        labels: the classes of the result.
        palette: the label set, or its name, that defines the colours of an RGB mask; ``labels`` if empty.
        order: the label set, or its name, of the mask's ids, which are converted; ``labels`` if empty.
        name: name of the mask in messages, unless it is a path.

    Raises:
        FileNotFoundError: no such file.
        TypeError: another type.
        ValueError: an unknown label set, a colour or an id outside the set, a shape or a file that is not a mask, or a
            palette and an order that differ.

    Warns:
        UserWarning: the class areas look like the other order of the same classes.
    """
    colours, ids_order = _label_set(palette), _label_set(order)
    if colours and ids_order and colours != ids_order:
        raise ValueError(
            f"palette={colours.name} and remap={ids_order.name} differ: use palette= for a mask of colours, remap= for "
            "ids"
        )
    source = colours or ids_order or labels
    name = str(mask) if isinstance(mask, str | Path) else name
    ids = _read(mask, source, name)
    check_labels(ids, len(source), where=name)
    ids = ids.to(torch.uint8)
    other = likelier_order(ids, source)
    if other is not None:
        fix = "leave out remap= and palette=" if other == labels else f"say remap={other.name!r}"
        warnings.warn(
            f"{name}: the areas of its classes look like the order {other.name}, but it was read as {source.name}: if "
            f"the image is wrong, {fix}",
            stacklevel=3,
        )
    return ids if source == labels else remap(ids, source, labels)


def _label_set(choice: str | LabelSet) -> LabelSet | None:
    if isinstance(choice, LabelSet) or not choice:
        return choice or None
    if choice not in LABEL_SETS:
        raise ValueError(f"unknown label set {choice!r}{closest(choice, LABEL_SETS)} Known: {', '.join(LABEL_SETS)}.")
    return LABEL_SETS[choice]


def _read(mask: Any, labels: LabelSet, name: str) -> Tensor:
    if isinstance(mask, str | Path):
        return read_mask(mask, labels)
    if hasattr(mask, "tobytes") and hasattr(mask, "mode"):
        return _from_image(mask, labels, name)
    if hasattr(mask, "__array_interface__"):
        if mask.dtype.kind not in "iu":
            raise TypeError(_no_ids(name, mask.dtype, mask.shape, mask.dtype.kind == "b", "mask.astype('int64')"))
        # A copy in native byte order, int64 because torch supports unsigned 16-bit only in part.
        mask = torch.from_numpy(mask.astype("uint8" if mask.dtype == "uint8" else "int64", order="C"))
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: a mask is a path, a PIL image, an array or a tensor, got {type(mask).__name__}")
    return _from_tensor(mask.cpu(), labels, name)


def _from_image(image: Any, labels: LabelSet, name: str) -> Tensor:
    image = without_opaque_alpha(image)
    if image.mode == "1":
        return from_pil(image.convert("L")) // 255
    if image.mode in ("L", "P", "RGB"):
        return pil_to_labels(name, image, labels)
    faults = {"LA": "transparent pixels", "RGBA": "transparent pixels", "I": "more than 8 bits", "F": "floats"}
    fault = faults.get(image.mode.partition(";")[0])
    kind = f"{image.mode} image with {fault}" if fault else f"{image.mode} image"
    raise ValueError(f"{name}: is a {kind}; expected L or P (ids) or RGB (colours)")


def _from_tensor(mask: Tensor, labels: LabelSet, name: str) -> Tensor:
    if mask.is_floating_point() or mask.is_complex() or mask.dtype == torch.bool:
        raise TypeError(_no_ids(name, mask.dtype, mask.shape, mask.dtype == torch.bool, "mask.long()"))
    if mask.dim() == 2 and mask.numel():
        return mask if mask.dtype == torch.uint8 else mask.long()
    if mask.dim() == 3 and 3 in (mask.shape[0], mask.shape[-1]) and mask.dtype == torch.uint8 and mask.numel():
        return colours_to_labels(name, mask if mask.shape[0] == 3 else mask.movedim(-1, 0), labels)
    if mask.dim() == 3 and not mask.shape[0]:
        raise ValueError(f"{name}: the batch is empty, got {tuple(mask.shape)}: pass one mask or a list of masks")
    raise ValueError(
        f"{name}: expected ids (height, width) or colours (height, width, 3) uint8; got {tuple(mask.shape)} "
        f"{mask.dtype}. Several masks go into a list."
    )


def _no_ids(name: str, dtype: Any, shape: Any, is_bool: bool, integers: str) -> str:
    """Message for an array or a tensor that is not of integers; the advice depends on what it may hold."""
    fault = f"{name}: ids are integers, got {dtype} {tuple(shape)}"
    if len(shape) != 2:
        scores = f"{integers}.argmax(0)" if is_bool else "mask.argmax(0)"
        return f"{fault}: give {scores} of one-hot classes or logits (classes, height, width), or uint8 colours"
    if is_bool:
        return f"{fault}: give {integers}, where True becomes class 1"
    return f"{fault}: give {integers} if its values are ids; they must be whole numbers"
