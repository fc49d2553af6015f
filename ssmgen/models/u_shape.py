"""U-Shape Mamba (arXiv 2504.13499): a stack that halves the token grid three times and doubles it again.

A block is AdaLN-Zero and a Mamba layer, without a feed-forward; most of them work on a coarser grid, which saves time.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ssmgen.models.sisma import NUM_CLASSES
from ssmgen.models.token_model import TokenModel, check_depth
from ssmgen.registry import register


class LongSkips(TokenModel):
    """A stack whose second half is given the outputs of the first: block i those of block ``depth - 1 - i``.

    ``x = Linear(concat(x, skip))`` before each block after the middle one (U-ViT, arXiv 2209.12152).

    Args:
        depth: number of blocks; odd, because one is in the middle.
        **arguments: others of `TokenModel`.
    """

    def __init__(self, *, depth: int, **arguments: Any) -> None:
        check_depth(depth)
        if depth % 2 == 0:
            raise ValueError(f"depth must be odd, as many blocks before the middle one as after it, got {depth}")
        super().__init__(depth=depth, **arguments)
        dim = self.position.dim
        self.skips = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(depth // 2))

    def enter(self, i: int, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens ``(b, l, d)`` of the block before, on the grid of block ``i``: the same where all grids are."""
        return tokens

    def stack(self, tokens: Tensor, run: Callable[[int, Tensor], Tensor], grid: tuple[int, int]) -> Tensor:
        """See `TokenModel.stack`: tokens ``(b, l, d)`` in and out."""
        middle = len(self.skips)
        kept: list[Tensor] = []
        for i in range(len(self.blocks)):
            tokens = self.enter(i, tokens, grid)
            if i > middle:
                tokens = self.skips[i - middle - 1](torch.cat([tokens, kept.pop()], dim=-1))
            tokens = run(i, tokens)
            if i < middle:
                kept.append(tokens)
        return tokens


class UShape(LongSkips):
    """A stack on grids that are halved ``levels`` times by a strided convolution, and doubled by a transposed one.

    The blocks before the middle one are divided evenly among the levels; those left over join the middle, on the
    coarsest grid. The blocks after it mirror them.

    Args:
        depth: see `LongSkips`.
        levels: how many times the grid is halved: sides of the latent are multiples of ``patch_size * 2**levels``.
        **arguments: others of `LongSkips` and `TokenModel`.
    """

    def __init__(self, *, depth: int, levels: int = 3, **arguments: Any) -> None:
        check_depth(depth)
        if not isinstance(levels, int) or isinstance(levels, bool) or not 1 <= levels <= depth // 2:
            raise ValueError(
                f"levels must be from 1 to the {depth // 2} blocks before the middle one, got {levels!r}: a level "
                "needs a block on either side, so depth is at least 2 levels + 1"
            )
        super().__init__(depth=depth, **arguments)
        dim = self.position.dim
        self.levels, self.multiple = levels, self.patch_size * 2**levels
        self.down = nn.ModuleList(nn.Conv2d(dim, dim, 2, stride=2) for _ in range(levels))
        self.up = nn.ModuleList(nn.ConvTranspose2d(dim, dim, 2, stride=2) for _ in range(levels))

    def level(self, i: int) -> int:
        """How many times the grid of block ``i`` was halved."""
        middle = len(self.skips)
        return min((middle - abs(middle - i)) // (middle // self.levels), self.levels)

    def grids(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """The grid of every block."""
        levels = [self.level(i) for i in range(len(self.blocks))]
        return [(grid[0] // 2**level, grid[1] // 2**level) for level in levels]

    def enter(self, i: int, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """See `LongSkips.enter`: ``(b, l, d)``, halved or doubled where block ``i`` begins another level."""
        before, level = self.level(max(i - 1, 0)), self.level(i)
        if before == level:
            return tokens
        image = rearrange(tokens, "b (h w) d -> b d h w", h=grid[0] // 2**before)
        image = self.down[before](image) if before < level else self.up[level](image)
        return rearrange(image, "b d h w -> b (h w) d")


_USM = {"mixer": "self-mamba", "ffn": None, "add": ("mask",), "num_classes": NUM_CLASSES, "patch_size": 1}

register("model", "usm-debug", **_USM, dim=32, depth=5, levels=2, in_channels=3, scale=1)(UShape)
register("model", "usm-s", **_USM, dim=384, depth=13)(UShape)
register("model", "usm-b", **_USM, dim=768, depth=25)(UShape)
register("model", "usm-l", **_USM, dim=1024, depth=49)(UShape)
register("model", "usm-xl", **_USM, dim=1152, depth=57)(UShape)
