"""What a condition tells the layers of a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
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
        classes: the class of each token of a label map, int64 ``(b, m)``, the number of classes for the null; None
            where no layer asks for it.
    """

    tokens: Tensor | None = None
    grid: tuple[int, int] | None = None
    vector: Tensor | None = None
    valid: Tensor | None = None
    classes: Tensor | None = None

    @property
    def batch(self) -> int:
        """Items it was made from."""
        given = self.tokens if self.tokens is not None else self.vector
        return 0 if given is None else given.shape[0]

    def on(self, grid: tuple[int, int]) -> Signal:
        """The same on a coarser grid, where a block works on one: tokens are averaged over what they cover.

        The class of a coarser token is that in the middle of what it covers.
        """
        if self.tokens is None or self.grid is None or self.grid == grid:
            return self
        image = rearrange(self.tokens, "b (h w) d -> b d h w", h=self.grid[0])
        pooled = F.adaptive_avg_pool2d(image, grid)
        classes = self.classes
        if classes is not None:
            row, column = (
                (torch.arange(n) * 2 + 1) * whole // (2 * n) for n, whole in zip(grid, self.grid, strict=True)
            )
            classes = classes.unflatten(1, self.grid)[:, row][:, :, column].flatten(1)
        return self._replace(tokens=rearrange(pooled, "b d h w -> b (h w) d"), grid=grid, classes=classes)
