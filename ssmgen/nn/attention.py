"""Self- and cross-attention over tokens, what the state-space mixers are measured against.

Letters: b batch, l tokens, d dim, n heads, k width of a head.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssmgen.nn.embed import PositionEmbedding, sincos_position
from ssmgen.nn.mamba import check_tokens, tokens_of, tokens_on_grid
from ssmgen.nn.parts import parts_of, states_of
from ssmgen.nn.signal import Signal
from ssmgen.registry import register


def _check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide dim, got dim={dim}, num_heads={num_heads}")


@register("block", "rotary-attention", rotary=True)
@register("block", "self-attention")
class SelfAttention(nn.Module):
    """Self-attention (Vaswani et al., arXiv 1706.03762, eq. 1), multi-head: ``out_proj(softmax(q k' / sqrt(k)) v)``.

    Args:
        dim: width of the tokens.
        num_heads: heads; divides ``dim``.
        rotary: rotate queries and keys by their positions, see `rotated`; the width of a head must be a multiple of 4.
        qk_norm: normalise queries and keys per head with an RMSNorm (arXiv 2010.04245, 2302.05442), before rotation.

    Raises:
        ValueError: heads that do not divide the width, or are too narrow to rotate.
    """

    def __init__(self, dim: int, num_heads: int, rotary: bool = False, qk_norm: bool = False) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        width = dim // num_heads
        if rotary and width % 4:
            raise ValueError(
                f"rotary positions need heads of a width that is a multiple of 4, got {width}: dim={dim}, "
                f"num_heads={num_heads}"
            )
        self.num_heads, self.rotary = num_heads, rotary
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = (nn.RMSNorm(width, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mix tokens ``(batch, height * width, dim)``; ``size`` is (height, width) in tokens.

        Raises:
            ValueError: the tokens do not fit ``size`` or the layer's width.
        """
        check_tokens(x, size, self.qkv.in_features, "x")
        q, k, v = rearrange(self.qkv(x), "b l (three n k) -> three b n l k", three=3, n=self.num_heads)
        if isinstance(self.q_norm, nn.RMSNorm):  # in the dtype of its weight, whatever autocast made of q and k
            q, k = (norm(part.to(norm.weight.dtype)) for norm, part in ((self.q_norm, q), (self.k_norm, k)))
        if self.rotary:
            q, k = rotated(q, size), rotated(k, size)
        mixed = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.out_proj(rearrange(mixed, "b n l k -> b l (n k)"))


def rotated(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Queries or keys ``(b, n, l, k)`` rotated by their positions, so that ``q k'`` depends on where they lie apart.

    Axial rotary positions: half of the channels are pairs rotated by the row and half by the column (RoFormer, arXiv
    2104.09864, in 2-D as in EVA-02, arXiv 2303.11331), with the frequencies of `sincos_position`. Computed in float32
    or wider.
    """
    row_sin, row_cos, column_sin, column_cos = sincos_position(x.shape[-1], *size, device=x.device).chunk(4, dim=-1)
    a, b, c, d = x.chunk(4, dim=-1)
    rows = a * row_cos - b * row_sin, a * row_sin + b * row_cos
    columns = c * column_cos - d * column_sin, c * column_sin + d * column_cos
    return torch.cat([*rows, *columns], dim=-1)


class AttentionCondition(NamedTuple):
    """Keys and values of a `CrossAttention`, each ``(b, n, l, k)``: computed once per condition, used at every step.

    Attributes:
        valid: ``(b, 1, 1, l)`` bool, False where a token is padding, or None.
    """

    k: Tensor
    v: Tensor
    valid: Tensor | None = None


@register("block", "cross-attention")
class CrossAttention(nn.Module):
    """Multi-head attention (arXiv 1706.03762, section 3.2): queries from content, keys and values from the condition.

    Args:
        dim: width of the tokens of both.
        num_heads: heads; divides ``dim``. None is heads of width 64, or one where these do not fill ``dim``.
        position: add their positions to the condition tokens: a scan knows where a token lies, attention has to be
            told.
    """

    def __init__(self, dim: int, num_heads: int | None = None, position: bool = False) -> None:
        super().__init__()
        num_heads = (dim // 64 if dim % 64 == 0 else 1) if num_heads is None else num_heads
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.position = PositionEmbedding(dim) if position else None
        self.needs_grid = position
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def condition(self, signal: Signal | Tensor, size: tuple[int, int]) -> AttentionCondition:
        """Everything that depends on the condition tokens ``(batch, any length, dim)`` alone.

        With ``position`` they must lie on the grid: ``(batch, height * width, dim)``.
        """
        tokens = tokens_of(signal) if self.position is None else tokens_on_grid(signal)
        valid = None if isinstance(signal, Tensor) else signal.valid
        if tokens.dim() != 3 or tokens.shape[2] != self.q.in_features:
            raise ValueError(f"cond must be (batch, tokens, {self.q.in_features}), got {tuple(tokens.shape)}")
        if self.position is not None:
            check_tokens(tokens, size, self.q.in_features, "cond")
            tokens = self.position(tokens, size)
        k, v = rearrange(self.kv(tokens), "b l (two n k) -> two b n l k", two=2, n=self.num_heads)
        return AttentionCondition(k, v, None if valid is None else valid[:, None, None])

    def forward(
        self, x: Tensor, cond: Tensor | AttentionCondition | list[AttentionCondition], size: tuple[int, int]
    ) -> Tensor:
        """Mix content tokens ``(batch, height * width, dim)`` with a condition.

        Args:
            x: content tokens.
            cond: condition tokens ``(batch, any length, dim)``, or what `condition` made of them. One of batch 1 serves
                every item of the batch; several in a list serve as many equal parts of it.
            size: (height, width) in tokens.

        Raises:
            ValueError: tokens or condition do not fit one another.
        """
        check_tokens(x, size, self.q.in_features, "x")
        q = rearrange(self.q(x), "b l (n k) -> b n l k", n=self.num_heads)
        mixed = [
            F.scaled_dot_product_attention(part, own.k, own.v, attn_mask=own.valid)
            for own, part in parts_of(states_of(self, cond, size), q)
        ]
        return self.out_proj(rearrange(torch.cat(mixed), "b n l k -> b l (n k)"))
