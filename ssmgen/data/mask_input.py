"""Masks as people have them, to labels: files, PIL images, arrays and tensors, as ids or colours, in either order."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmgen.data.images import colours_to_labels, from_pil, read_mask
from ssmgen.data.labels import BISENET19, CELEBAMASK19, LabelSet, check_labels, likelier_order, remap
from ssmgen.registry import closest

#: Label sets by name, for ``palette=`` and ``remap=``.
LABEL_SETS = {labels.name: labels for labels in (CELEBAMASK19, BISENET19)}


def to_labels(mask: Any, labels: LabelSet, *, palette: str | LabelSet = "", order: str | LabelSet = "") -> Tensor:
    """Labels ``(height, width)`` uint8 in the ids of ``labels``.

    Args:
        mask: a path to a PNG; a PIL image; or an array or tensor: ids ``(h, w)`` of an integer dtype, or colours uint8
            ``(h, w, 3)`` or ``(3, h, w)``.
        labels: what the ids of the result mean.
        palette: the label set whose colours an RGB mask has, by name or itself; ``labels`` where empty.
        order: the label set whose ids the mask has, where it is not ``labels``; they are renamed.

    Raises:
        FileNotFoundError: no such file.
        TypeError: none of these things.
        ValueError: an unknown name, a colour or an id outside the set, a shape that is no mask, or a file that is none.

    Warns:
        UserWarning: the areas of the classes look like those of the other order of the same classes.
    """
    source = _label_set(order) or _label_set(palette) or labels
    found = _read(mask, source)
    check_labels(found, len(source), where=str(mask) if isinstance(mask, str | Path) else "the mask")
    found = found.to(torch.uint8)
    if source != labels:
        return remap(found, source, labels)
    other = likelier_order(found, labels)
    if other is not None:
        warnings.warn(
            f"the areas of this mask's classes look like the order {other.name}, but it was read as {labels.name}: if "
            f"the image comes out wrong, say remap={other.name!r}",
            stacklevel=3,
        )
    return found


def _label_set(given: str | LabelSet) -> LabelSet | None:
    if isinstance(given, LabelSet) or not given:
        return given or None
    if given not in LABEL_SETS:
        raise ValueError(f"unknown label set {given!r}{closest(given, LABEL_SETS)} There are {', '.join(LABEL_SETS)}.")
    return LABEL_SETS[given]


def _read(mask: Any, labels: LabelSet) -> Tensor:
    if isinstance(mask, str | Path):
        return read_mask(mask, labels)
    if hasattr(mask, "tobytes") and hasattr(mask, "mode"):
        return _from_image(mask, labels)
    if hasattr(mask, "__array_interface__"):
        mask = torch.from_numpy(mask.copy())
    if not isinstance(mask, Tensor):
        raise TypeError(f"a mask is a path, a PIL image, an array or a tensor, got {type(mask).__name__}")
    return _from_tensor(mask.cpu(), labels)


def _from_image(image: Any, labels: LabelSet) -> Tensor:
    if image.mode in ("L", "P"):
        return from_pil(image)
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255):
        image = image.convert("RGB")
    if image.mode != "RGB":
        raise ValueError(f"the mask is a {image.mode} image; expected L or P (ids) or RGB (colours)")
    return colours_to_labels("the mask", from_pil(image), labels)


def _from_tensor(mask: Tensor, labels: LabelSet) -> Tensor:
    if mask.is_floating_point() or mask.is_complex() or mask.dtype == torch.bool:
        raise TypeError(f"ids are integers, got {mask.dtype}: give mask.argmax(0) of one-hot or logits")
    if mask.dim() == 2 and mask.numel():
        return mask
    if mask.dim() == 3 and 3 in (mask.shape[0], mask.shape[-1]) and mask.dtype == torch.uint8 and mask.numel():
        return colours_to_labels("the mask", mask if mask.shape[0] == 3 else mask.movedim(-1, 0), labels)
    raise ValueError(
        f"a mask is (height, width) of ids, or uint8 (height, width, 3) of colours; got {tuple(mask.shape)} "
        f"{mask.dtype}. Several masks go into a list."
    )
