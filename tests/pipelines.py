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


def told_pipe(size: Any = (32, 48), regions: bool = True, **sampling: Any) -> MaskToImage:
    """A pixel-space pipeline that is told words, a style, a class and edges besides the mask, of random weights."""
    torch.manual_seed(0)
    style = {"name": "style-image", "placed_by": "mask"} if regions else {"name": "style-image", "regions": False}
    args = {
        "conditions": {
            "mask": "label-map",
            "words": {"name": "token-sequence", "width": 8},
            "style": style,
            "kind": {"name": "class-label", "num_labels": 3},
            "edges": {"name": "dense-map", "channels": 1},
        },
        **{"in_channels": 3, "scale": 1, "patch_size": 2, "dim": 32, "depth": 1, "num_classes": len(CELEBAMASK19)},
        **{"mask_dropout": 0.1, "words_dropout": 0.1, "style_dropout": 0.1, "kind_dropout": 0.1},
        "cross": {
            "mask": "cross-mamba",
            "words": {"name": "cross-attention", "num_heads": 1},
            **({} if regions else {"style": {"name": "cross-attention", "num_heads": 1}}),
        },
        "add": ["style", "edges"] if regions else ["edges"],
    }
    model = ssmgen.build("sisma-debug", **args)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    encoders = {"words": {"name": "word-vectors", "width": 8}}
    settings = {"solver": "euler", "steps": 2, **sampling}
    recipe = Recipe("sisma-debug", args, "identity", size, CELEBAMASK19, settings, text_encoders=encoders)
    return MaskToImage(model, ssmgen.build("identity"), recipe)
