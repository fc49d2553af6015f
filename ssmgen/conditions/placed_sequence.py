"""A sequence that each class of the mask reads for itself: which words concern the hair is settled before sampling.

Letters: b batch, m vectors of a sequence, k classes, d width.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssmgen.conditions.condition import check_positive
from ssmgen.conditions.placing import Placed
from ssmgen.conditions.token_sequence import TokenSequence
from ssmgen.nn.attention import CrossAttention
from ssmgen.nn.signal import Signal
from ssmgen.registry import register


@register("condition", "placed-sequence")
class PlacedSequence(Placed, TokenSequence):
    """A sequence as one token per image token: every class attends to it, and its code lies where the class does.

    ``code_k = e_k + attention(e_k, sequence)`` with an embedding e_k of each class; a token is the mean of the codes of
    the classes under it, by the mask of the new image, as in `StyleImage`. All of it depends on the conditions alone,
    so it is computed once per image, while cross-attention in the blocks asks the sequence again at every step. Ours,
    after the region-wise codes of SEAN (arXiv 1911.12861).

    Args:
        dim: width of the tokens.
        width: width of the vectors.
        num_classes: classes of the mask.
        placed_by: name of the label map of the model that says where the classes are in the new image. Where that one
            is null, these tokens are too.
        num_heads: heads of the attention; 32 wide ones where None.
        patch_size: side of a token's patch in the latent.
        pooled: see `TokenSequence`.
        dropout: see `Condition`.
    """

    needs_reader: ClassVar[bool] = True
    on_grid: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        width: int,
        num_classes: int,
        *,
        placed_by: str = "mask",
        num_heads: int | None = None,
        patch_size: int = 2,
        pooled: bool = False,
        dropout: float = 0.0,
    ) -> None:
        check_positive(num_classes=num_classes, patch_size=patch_size)
        super().__init__(dim, width, pooled=pooled, dropout=dropout)
        self.classes, self.placed_by, self.patch_size = num_classes, placed_by, patch_size
        self.embedding = nn.Parameter(0.02 * torch.randn(num_classes, dim))
        self.attention = CrossAttention(dim, _heads(dim) if num_heads is None else num_heads)

    def signal(self, given: Mapping[str, Tensor], size: tuple[int, int] | None, keep: Tensor | None) -> Signal:
        """Tokens ``(b, h w, d)`` on the grid of the new image, and the pooled vector if asked for.

        Args:
            given: ``tokens`` and ``lengths``, and ``target``: the mask of the new image, see `Placed.placed_codes`.
            size: (height, width) of the latent of the new image.
            keep: see `Condition`.

        Raises:
            TypeError, ValueError: see `TokenSequence.signal` and `Placed.placed_codes`.
        """
        grid = self.grid_of(size)
        said = super().signal({name: given[name] for name in given if name != "target"}, size, keep)
        asking = self.embedding.expand(said.batch, -1, -1)
        answers = self.attention(asking, [self.attention.condition(said, (self.classes, 1))], (self.classes, 1))
        codes = asking + answers
        if keep is not None:
            codes = torch.where(keep.view(-1, 1, 1), codes, self.nothing.to(codes.dtype))
        return Signal(self.placed_codes(codes, self.nothing, given.get("target"), grid), grid, said.vector)


def _heads(dim: int) -> int:
    return next(heads for heads in range(max(1, dim // 32), 0, -1) if dim % heads == 0)
