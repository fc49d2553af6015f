"""A block and a solver for ssmgen."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssmgen import register
from ssmgen.solvers import RungeKutta


@register("block", "shift-mixer")
class ShiftMixer(nn.Module):
    """Shifts four parts of the channels by one token, each in another direction, and mixes them by a linear layer.

    Args:
        dim: width, a multiple of 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens ``(batch, height * width, dim)``, row-major, to tokens of the same shape."""
        grid = F.pad(rearrange(x, "b (h w) d -> b d h w", h=size[0]), (1, 1, 1, 1))
        left, right, up, down = grid.chunk(4, dim=1)
        shifted = left[..., 1:-1, 2:], right[..., 1:-1, :-2], up[..., 2:, 1:-1], down[..., :-2, 1:-1]
        return self.mix(rearrange(list(shifted), "n b d h w -> b (h w) (n d)"))


@register("solver", "ralston")
def ralston() -> RungeKutta:
    """Ralston's second-order method: of those with two stages, the one with the smallest error bound."""
    return RungeKutta(order=2, nodes=(0.0, 2 / 3), matrix=((2 / 3,),), weights=(1 / 4, 3 / 4))
