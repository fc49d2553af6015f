"""A class for the whole image."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ssmgen.conditions.condition import Condition
from ssmgen.nn.signal import Signal
from ssmgen.ops.readable import readable
from ssmgen.registry import register


@register("condition", "class-label")
class ClassLabel(Condition):
    """One label per image, ``(b,)`` integers, as a vector that joins the time (DiT, arXiv 2212.09748, section 3.2).

    Args:
        dim: width of the vector.
        num_labels: labels; the table has one more row, the null.
        dropout: see `Condition`.
    """

    gives: ClassVar[tuple[str, ...]] = ("vector",)
    takes: ClassVar[str] = "label"

    def __init__(self, dim: int, num_labels: int, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        if num_labels < 1:
            raise ValueError(f"num_labels must be positive, got {num_labels}")
        self.num_labels = num_labels
        self.table = nn.Embedding(num_labels + 1, dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def null(self, size: tuple[int, int] | None, device: torch.device) -> Tensor:
        """Label 0."""
        return torch.zeros(1, dtype=torch.int64, device=device)

    def signal(self, given: Tensor, size: tuple[int, int] | None, keep: Tensor | None) -> Signal:
        """The label's row of the table.

        Raises:
            ValueError: a label out of range, or not one per image.
            TypeError: labels that are not integers.
        """
        self.check(given)
        rows = given.long() if keep is None else torch.where(keep, given.long(), self.num_labels)
        return Signal(vector=self.table(rows))

    def check(self, given: Tensor) -> None:  # type: ignore[override]
        """Reject labels that are not one integer per image, or out of range."""
        if given.dim() != 1 or not len(given):
            raise ValueError(f"labels must be (batch,), one per image, got {tuple(given.shape)}")
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {given.dtype}: use labels.long()")
        if readable(given):
            outside = ((given < 0) | (given >= self.num_labels)).nonzero().flatten().tolist()
            if outside:
                label, item, last = int(given[outside[0]]), outside[0], self.num_labels - 1
                raise ValueError(f"label {label} of item {item} is outside 0..{last}: relabel it, or set num_labels")
