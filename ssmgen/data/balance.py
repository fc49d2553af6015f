"""Counter class imbalance: show examples with rare classes more often, or weight their pixels in the loss."""

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def repeats(masks: Iterable[Tensor], threshold: float, seed: int = 0) -> list[tuple[int, int]]:
    """Repeat factor sampling: an epoch's examples, those with rare classes repeated (LVIS, arXiv 1908.03195, app. B).

    A class in a share f of the masks gets the factor ``max(1, sqrt(threshold / f))``, and an example the largest factor
    of its classes. The fraction of a factor beyond whole repeats is rounded up or down at random, once.

    Args:
        masks: integer label maps of any shape, one per example.
        threshold: share of the masks below which a class counts as rare, in [0, 1]; 0 repeats nothing.
        seed: of the rounding.

    Returns:
        Pairs (index of the example, number of its earlier occurrences in the list).

    Raises:
        ValueError: ``threshold`` outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a share in [0, 1], got {threshold}")
    present = [set(torch.unique(mask).tolist()) for mask in masks]
    counts = Counter(label for classes in present for label in classes)
    factor = {label: max(1.0, math.sqrt(threshold * len(present) / count)) for label, count in counts.items()}
    chance = random.Random(seed)
    shown = []
    for index, classes in enumerate(present):
        wanted = max(factor[label] for label in classes)
        times = math.floor(wanted) + (chance.random() < wanted % 1)
        shown += [(index, before) for before in range(times)]
    return shown


def class_weights(masks: Iterable[Tensor], classes: int, power: float, largest: float = 10.0) -> list[float]:
    """Loss weights that grow with the rarity of a class: one over its share of the pixels, to the ``power``.

    They are scaled to a mean of 1 over all pixels, then capped.

    Args:
        masks: labels ``(height, width)`` of every example.
        classes: number of classes; one that never occurs gets ``largest``.
        power: 0 weights all classes alike, 1 gives every class the same sum of weights.
        largest: cap.

    Raises:
        ValueError: ``power`` below 0.
    """
    if power < 0:
        raise ValueError(f"power must be at least 0, got {power}")
    pixels = sum((torch.bincount(mask.flatten().long(), minlength=classes).double() for mask in masks), torch.zeros(1))
    weights = (pixels.sum() / pixels.clamp(min=1)) ** power
    return (weights * pixels.sum() / (weights * pixels).sum()).clamp(max=largest).tolist()


def loss_weights(masks: Tensor, class_weights: Sequence[float], size: Sequence[int]) -> Tensor:
    """The ``weight`` of an objective's loss from label maps: small parts then do not drown in large ones.

    A latent that covers several classes gets the largest of their weights.

    Args:
        masks: integer labels ``(batch, H, W)``; H and W may differ from ``size``.
        class_weights: one positive weight per class.
        size: (height, width) of the data.

    Returns:
        float32 ``(batch, 1, height, width)`` on the device of ``masks``.

    Raises:
        ValueError: masks of another dtype or shape, a label without a weight, or a weight that is not positive.
    """
    if not all(weight > 0 for weight in class_weights):
        raise ValueError(f"class_weights must be positive, got {list(class_weights)}")
    if masks.is_floating_point() or masks.dim() != 3 or not masks.numel():
        raise ValueError(f"masks must be integer labels (batch, H, W), got {masks.dtype} {tuple(masks.shape)}")
    low, high = torch.stack(masks.aminmax()).tolist()
    count = len(class_weights)
    if low < 0 or high >= count:
        raise ValueError(f"there are {count} class_weights, but a mask has the label {low if low < 0 else high}")
    table = torch.tensor(class_weights, dtype=torch.float32, device=masks.device)
    return F.adaptive_max_pool2d(table[masks.long()].unsqueeze(1), tuple(size))
