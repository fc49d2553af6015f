"""SISMA with attention in the place of its two Mamba layers, to measure what these buy."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ssmgen.models.conditioned import MaskConditioned
from ssmgen.nn import (
    AdaLNZero,
    AttentionCondition,
    CrossAttention,
    FeedForward,
    Modulation,
    PositionEmbedding,
    SelfAttention,
)
from ssmgen.registry import register


class SISMAAttentionBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after its own AdaLN and behind its own gate.

    The mask tokens get their positions: a scan knows where a label is, attention has to be told.

    Args:
        dim: width.
        num_heads: of both attentions.
        ffn_ratio: inner width of the feed-forward.
        gates: gate the residuals (AdaLN-Zero).
    """

    def __init__(self, dim: int, num_heads: int, ffn_ratio: float = 4.0, gates: bool = True) -> None:
        super().__init__()
        self.adaln = AdaLNZero(dim, sublayers=3, gates=gates)
        self.self_attention = SelfAttention(dim, num_heads)
        self.position = PositionEmbedding(dim)
        self.cross_attention = CrossAttention(dim, num_heads)
        self.ffn = FeedForward(dim, ffn_ratio)

    def condition(self, tokens: Tensor, size: tuple[int, int]) -> AttentionCondition:
        """Keys and values of the mask tokens."""
        return self.cross_attention.condition(self.position(tokens, size), size)

    def forward(
        self, x: Tensor, modulations: list[Modulation], conds: list[AttentionCondition], size: tuple[int, int]
    ) -> Tensor:
        """As `ssmgen.models.MaskConditioned` calls it."""
        first, second, third = modulations
        x = first.residual(x, self.self_attention(first.norm(x), size))
        x = second.residual(x, self.cross_attention(second.norm(x), conds, size))
        return third.residual(x, self.ffn(third.norm(x)))


@register("model", "sisma-attn-debug", dim=32, depth=2, num_heads=2, in_channels=3, mask_scale=1)
@register("model", "sisma-attn-s", dim=384, depth=12, num_heads=6)
@register("model", "sisma-attn-b", dim=768, depth=12, num_heads=12)
@register("model", "sisma-attn-l", dim=768, depth=24, num_heads=12)
@register("model", "sisma-attn-xl", dim=1024, depth=24, num_heads=16)
class SISMAAttention(MaskConditioned):
    """SISMA's widths, embeddings, head and conditioning, with attention for its mixers.

    At equal width it has fewer parameters; ``ffn_ratio=7.365`` gives its blocks those of SISMA's within 0.1 %.

    Args:
        dim: width of the tokens.
        depth: number of blocks.
        num_heads: heads of every attention.
        ffn_ratio: inner width of the feed-forwards.
        gates: AdaLN-Zero gates on the residuals.
        **settings: those of `MaskConditioned`.
    """

    def __init__(
        self, *, dim: int, depth: int, num_heads: int, ffn_ratio: float = 4.0, gates: bool = True, **settings: Any
    ) -> None:
        super().__init__(
            lambda i: SISMAAttentionBlock(dim, num_heads, ffn_ratio, gates), dim=dim, depth=depth, **settings
        )
