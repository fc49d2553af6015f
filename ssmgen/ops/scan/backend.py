"""What a scan reads, and what a backend must offer to run it."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

#: The dtypes that a sequence may have, and those for which a float32 state is enough.
FLOATS: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLOATS_UP_TO_32: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)

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
        given = {name: getattr(self, name) for name in names}
        changed: dict[str, Any] = {name: function(x) for name, x in given.items() if x is not None}
        return self._replace(**changed)


class Backend(Protocol):
    """An implementation of the scan: a module or an object with these members.

    Attributes:
        name: what `selective_scan` calls it.
        devices: the device types it takes; None for any.
        dtypes: the dtypes of ``u`` it takes.
        auto_for: the device types for which ``backend="auto"`` may choose it; None for any.
        takes_order: whether it reads tokens in any order; if not, `selective_scan` permutes them first.
    """

    name: str
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    auto_for: tuple[str, ...] | None
    takes_order: bool

    def unavailable(self) -> str | None:
        """Why it cannot run in this installation and what to do about it, or None."""

    def describe(self) -> str:
        """What runs, for the report of `ssmgen.ops.backends`."""

    def scan(self, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
        """``y``, of the shape and dtype of ``u``, and the last state ``(batch, dim, d_state)``."""
