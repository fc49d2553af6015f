"""A sequence of vectors of its own length: features of a text, or of anything else that was encoded beforehand."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssmgen.conditions.condition import Condition
from ssmgen.nn.signal import Signal
from ssmgen.ops.readable import readable
from ssmgen.registry import register


@register("condition", "token-sequence")
class TokenSequence(Condition):
    """Vectors ``(b, m, width)`` as tokens that lie on no grid, such as the features of a frozen text encoder.

    A value is the vectors ``(b, m, width)`` alone, floating point, or ``{"tokens": ..., "lengths": ...}`` with lengths
    ``(b,)`` in 1..m, integers. What lies beyond an item's length is padding: it is not read, so results do not depend
    on what it holds nor on how much of it there is. The null is one learned token.

    Layers that read tokens of another length than the image's are ``cross-attention`` and ``cross-mamba-sequence``.

    Args:
        dim: width of the tokens.
        width: width of the vectors.
        pooled: also give a vector that joins the time: a projection of the mean token. As in `ClassLabel`, it then
            reaches every AdaLN.
        dropout: see `Condition`.
    """

    takes: ClassVar[str] = "text"
    fields: ClassVar[tuple[str, ...]] = ("tokens", "lengths")
    on_grid: ClassVar[bool] = False

    def __init__(self, dim: int, width: int, *, pooled: bool = False, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        if width < 1:
            raise ValueError(f"width must be positive, got {width}")
        self.width = width
        self.proj = nn.Linear(width, dim)
        self.nothing = nn.Parameter(0.02 * torch.randn(dim))
        self.pool = nn.Linear(dim, dim) if pooled else None
        self.gives = ("tokens", "vector") if pooled else ("tokens",)  # type: ignore[misc]

    def null(self, size: tuple[int, int] | None, device: torch.device) -> dict[str, Tensor]:
        """One vector of zeros."""
        return {"tokens": torch.zeros(1, 1, self.width, device=device)}

    def signal(self, given: Mapping[str, Tensor], size: tuple[int, int] | None, keep: Tensor | None) -> Signal:
        """Projected tokens ``(b, m, dim)``, and which of them are valid where lengths were given or an item is null.

        Raises:
            ValueError: another width, a length of 0 or beyond the sequence, or a value that is not finite.
            TypeError: tokens that are not floating point, lengths that are not integers, or no tokens.
        """
        vectors, lengths = self._divided(given)
        valid = None
        if lengths is not None or keep is not None:
            batch, m, _ = vectors.shape
            counts = torch.full((batch,), m, device=vectors.device) if lengths is None else lengths
            counts = counts if keep is None else torch.where(keep, counts, 1)
            valid = torch.arange(m, device=vectors.device) < counts.unsqueeze(1)
            vectors = torch.where(valid.unsqueeze(2), vectors, 0.0)
        tokens = self.proj(vectors.to(self.nothing.dtype))
        if keep is not None:
            tokens = torch.where(keep.view(-1, 1, 1), tokens, self.nothing.to(tokens.dtype))
        return Signal(tokens, vector=self._pooled(tokens, valid), valid=valid)

    def _pooled(self, tokens: Tensor, valid: Tensor | None) -> Tensor | None:
        if self.pool is None:
            return None
        if valid is None:
            return self.pool(tokens.mean(dim=1))
        shares = valid.to(tokens.dtype) / valid.sum(dim=1, keepdim=True)
        return self.pool((tokens * shares.unsqueeze(2).to(tokens.dtype)).sum(dim=1))

    def check(self, given: Mapping[str, Tensor]) -> None:  # type: ignore[override]
        """Reject another width or dtype, wrong lengths, and values that are not finite."""
        self._divided(given)

    def _divided(self, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Vectors and lengths, checked."""
        if "tokens" not in given:
            raise TypeError("a token sequence needs tokens: give {'tokens': ..., 'lengths': ...}")
        vectors, lengths = given["tokens"], given.get("lengths")
        if vectors.dim() != 3 or vectors.shape[2] != self.width or 0 in vectors.shape:
            raise ValueError(
                f"tokens must be (batch, length, {self.width}), got {tuple(vectors.shape)}: the model reads vectors of "
                f"width {self.width}"
            )
        if not vectors.is_floating_point():
            raise TypeError(f"tokens must be floating point, got {vectors.dtype}: give features, not ids")
        if lengths is not None:
            _check_lengths(lengths, vectors)
        if readable(vectors):
            _check_finite(vectors, lengths)
        return vectors, lengths


def _check_lengths(lengths: Tensor, vectors: Tensor) -> None:
    batch, m, _ = vectors.shape
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"lengths must be ({batch},), one per item, got {tuple(lengths.shape)}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if not readable(lengths):
        return
    for item, length in enumerate(lengths.tolist()):
        if length > m:
            raise ValueError(f"padding beyond the sequence: item {item} has length {length} of {m} tokens")
        if length < 1:
            raise ValueError(
                f"item {item} has length {length}: give at least one token, or leave the condition out for its null"
            )


def _check_finite(vectors: Tensor, lengths: Tensor | None) -> None:
    bad = ~vectors.isfinite().all(dim=2)
    if lengths is not None:
        bad = bad & (torch.arange(vectors.shape[1], device=vectors.device) < lengths.unsqueeze(1))
    if bool(bad.any()):
        item, token = bad.nonzero()[0].tolist()
        raise ValueError(f"token {token} of item {item} holds values that are not finite: encode it again")
