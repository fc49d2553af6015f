"""SPADE: a group norm whose scale and shift are maps made from a semantic mask."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssmgen.nn.mamba import tokens_of
from ssmgen.nn.parts import parts_of, states_of
from ssmgen.nn.signal import Signal
from ssmgen.registry import register


class SPADECondition(NamedTuple):
    """Scale and shift maps ``(b, channels, h, w)`` of a `SPADE`: computed once per mask, used at every step."""

    scale: Tensor
    shift: Tensor


@register("block", "spade")
class SPADE(nn.Module):
    """``GroupNorm(x) (1 + scale) + shift`` with both maps from the mask by two 3x3 convolutions (arXiv 1903.07291).

    Args:
        channels: of the feature map.
        num_classes: channels of the one-hot mask.
        hidden: channels between the two convolutions.
        groups: of the norm; divides ``channels``.
    """

    def __init__(self, channels: int, num_classes: int, hidden: int = 128, groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, affine=False)
        self.shared = nn.Conv2d(num_classes, hidden, 3, padding=1)
        self.maps = nn.Conv2d(hidden, 2 * channels, 3, padding=1)

    def condition(self, signal: Signal | Tensor, size: tuple[int, int]) -> SPADECondition:
        """Maps of ``size`` (height, width) from a mask, resized by nearest.

        Args:
            signal: a one-hot mask ``(b, num_classes, h, w)``, or a signal whose tokens are its pixels.
            size: of the feature map.
        """
        mask = signal if isinstance(signal, Tensor) else as_map(signal)
        small = F.interpolate(mask.to(self.shared.weight.dtype), size, mode="nearest")
        return SPADECondition(*self.maps(F.relu(self.shared(small))).chunk(2, dim=1))

    def forward(self, x: Tensor, cond: Tensor | SPADECondition | list[SPADECondition]) -> Tensor:
        """Normalise ``(b, channels, h, w)``.

        Args:
            x: the feature map.
            cond: a one-hot mask, or what `condition` made of one. One of batch 1 serves every item of the batch;
                several in a list serve as many equal parts of it.
        """
        states = states_of(self, cond, (x.shape[2], x.shape[3]))
        return torch.cat([part * (1 + own.scale) + own.shift for own, part in parts_of(states, self.norm(x))])


def as_map(signal: Signal) -> Tensor:
    """The tokens of a signal as a map ``(b, d, h, w)``."""
    if signal.grid is None:
        raise ValueError("this layer needs a condition on the image's grid, got tokens without a grid")
    return rearrange(tokens_of(signal), "b (h w) d -> b d h w", h=signal.grid[0])
