"""Attention between the regions of a mask, each a mean over its tokens: its cost does not grow with the image.

Letters: b batch, l length (= height x width tokens), d dim, k classes and one more, n heads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssmgen.nn.mamba import check_tokens, condition_tokens, states_on_grid
from ssmgen.nn.parts import parts_of
from ssmgen.nn.signal import Signal
from ssmgen.registry import register


class Regions(NamedTuple):
    """What a `RegionAttention` derives from the mask alone: computed once per mask, used at every step.

    Attributes:
        region: of each token, its class, or of a mirrored pair the first class; int64 ``(b, l)``.
        means: ``(b, k, l)``; its product with the tokens is the mean of each region, zero for a class without tokens.
        present: ``(b, 1, 1, k)`` bool, whether a class has tokens.
    """

    region: Tensor
    means: Tensor
    present: Tensor


@register("block", "region-attention")
class RegionAttention(nn.Module):
    """Attention between the regions of a mask: each token gets what its region learns from the others.

    With the class k(i) of each token i and the mean r of the tokens of each class: ``s = attention(r + embedding)``
    over the classes that the mask has (arXiv 1706.03762, eq. 1); output ``out_proj(s[k(i)] SiLU(z_i))``,
    ``z = gate(x)``. A scan carries what it saw at one eye along all tokens up to the other; here the distance between
    them does not matter. Beside the projections, its cost is that of a few dozen tokens. SEAN (arXiv 1911.12861) has
    codes by region too, taken from another picture.

    Of the mask's tokens it reads only the classes, so a model should also add the tokens at the input.

    Args:
        dim: width of the tokens.
        num_classes: classes of the mask. A token that is told no class, as one of the null condition, is of one more.
        num_heads: heads; divides ``dim``. None is heads of width 32, or one where these do not fill ``dim``.
        mirrored: pairs of classes that are one region here, such as a label set's left and right.

    Raises:
        ValueError: no classes, heads that do not divide the width, or ``mirrored`` with something else than pairs of
            classes, or with a class in two pairs.
    """

    #: Whether the condition's tokens must lie on the image's token grid.
    needs_grid = True
    #: Tells the model that the condition's signal must say the class of each token.
    needs_classes = True

    def __init__(
        self, dim: int, num_classes: int, num_heads: int | None = None, mirrored: Sequence[Sequence[int]] = ()
    ) -> None:
        super().__init__()
        self.num_heads = (dim // 32 if dim % 32 == 0 else 1) if num_heads is None else num_heads
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes}")
        if self.num_heads < 1 or dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim, got dim={dim}, num_heads={num_heads}")
        self.num_classes = num_classes
        self.mirrored = _checked_pairs(mirrored, num_classes)
        # About as large as the means of normalised tokens, so that regions are told apart from the start.
        self.embedding = nn.Parameter(torch.randn(num_classes + 1, dim) / 2)
        self.embedding.no_weight_decay = True  # type: ignore[attr-defined]
        self.qkv = nn.Linear(dim, 3 * dim)
        self.gate = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def condition(self, signal: Signal | Tensor, size: tuple[int, int]) -> Regions:
        """Where the regions are, by the classes of the condition's tokens ``(batch, height * width, dim)``.

        Plain tokens have no class: all are one region.
        """
        tokens = condition_tokens(signal, size, self.gate.in_features)
        told = None if isinstance(signal, Tensor) else signal.classes
        classes = tokens.new_full(tokens.shape[:2], self.num_classes, dtype=torch.long) if told is None else told
        for first, second in self.mirrored:
            classes = torch.where(classes == second, first, classes)
        inside = F.one_hot(classes, self.num_classes + 1).transpose(1, 2).to(tokens.dtype)
        count = inside.sum(2, keepdim=True)
        return Regions(classes, inside / count.clamp(min=1), rearrange(count > 0, "b k 1 -> b 1 1 k"))

    def forward(self, x: Tensor, cond: Tensor | Regions | list[Regions], size: tuple[int, int]) -> Tensor:
        """Mix tokens ``(batch, height * width, dim)`` region by region.

        Args:
            x: tokens in row-major order.
            cond: condition tokens of the same shape, or what `condition` made of them. One of batch 1 serves every item
                of the batch; several in a list serve as many equal parts of it.
            size: (height, width) in tokens.

        Raises:
            ValueError: tokens or condition do not fit one another.
        """
        check_tokens(x, size, self.gate.in_features, "x")
        states = states_on_grid(self, x, cond, size)
        learned = [self._exchanged(own, part) for own, part in parts_of(states, x)]
        return self.out_proj(torch.cat(learned) * F.silu(self.gate(x)))

    def _exchanged(self, regions: Regions, x: Tensor) -> Tensor:
        """What the region of each token learned, ``(b, l, d)``."""
        told = regions.means.to(x.dtype) @ x + self.embedding
        q, k, v = rearrange(self.qkv(told), "b k (three n d) -> three b n k d", three=3, n=self.num_heads)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=regions.present)
        mixed = rearrange(mixed, "b n k d -> b k (n d)")
        return mixed.gather(1, regions.region.unsqueeze(2).expand(-1, -1, mixed.shape[2]))


def _checked_pairs(mirrored: Sequence[Sequence[int]], num_classes: int) -> list[tuple[int, int]]:
    known, used = set(range(num_classes)), set[int]()
    for pair in mirrored:
        found = set(pair) if isinstance(pair, Sequence) and len(pair) == 2 else set()
        if len(found) != 2 or not found <= known:
            raise ValueError(f"mirrored holds pairs of classes from 0 to {num_classes - 1}, got {pair!r}")
        if twice := found & used:
            raise ValueError(f"mirrored has the class {min(twice)} in two pairs")
        used |= found
    return [(first, second) for first, second in mirrored]
