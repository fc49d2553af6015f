"""Regions of a mask that tell one another what they look like: one token for each class, however large the image.

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
        region: of each token, the first of its classes, int64 ``(b, l)``.
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
    ``z = gate(x)``. A scan carries what it saw at one eye along all tokens up to the other; here the two are
    neighbours at every distance. Its cost beside the projections is that of a few dozen tokens. SEAN (arXiv
    1911.12861) has codes by region too, taken from another picture.

    It reads no content of the mask's tokens, so something else has to: add them at the input.

    Args:
        dim: width of the tokens.
        num_classes: classes of the mask. A token that is told no class, as one of the null condition, is of one more.
        num_heads: heads; divides ``dim``. None is heads of width 32, or one where these do not fill ``dim``.
        mirrored: pairs of classes that are one region here, such as a label set's left and right.

    Raises:
        ValueError: heads that do not divide the width, or pairs of other numbers than two different classes.
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
        if self.num_heads < 1 or dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim, got dim={dim}, num_heads={num_heads}")
        self.num_classes = num_classes
        self.region_of = list(range(num_classes + 1))
        for pair in mirrored:
            if len(pair) != 2 or len(set(pair)) != 2 or not set(pair) <= set(range(num_classes)):
                raise ValueError(f"mirrored holds pairs of classes from 0 to {num_classes - 1}, got {pair!r}")
            self.region_of[pair[1]] = self.region_of[pair[0]]
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
        regions = torch.tensor(self.region_of, device=classes.device)[classes]
        inside = F.one_hot(regions, self.num_classes + 1).transpose(1, 2).to(tokens.dtype)
        count = inside.sum(2, keepdim=True)
        return Regions(regions, inside / count.clamp(min=1), rearrange(count > 0, "b k 1 -> b 1 1 k"))

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
