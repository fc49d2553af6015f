"""What an implementation of an operator must offer: what it takes, whether it can run, and for scans a call."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

#: The dtypes that a sequence may have, and those for which a float32 state is enough.
FLOATS: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLOATS_UP_TO_32: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


class Backend(Protocol):
    """An implementation of an operator: a module or an object with these members.

    Attributes:
        name: what ``backend=`` calls it.
        devices: the device types it takes; None for any.
        dtypes: the dtypes it takes.
        auto_for: the device types for which ``backend="auto"`` may choose it; None for any.
    """

    name: str
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    auto_for: tuple[str, ...] | None

    def unavailable(self) -> str | None:
        """Why it cannot run in this installation and what to do about it, or None."""

    def describe(self) -> str:
        """What runs, for the report of `ssmgen.ops.backends`."""


class ScanBackend(Backend, Protocol):
    """A `Backend` of `selective_scan`, `ssd` or `gated_delta_rule`.

    Attributes:
        takes_order: whether it reads tokens in any order; if not, they are permuted first.
    """

    takes_order: bool

    def scan(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """``y`` and the last state, for the inputs of the operator, such as `ScanInputs`."""


@dataclass
class TorchForm:
    """A `ScanBackend` in plain PyTorch, which takes any device and dtype, and runs outside autocast.

    Args:
        name: what ``backend=`` calls it.
        form: from the operator's inputs to ``y`` and the last state.
        detail: what it is, for the report.
        auto_for: as in `Backend`.
    """

    name: str
    form: Callable[[Any], tuple[Tensor, Tensor]]
    detail: str
    auto_for: tuple[str, ...] | None = ()
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATS
    takes_order: bool = False

    def unavailable(self) -> str | None:
        return None  # PyTorch runs everywhere

    def describe(self) -> str:
        return self.detail

    def scan(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """``y (batch, length, heads, width)`` and the last state ``(batch, heads, width, d_state)``."""
        with full_precision(inputs[0].device.type):
            return self.form(inputs)


def full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Disable autocast, which would run the matrix products in 16 bits; some devices have none."""
    try:  # not torch.amp.is_autocast_available: Dynamo of torch 2.11 refuses to trace it
        return torch.autocast(device_type, enabled=False)
    except RuntimeError:
        return nullcontext()


def apply_to(inputs: Any, function: Callable[[Tensor], Tensor], *names: str) -> Any:
    """A named tuple of inputs with ``function`` applied to the named tensors, of any shape; None stays None."""
    given = {name: getattr(inputs, name) for name in names}
    return inputs._replace(**{name: function(x) for name, x in given.items() if x is not None})
