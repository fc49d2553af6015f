"""When a check may read the values of a tensor."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_unread: ContextVar[bool] = ContextVar("unread", default=False)


def readable(tensor: Tensor) -> bool:
    """Whether a check may read the values of a tensor of any shape.

    A tensor on ``meta`` has none, reading them would break a graph that is compiled, and under `unread_values` nobody
    waits for a device.
    """
    return not (tensor.is_meta or torch.compiler.is_compiling() or _unread.get())


@contextmanager
def unread_values() -> Iterator[None]:
    """Let no check read values in this thread: they were checked on the host, and reading waits for the device."""
    token = _unread.set(True)
    try:
        yield
    finally:
        _unread.reset(token)
