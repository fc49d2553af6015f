"""SISMA with its Cross-Mamba replaced, composed of the library's blocks. Importing registers the models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ssmgen import register
from ssmgen.models import MaskConditioned
from ssmgen.nn import (
    SPADE,
    AdaLNZero,
    CrossAttention,
    FeedForward,
    Modulation,
    PositionEmbedding,
    SelfMamba,
    SPADECondition,
)
from ssmgen.ops import SCAN_ORDERS


class SecondSelfMamba(nn.Module):
    """Nothing of the mask: it enters at the input alone (``mask_input=add``)."""

    def __init__(self, dim: int, order: str) -> None:
        super().__init__()
        self.mamba = SelfMamba(dim, order=order)

    def condition(self, tokens: Tensor, size: tuple[int, int]) -> None:
        """The mask is not looked at."""

    def forward(self, x: Tensor, conds: list[Any], size: tuple[int, int]) -> Tensor:
        """Self-Mamba of ``(b, l, d)``."""
        return self.mamba(x, size)


class Concatenated(SecondSelfMamba):
    """Self-Mamba of the mask tokens beside the image tokens, joined by a linear map."""

    def __init__(self, dim: int, order: str) -> None:
        super().__init__(dim, order)
        self.join = nn.Linear(2 * dim, dim)

    def condition(self, tokens: Tensor, size: tuple[int, int]) -> Any:
        """The mask tokens as they are."""
        return tokens

    def forward(self, x: Tensor, conds: list[Any], size: tuple[int, int]) -> Tensor:
        """Self-Mamba of ``join([x, e])``."""
        tokens = [own.expand(len(part), -1, -1) for part, own in zip(x.chunk(len(conds)), conds, strict=True)]
        return self.mamba(self.join(torch.cat([x, torch.cat(tokens)], dim=-1)), size)


class Normalised(SecondSelfMamba):
    """Self-Mamba after a SPADE whose maps come from the mask tokens."""

    def __init__(self, dim: int, order: str) -> None:
        super().__init__(dim, order)
        self.spade = SPADE(dim, dim, hidden=dim // 6)

    def condition(self, tokens: Tensor, size: tuple[int, int]) -> SPADECondition:
        """SPADE's scale and shift."""
        return self.spade.condition(rearrange(tokens, "b (h w) d -> b d h w", h=size[0]), size)

    def forward(self, x: Tensor, conds: list[Any], size: tuple[int, int]) -> Tensor:
        """Self-Mamba of ``SPADE(x, e)``."""
        normed = self.spade(rearrange(x, "b (h w) d -> b d h w", h=size[0]), conds)
        return self.mamba(rearrange(normed, "b d h w -> b (h w) d"), size)


class Attended(nn.Module):
    """Cross-attention to the mask tokens, which get their positions as in `ssmgen.models.SISMAAttentionBlock`."""

    def __init__(self, dim: int, order: str) -> None:
        super().__init__()
        self.position = PositionEmbedding(dim)
        self.attention = CrossAttention(dim, num_heads=dim // 16)

    def condition(self, tokens: Tensor, size: tuple[int, int]) -> Any:
        """Keys and values."""
        return self.attention.condition(self.position(tokens, size), size)

    def forward(self, x: Tensor, conds: list[Any], size: tuple[int, int]) -> Tensor:
        """Attention from ``(b, l, d)`` to the mask tokens."""
        return self.attention(x, conds, size)


class VariantBlock(nn.Module):
    """`ssmgen.models.sisma.SISMABlock` with another second layer."""

    def __init__(self, dim: int, order: str, second: nn.Module, ffn_ratio: float, gates: bool) -> None:
        super().__init__()
        self.adaln = AdaLNZero(dim, sublayers=3, gates=gates)
        self.self_mamba = SelfMamba(dim, order=order)
        self.second: Any = second
        self.ffn = FeedForward(dim, ffn_ratio)

    def condition(self, tokens: Tensor, size: tuple[int, int]) -> Any:
        """What the second layer derives from the mask tokens."""
        return self.second.condition(tokens, size)

    def forward(self, x: Tensor, modulations: list[Modulation], conds: list[Any], size: tuple[int, int]) -> Tensor:
        """As `ssmgen.models.MaskConditioned` calls it."""
        first, second, third = modulations
        x = first.residual(x, self.self_mamba(first.norm(x), size))
        x = second.residual(x, self.second(second.norm(x), conds, size))
        return third.residual(x, self.ffn(third.norm(x)))


SECOND: dict[str, Callable[[int, str], nn.Module]] = {
    "none": SecondSelfMamba,
    "concat": Concatenated,
    "spade": Normalised,
    "cross-attention": Attended,
}


@register("model", "sisma-variant")
class SISMAVariant(MaskConditioned):
    """SISMA with ``second`` in the place of its Cross-Mamba: none, concat, spade or cross-attention."""

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        second: str,
        ffn_ratio: float = 4.0,
        orders: Sequence[str] = SCAN_ORDERS,
        gates: bool = True,
        **settings: Any,
    ) -> None:
        def block(i: int) -> nn.Module:
            order = orders[i % len(orders)]
            return VariantBlock(dim, order, SECOND[second](dim, order), ffn_ratio, gates)

        super().__init__(block, dim=dim, depth=depth, **settings)
