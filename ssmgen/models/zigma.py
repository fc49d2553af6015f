"""ZigMa (arXiv 2403.13802): Mamba blocks that scan the image in zigzag, each layer along another of eight paths.

A block is AdaLN-Zero over an RMSNorm and the original Mamba layer, without a feed-forward.
"""

from typing import Any

from ssmgen.models.sisma import NUM_CLASSES
from ssmgen.models.token_model import TokenModel
from ssmgen.nn import PlainNorm
from ssmgen.ops import ZIGZAG_ORDERS
from ssmgen.registry import register


class ZigMa(TokenModel):
    """`TokenModel` with a head that does not see the time.

    Args:
        **arguments: of `TokenModel`.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.head_adaln = PlainNorm(self.position.dim)


_ZIGMA = {
    "mixer": "mamba",
    "orders": ZIGZAG_ORDERS,
    "adaln": {"name": "adaln", "norm": "rms"},
    "ffn": None,
    "add": ("mask",),
    "num_classes": NUM_CLASSES,
    "patch_size": 1,
}

register("model", "zigma-debug", **_ZIGMA, dim=32, depth=2, in_channels=3, scale=1)(ZigMa)
register("model", "zigma-s", **_ZIGMA, dim=368, depth=24)(ZigMa)
register("model", "zigma-b", **_ZIGMA, dim=768, depth=24)(ZigMa)
register("model", "zigma-m", **_ZIGMA, dim=768, depth=48)(ZigMa)
register("model", "zigma-l", **_ZIGMA, dim=1024, depth=48)(ZigMa)
register("model", "zigma-h", **_ZIGMA, dim=1536, depth=48)(ZigMa)
