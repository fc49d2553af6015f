"""Diversity of the images drawn from one mask."""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_rms(images: Tensor) -> float:
    """Mean root-mean-square difference over all pairs of ``(count, channels, height, width)`` images.

    In the units of the images: for images in [-1, 1], 0 is identical and independent noise is above 0.8. A pixel
    distance, cheap and without weights; it is not LPIPS.

    Raises:
        ValueError: fewer than two images.
    """
    if images.dim() != 4 or len(images) < 2:
        raise ValueError(f"images must be (count, channels, height, width) with count >= 2, got {tuple(images.shape)}")
    flat = images.float().flatten(1)
    distances = torch.pdist(flat) / flat.shape[1] ** 0.5
    return distances.mean().item()
