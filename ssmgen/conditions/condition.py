"""What all conditions share: the null, and dropout in training."""

import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssmgen.nn.signal import Signal
from ssmgen.registry import check_keywords
from ssmgen.values import Value, as_value, batch_of_value, mapped


def check_positive(**counts: int) -> None:
    """Reject counts and sizes below 1, by a `ValueError` that names them."""
    for name, count in counts.items():
        if not isinstance(count, numbers.Integral) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} must be a positive whole number, got {count!r}")


class Condition(nn.Module, ABC):
    """A named input of a model besides image and time.

    Args:
        dropout: probability in [0, 1) with which training replaces an item by the null, for guidance.

    Attributes:
        gives: the fields of its signals that are not None: ``"tokens"``, ``"vector"``.
        takes: what users have for it, which `ssmgen.pipeline` makes a value of: ``"text"``, ``"picture"``, ``"map"``,
            ``"label"`` or the ``"value"`` itself.
        fields: names of the tensors of a value, the main one first; empty if a value is one tensor.
        added_fields: names of tensors that the model adds to a value, which callers of the model cannot give.
        needs_reader: whether its tokens say what its vector does not, so that a model must have them read or added.
        token_width: width of its tokens where that is not its ``dim``, else None.
        on_grid: whether its tokens lie on the image's token grid.
        share: (rank, processes) if the values are every ``processes``-th item of a batch, from the ``rank``-th on.
            Dropout is then drawn for the whole batch, so that it does not depend on the number of processes.
    """

    gives: ClassVar[tuple[str, ...]] = ("tokens",)
    takes: ClassVar[str] = "value"
    fields: ClassVar[tuple[str, ...]] = ()
    added_fields: ClassVar[tuple[str, ...]] = ()
    needs_reader: ClassVar[bool] = False
    token_width: int | None = None
    on_grid: ClassVar[bool] = True

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"dropout of a condition must be in [0, 1), got {dropout!r}")
        self.dropout = dropout
        self.share = (0, 1)

    def forward(
        self,
        given: Any,
        size: tuple[int, int] | None = None,
        keep: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Signal:
        """What the condition says.

        Args:
            given: one value per item, a tensor or a mapping of tensors by name (`ssmgen.values`); None is the null, of
                batch 1.
            size: (height, width) of the latent, where the value does not tell it.
            keep: ``(batch,)`` bool, False makes an item null; drawn in training where None.
            device: device of the signal; that of the weights if None.
        """
        device = device or next(self.parameters(), torch.empty(0)).device
        if given is None:
            return self.signal(self.null(size, device), size, torch.zeros(1, dtype=torch.bool, device=device))
        value = self._by_name(given, (*self.fields, *self.added_fields))
        keep = self.drawn(value, device) if keep is None else keep
        return self.signal(mapped(lambda each: each.to(device), value), size, keep)

    def drawn(self, value: Value, device: torch.device) -> Tensor | None:
        """Which items of a value dropout keeps, ``(batch,)`` bool; None for all, as outside of training."""
        if not (self.training and self.dropout):
            return None
        rank, processes = self.share
        return torch.rand(batch_of_value(value) * processes, device=device)[rank::processes] >= self.dropout

    def value_of(self, given: Any) -> Value:
        """What is given as tensors, by name if the condition has several `fields`; a single tensor is the first one.

        Raises:
            TypeError: a mapping where one tensor is expected, or with a name that is not a field.
            ValueError: tensors of different batches.
        """
        return self._by_name(given, self.fields)

    def _by_name(self, given: Any, fields: Sequence[str]) -> Value:
        value = as_value(given)
        if isinstance(value, Tensor):
            return {fields[0]: value} if fields else value
        if not fields:
            raise TypeError(f"the value is one tensor, got a mapping of {', '.join(map(repr, value))}")
        check_keywords("the value", value, fields)
        return value

    def size_of(self, given: Any) -> tuple[int, int] | None:
        """(height, width) of the latent that a value of `value_of` belongs to; None where it does not tell."""
        return None

    def check(self, given: Value) -> None:
        """Check the values of `value_of` as far as they need no size; `signal` does so too.

        A training step calls this before it copies a batch to a GPU, where reading them would wait for the device.

        Raises:
            TypeError, ValueError: see `signal`.
        """

    @abstractmethod
    def null(self, size: tuple[int, int] | None, device: torch.device) -> Any:
        """Any valid value of batch 1; `signal` gets it with ``keep`` False."""

    @abstractmethod
    def signal(self, given: Any, size: tuple[int, int] | None, keep: Tensor | None) -> Signal:
        """Check a value, whose tensors are ``(batch, ...)``, and make a signal of it.

        Items where ``keep`` is False are null. A condition of several tensors takes them as a mapping.

        Raises:
            TypeError, ValueError: a value that does not suit the condition.
        """
