"""Differences between the left and the right of a face, as linear functions of an image, for the loss."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# In cells of the grid: of less, a mean says little, and its errors would drown all others.
_LEAST = 0.5


def mirrored_contrasts(
    masks: Tensor, mirrored: Sequence[Sequence[int]], size: tuple[int, int], weight: float = 1.0
) -> Tensor:
    """The ``contrasts`` of an objective's loss: for each pair of classes, the mean over the first minus the second.

    A model that paints either iris well, but each by itself, makes small errors in every pixel and a large one in their
    difference. Counted by itself, that error teaches the model to look at the other eye.

    Args:
        masks: integer labels ``(batch, H, W)``; H and W may differ from ``size``.
        mirrored: pairs of classes, such as a label set's ``mirrored``.
        size: (height, width) of the data.
        weight: of the squared difference, beside the mean squared error over all of an image; 0 or more.

    Returns:
        float32 ``(batch, pairs, height, width)`` on the device of ``masks``; zero for a pair of which a mask has less
        than half a cell of either class.

    Raises:
        ValueError: masks of another dtype or shape, or a weight below 0.
    """
    if masks.is_floating_point() or masks.dtype == torch.bool or masks.dim() != 3 or not masks.numel():
        raise ValueError(f"masks must be integer labels (batch, H, W), got {masks.dtype} {tuple(masks.shape)}")
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be a number from 0 on, got {weight}")
    found = []
    for pair in mirrored:
        held = torch.stack([masks == each for each in pair], dim=1).float()
        shares = F.adaptive_avg_pool2d(held, size)
        cells = shares.sum(dim=(2, 3), keepdim=True)
        means = shares / cells.clamp(min=_LEAST) * (cells >= _LEAST).all(dim=1, keepdim=True)
        found.append(means[:, 0] - means[:, 1])
    if not found:
        return torch.zeros(len(masks), 0, *size, device=masks.device)
    return math.sqrt(weight) * torch.stack(found, dim=1)
