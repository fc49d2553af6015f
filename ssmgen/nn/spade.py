"""SPADE: a group norm whose scale and shift are maps made from a semantic mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def condition(self, mask: Tensor, size: tuple[int, int]) -> SPADECondition:
        """Maps of ``size`` (height, width) from a one-hot mask ``(b, num_classes, h, w)``, resized by nearest."""
        small = F.interpolate(mask, size, mode="nearest")
        return SPADECondition(*self.maps(F.relu(self.shared(small))).chunk(2, dim=1))

    def forward(self, x: Tensor, cond: Tensor | SPADECondition | list[SPADECondition]) -> Tensor:
        """Normalise ``(b, channels, h, w)``.

        Args:
            x: the feature map.
            cond: a one-hot mask, or what `condition` made of one. One of batch 1 serves every item of the batch;
                several in a list serve as many equal parts of it.
        """
        if isinstance(cond, Tensor):
            cond = self.condition(cond, (x.shape[2], x.shape[3]))
        conds = [cond] if isinstance(cond, SPADECondition) else cond
        parts = self.norm(x).chunk(len(conds))
        return torch.cat([part * (1 + own.scale) + own.shift for part, own in zip(parts, conds, strict=True)])
