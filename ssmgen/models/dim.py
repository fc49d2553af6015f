"""DiM (arXiv 2405.14224): Mamba blocks in four scan orders, with long skips and learned tokens at the ends of lines."""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ssmgen.models.sisma import NUM_CLASSES
from ssmgen.models.u_shape import LongSkips
from ssmgen.registry import register


class DiM(LongSkips):
    """Mamba blocks on a grid with ``pad`` more rows and columns, between two depthwise convolutions.

    The added tokens are learned: they tell a scan where a line of the image ends. They are cut off after the
    last block.

    Args:
        pad: added rows and columns.
        **arguments: others of `LongSkips` and `TokenModel`; without ``cross`` and ``modulate``, because the tokens of
            a condition do not lie on the padded grid.

    Raises:
        ValueError: layers in ``cross`` or ``modulate``, or a negative ``pad``.
    """

    def __init__(self, *, pad: int = 3, **arguments: Any) -> None:
        if arguments.get("cross") or arguments.get("modulate"):
            raise ValueError("DiM works on a padded grid and has no layers that read conditions: use add= for tokens")
        if pad < 1:
            raise ValueError(f"pad must be at least 1, got {pad}")
        super().__init__(**arguments)
        dim = self.position.dim
        self.pad = pad
        self.pad_tokens = nn.Parameter(0.02 * torch.randn(pad, dim))
        self.smooth_first = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.smooth_last = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def grids(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """The padded grid, for every block."""
        return [(grid[0] + self.pad, grid[1] + self.pad)] * len(self.blocks)

    def stack(self, tokens: Tensor, run: Callable[[int, Tensor], Tensor], grid: tuple[int, int]) -> Tensor:
        """See `TokenModel.stack`: tokens ``(b, l, d)`` in and out."""
        height, width = grid
        image = self.smooth_first(rearrange(tokens, "b (h w) d -> b d h w", h=height))
        columns = repeat(self.pad_tokens, "p d -> b d h p", b=len(tokens), h=height)
        rows = repeat(self.pad_tokens, "p d -> b d p w", b=len(tokens), w=width + self.pad)
        image = torch.cat([torch.cat([image, columns.to(image.dtype)], dim=3), rows.to(image.dtype)], dim=2)
        tokens = super().stack(rearrange(image, "b d h w -> b (h w) d"), run, grid)
        image = rearrange(tokens, "b (h w) d -> b d h w", h=height + self.pad)[:, :, :height, :width]
        return rearrange(self.smooth_last(image), "b d h w -> b (h w) d")


_DIM = {
    "mixer": {"name": "mamba", "d_conv": 3},
    "orders": ("row", "row-reversed", "column", "column-reversed"),
    "adaln": {"name": "adaln-single", "norm": "rms"},
    "ffn": None,
    "add": ("mask",),
    "num_classes": NUM_CLASSES,
}

register("model", "dim-debug", **_DIM, dim=32, depth=5, in_channels=3, scale=1)(DiM)
register("model", "dim-l", **_DIM, dim=1024, depth=49)(DiM)
register("model", "dim-h", **_DIM, dim=1536, depth=49)(DiM)
