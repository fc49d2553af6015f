"""SISMA: semantic image synthesis with Self-Mamba and Cross-Mamba blocks (arXiv 2509.17651), and its attention twin.

The 24 blocks of ``sisma-xl`` have 799,162,368 parameters, the paper's 799 M. ``sisma-attn-*`` has attention in the
place of the two Mamba layers, to measure what these buy: at equal width it has fewer parameters, and
``ffn_ratio=7.365`` gives its blocks as many within 0.1 %.

``sisma2-*`` is the simplest of the ways in which a mask may enter: its tokens are added to those of the image, and
every block is one Self-Mamba and a feed-forward. In our measurements no layer that reads the mask beat adding, see
ways-in in docs/fidelity.md. With four blocks for three of ``sisma-*`` it has about as many parameters.
"""

from ssmgen.models.token_model import TokenModel
from ssmgen.nn import Block
from ssmgen.registry import register

#: Classes of the masks that the paper's models were trained on; ``num_classes=`` replaces them.
NUM_CLASSES = 19

_MAMBA = {"mixer": "self-mamba", "cross": {"mask": "cross-mamba"}, "num_classes": NUM_CLASSES}
_ATTENTION = {
    "mixer": "self-attention",
    "cross": {"mask": {"name": "cross-attention", "position": True}},
    "num_classes": NUM_CLASSES,
}

_ADDED = {"mixer": "self-mamba", "mask_input": "add", "num_classes": NUM_CLASSES, "ffn_ratio": 6}

_LAYERS = (("self_mamba", "self-mamba", None), ("cross_mamba", "cross-mamba", "mask"), ("ffn", "feed-forward", None))
register("block", "sisma-block", layers=_LAYERS)(Block)

register("model", "sisma-debug", **_MAMBA, dim=32, depth=2, in_channels=3, scale=1)(TokenModel)
register("model", "sisma-mini", **_MAMBA, dim=96, depth=3, d_state=4, gates=False)(TokenModel)
register("model", "sisma-s", **_MAMBA, dim=384, depth=12)(TokenModel)
register("model", "sisma-b", **_MAMBA, dim=768, depth=12)(TokenModel)
register("model", "sisma-l", **_MAMBA, dim=768, depth=24)(TokenModel)
register("model", "sisma-xl", **_MAMBA, dim=1024, depth=24)(TokenModel)

register("model", "sisma2-debug", **_ADDED, dim=32, depth=2, in_channels=3, scale=1)(TokenModel)
register("model", "sisma2-mini", **_ADDED, dim=96, depth=4, d_state=4, gates=False)(TokenModel)
register("model", "sisma2-s", **_ADDED, dim=384, depth=16)(TokenModel)
register("model", "sisma2-b", **_ADDED, dim=768, depth=16)(TokenModel)
register("model", "sisma2-l", **_ADDED, dim=768, depth=32)(TokenModel)
register("model", "sisma2-xl", **_ADDED, dim=1024, depth=32)(TokenModel)

register("model", "sisma-attn-debug", **_ATTENTION, dim=32, depth=2, num_heads=2, in_channels=3, scale=1)(TokenModel)
register("model", "sisma-attn-s", **_ATTENTION, dim=384, depth=12, num_heads=6)(TokenModel)
register("model", "sisma-attn-b", **_ATTENTION, dim=768, depth=12, num_heads=12)(TokenModel)
register("model", "sisma-attn-l", **_ATTENTION, dim=768, depth=24, num_heads=12)(TokenModel)
register("model", "sisma-attn-xl", **_ATTENTION, dim=1024, depth=24, num_heads=16)(TokenModel)
