"""DiT (arXiv 2212.09748) conditioned on a mask by adding its tokens: the plain attention model of the field."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ssmgen.models.conditioned import MaskConditioned
from ssmgen.nn import AdaLNZero, FeedForward, Modulation, SelfAttention
from ssmgen.registry import register


class DiTBlock(nn.Module):
    """Self-attention and feed-forward, each after its own AdaLN and behind its own gate (DiT, figure 3, adaLN-Zero).

    Args:
        dim: width.
        num_heads: of the attention.
        ffn_ratio: inner width of the feed-forward.
        gates: gate the residuals (AdaLN-Zero).
    """

    def __init__(self, dim: int, num_heads: int, ffn_ratio: float = 4.0, gates: bool = True) -> None:
        super().__init__()
        self.adaln = AdaLNZero(dim, sublayers=2, gates=gates)
        self.self_attention = SelfAttention(dim, num_heads)
        self.ffn = FeedForward(dim, ffn_ratio)

    def condition(self, tokens: Tensor, size: tuple[int, int]) -> None:
        """Nothing: the mask enters at the input alone."""

    def forward(self, x: Tensor, modulations: list[Modulation], conds: list[None], size: tuple[int, int]) -> Tensor:
        """As `ssmgen.models.MaskConditioned` calls it."""
        first, second = modulations
        x = first.residual(x, self.self_attention(first.norm(x), size))
        return second.residual(x, self.ffn(second.norm(x)))


@register("model", "dit-debug", dim=32, depth=2, num_heads=2, in_channels=3, mask_scale=1)
@register("model", "dit-s", dim=384, depth=12, num_heads=6)
@register("model", "dit-b", dim=768, depth=12, num_heads=12)
@register("model", "dit-l", dim=1024, depth=24, num_heads=16)
@register("model", "dit-xl", dim=1152, depth=28, num_heads=16)
class DiT(MaskConditioned):
    """DiT at its published widths; the mask tokens are added to the image tokens.

    Args:
        dim: width of the tokens.
        depth: number of blocks.
        num_heads: heads of every attention.
        ffn_ratio: inner width of the feed-forwards.
        gates: AdaLN-Zero gates on the residuals.
        **settings: those of `MaskConditioned`, save ``mask_input``.
    """

    def __init__(
        self, *, dim: int, depth: int, num_heads: int, ffn_ratio: float = 4.0, gates: bool = True, **settings: Any
    ) -> None:
        settings = {"mask_input": "add"} | settings
        if settings["mask_input"] != "add":
            raise ValueError(f"a DiT sees the mask at its input alone: mask_input={settings['mask_input']!r} hides it")
        super().__init__(lambda i: DiTBlock(dim, num_heads, ffn_ratio, gates), dim=dim, depth=depth, **settings)
