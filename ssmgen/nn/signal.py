"""What a condition tells the layers of a model."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class Signal(NamedTuple):
    """What a condition says.

    Attributes:
        tokens: ``(b, m, d)`` for layers that read the condition, or None.
        grid: (height, width) where the tokens lie on the image's token grid, else None.
        vector: ``(b, d)``, which joins the time in every AdaLN, or None.
        valid: ``(b, m)`` bool, False where a token is padding, or None where none is.
    """

    tokens: Tensor | None = None
    grid: tuple[int, int] | None = None
    vector: Tensor | None = None
    valid: Tensor | None = None

    @property
    def batch(self) -> int:
        """Items it was made from."""
        given = self.tokens if self.tokens is not None else self.vector
        return 0 if given is None else given.shape[0]

    def on(self, grid: tuple[int, int]) -> Signal:
        """The same on a coarser grid, where a block works on one: tokens are averaged over what they cover."""
        if self.tokens is None or self.grid is None or self.grid == grid:
            return self
        image = rearrange(self.tokens, "b (h w) d -> b d h w", h=self.grid[0])
        pooled = F.adaptive_avg_pool2d(image, grid)
        return self._replace(tokens=rearrange(pooled, "b d h w -> b (h w) d"), grid=grid)
