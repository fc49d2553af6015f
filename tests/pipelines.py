"""A small pipeline with random weights, for tests."""

from typing import Any

import torch

import ssmgen
from ssmgen import MaskToImage
from ssmgen.data import CELEBAMASK19
from ssmgen.pipeline import Recipe

ARGS = {"in_channels": 3, "mask_scale": 1, "patch_size": 4, "mask_dropout": 0.1, "dim": 96}


def random_pipe(sampling: dict[str, Any] | None = None, about: str = "") -> MaskToImage:
    """A pixel-space pipeline of 32 x 32 images."""
    torch.manual_seed(0)
    model = ssmgen.build("sisma-debug", **ARGS)
    for parameter in model.parameters():  # an untrained head is zero and would hide every fault
        torch.nn.init.normal_(parameter, std=0.05)
    recipe = Recipe("sisma-debug", ARGS, "identity", 32, CELEBAMASK19, sampling or {}, about)
    return MaskToImage(model, ssmgen.build("identity"), recipe)
