"""Show rare classes more often: repeat factor sampling."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import torch
from torch import Tensor


def repeats(masks: Iterable[Tensor], threshold: float, seed: int = 0) -> list[tuple[int, int]]:
    """Which example to show how often in an epoch, by the rarest class in its mask (LVIS, arXiv 1908.03195, app. B).

    A class that f of the masks contain gets the factor ``max(1, sqrt(threshold / f))``, an example the largest factor
    of its classes. What remains of a factor after whole repeats is rounded up or down by chance, once.

    Args:
        masks: integer label maps of any shape, one per example.
        threshold: share of the masks below which a class counts as rare, in [0, 1]; 0 repeats nothing.
        seed: of the rounding.

    Returns:
        Pairs (index of the example, how many times it came before in the list).

    Raises:
        ValueError: ``threshold`` outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a share in [0, 1], got {threshold}")
    present = [set(torch.unique(mask).tolist()) for mask in masks]
    counts: dict[int, int] = {}
    for classes in present:
        for label in classes:
            counts[label] = counts.get(label, 0) + 1
    factor = {label: max(1.0, math.sqrt(threshold * len(present) / count)) for label, count in counts.items()}
    chance = random.Random(seed)
    shown = []
    for index, classes in enumerate(present):
        wanted = max(factor[label] for label in classes)
        times = math.floor(wanted) + (chance.random() < wanted % 1)
        shown += [(index, before) for before in range(times)]
    return shown


def class_weights(masks: Iterable[Tensor], classes: int, power: float, largest: float = 10.0) -> list[float]:
    """Weights by which rare classes count more in a loss: the ``power`` of one over the share of pixels of a class.

    They are scaled to a mean of 1 over all pixels, then capped.

    Args:
        masks: labels ``(height, width)`` of every example.
        classes: how many classes there are; one that never occurs gets ``largest``.
        power: 0 weighs all alike, 1 gives every class the same sum of weights.
        largest: cap.

    Raises:
        ValueError: a power below 0.
    """
    if power < 0:
        raise ValueError(f"power must be at least 0, got {power}")
    pixels = sum((torch.bincount(mask.flatten().long(), minlength=classes).double() for mask in masks), torch.zeros(1))
    weights = (pixels.sum() / pixels.clamp(min=1)) ** power
    return (weights * pixels.sum() / (weights * pixels).sum()).clamp(max=largest).tolist()
