"""Images, small networks and published weights for the tests of metrics."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from ssmgen.metrics import FeatureSet


class Pool(nn.Module):
    """A tiny seeded trunk: pooled random convolutions."""

    def __init__(self, size=6):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, size, 5)

    @torch.no_grad()
    def forward(self, images):
        return self.conv(images.float() / 255).abs().mean(dim=(2, 3))


def images(count, seed, side=24):
    return torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def smooth(count, seed, side=24):
    """Images with structure: random colours, blown up."""
    small = images(count, seed, 4).float()
    return nn.functional.interpolate(small, (side, side), mode="bicubic").clamp(0, 255).to(torch.uint8)


def featured(trunk, batch, prefix="i"):
    features = FeatureSet(trunk)
    features.update([f"{prefix}{k:05d}" for k in range(len(batch))], batch)
    return features


def published_folder():
    """Where Inception's and AlexNet's published weights lie, for the tests that take them."""
    folder = os.environ.get("SSMGEN_WEIGHTS")
    if not folder:
        pytest.skip("the published weights are not here; set SSMGEN_WEIGHTS to their folder")
    return Path(folder)


class Pixels(nn.Module):
    def forward(self, first, second):
        return (first - second).abs().mean(dim=(1, 2, 3))
