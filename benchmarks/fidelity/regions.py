"""Whether the regions of an image have the colours of the regions of another picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: A region counts from this share of the image on: the colour of a smaller one is that of its edges.
LEAST = 1 / 256


def region_colours(images: Tensor, masks: Tensor, num_classes: int) -> Tensor:
    """Mean colour of each class in each image, in [0, 1]; NaN for regions that are too small.

    Args:
        images: uint8 ``(n, 3, h, w)``.
        masks: labels ``(n, h, w)``.
        num_classes: classes of the labels.

    Returns:
        ``(n, num_classes, 3)``.
    """
    inside = F.one_hot(masks.flatten(1).long(), num_classes).float()
    area = inside.sum(1).unsqueeze(2)
    colours = inside.mT @ (images.flatten(2).mT.float() / 255) / area.clamp(min=1)
    return colours.masked_fill(area < LEAST * masks[0].numel(), float("nan"))


def colour_agreement(found: Tensor, asked: Tensor, pool: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """How well colours of regions are those asked for.

    The agreement of a region is the share of other pictures of which the same region has a colour farther from the
    found one than the asked one is: 1 if none is nearer, 1/2 by chance.

    Args:
        found, asked: of each image, ``(n, k, 3)`` in [0, 1] or NaN, see `region_colours`. A region counts if it
            is in both.
        pool: of many other pictures, ``(m, k, 3)``.
        classes: names of the k classes.

    Returns:
        ``agreement`` and ``distance`` (Euclidean, of colours in [0, 1]), the mean over classes of the mean over images;
        ``by_class`` with both and the number of regions.

    Raises:
        ValueError: no region is in both.
    """
    by_class: dict[str, Any] = {}
    for k, name in enumerate(classes):
        both = ~(found[:, k].isnan().any(1) | asked[:, k].isnan().any(1))
        others = pool[~pool[:, k].isnan().any(1), k]
        if not both.any() or not len(others):
            continue
        near = (found[both, k] - asked[both, k]).norm(dim=1)
        farther = (
            torch.cdist(found[both, k], others, compute_mode="donot_use_mm_for_euclid_dist") > near.unsqueeze(1) + 1e-6
        )
        by_class[name] = {
            "agreement": farther.float().mean().item(),
            "distance": near.mean().item(),
            "n": int(both.sum()),
        }
    if not by_class:
        raise ValueError("no region is in an image and in the picture asked for")
    means = {key: sum(each[key] for each in by_class.values()) / len(by_class) for key in ("agreement", "distance")}
    return means | {"by_class": by_class}
