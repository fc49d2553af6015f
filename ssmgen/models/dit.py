"""DiT (arXiv 2212.09748) at its published widths: the plain attention model of the field.

Its blocks are self-attention and a feed-forward, and the mask's tokens are added to the image's at the input.
"""

from ssmgen.models.sisma import NUM_CLASSES
from ssmgen.models.token_model import TokenModel
from ssmgen.registry import register

_DIT = {"mixer": "self-attention", "add": ("mask",), "num_classes": NUM_CLASSES}

register("model", "dit-debug", **_DIT, dim=32, depth=2, num_heads=2, in_channels=3, scale=1)(TokenModel)
register("model", "dit-s", **_DIT, dim=384, depth=12, num_heads=6)(TokenModel)
register("model", "dit-b", **_DIT, dim=768, depth=12, num_heads=12)(TokenModel)
register("model", "dit-l", **_DIT, dim=1024, depth=24, num_heads=16)(TokenModel)
register("model", "dit-xl", **_DIT, dim=1152, depth=28, num_heads=16)(TokenModel)
