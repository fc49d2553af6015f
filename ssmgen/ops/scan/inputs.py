"""What a selective scan reads."""

from collections.abc import Callable
from typing import NamedTuple, Self

from torch import Tensor

from ssmgen.ops.backend import apply_to

#: The inputs that have a row for each token.
SEQUENCES = ("u", "delta", "B", "C", "z")


class ScanInputs(NamedTuple):
    """Everything that a scan reads; shapes and dtypes as `ssmgen.ops.selective_scan` documents them.

    Attributes:
        order: the token of each step, int64, ``(length,)`` or ``(batch, length)``; None is 0, 1, 2, ...
        softplus: pass ``delta`` through softplus after the bias.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    delta_bias: Tensor | None = None
    initial_state: Tensor | None = None
    order: Tensor | None = None
    softplus: bool = False

    def apply(self, function: Callable[[Tensor], Tensor], *names: str) -> Self:
        """The same with ``function`` applied to each of the named tensors that is given."""
        return apply_to(self, function, *names)
