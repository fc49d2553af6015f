"""Shift and scale of every token from a condition on the image's grid, by a map of low rank."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmgen.nn.mamba import check_tokens, condition_tokens, states_on_grid
from ssmgen.nn.parts import parts_of
from ssmgen.nn.signal import Signal
from ssmgen.registry import register


class TokenShift(NamedTuple):
    """Scale and shift ``(b, l, d)`` of a `TokenModulation`: computed once per mask, used at every step."""

    scale: Tensor
    shift: Tensor


@register("block", "token-modulation")
class TokenModulation(nn.Module):
    """``x (1 + scale) + shift`` with both from the condition's token at the same place; at first ``x`` itself.

    ``scale, shift = up(SiLU(down(e)))`` with a narrow layer between. It is the AdaLN of a block told by the place
    beside the time, as SPADE is (arXiv 1903.07291), for tokens and without convolutions. As ``modulate=`` of a model it
    comes before every layer of a block.

    Args:
        dim: width of the tokens.
        rank: width of the narrow layer.

    Raises:
        ValueError: a rank below 1.
    """

    #: Whether the condition's tokens must lie on the image's token grid.
    needs_grid = True

    def __init__(self, dim: int, rank: int = 32) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, 2 * dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def condition(self, signal: Signal | Tensor, size: tuple[int, int]) -> TokenShift:
        """Everything that depends on the condition tokens ``(batch, height * width, dim)`` alone."""
        tokens = condition_tokens(signal, size, self.down.in_features)
        return TokenShift(*self.up(F.silu(self.down(tokens))).chunk(2, dim=-1))

    def forward(self, x: Tensor, cond: Tensor | TokenShift | list[TokenShift], size: tuple[int, int]) -> Tensor:
        """Modulate tokens ``(batch, height * width, dim)``.

        Args:
            x: tokens in row-major order.
            cond: condition tokens of the same shape, or what `condition` made of them. One of batch 1 serves every item
                of the batch; several in a list serve as many equal parts of it.
            size: (height, width) in tokens.

        Raises:
            ValueError: tokens or condition do not fit one another.
        """
        check_tokens(x, size, self.down.in_features, "x")
        states = states_on_grid(self, x, cond, size)
        return torch.cat([(part * (1 + own.scale) + own.shift).to(x.dtype) for own, part in parts_of(states, x)])
