"""Modules and tensors on a GPU that is not there: they have shapes and no values."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ssmgen.ops.scan_order import _kept_permutation


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """A mode for fake tensors. The orders that are cached in it are forgotten: they have no values either."""
    _kept_permutation.cache_clear()
    try:
        yield FakeTensorMode()
    finally:
        _kept_permutation.cache_clear()


def on_fake_gpu(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The module with fake weights on ``cuda``: it has shapes and no values."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                each._parameters[name] = nn.Parameter(like(parameter, mode), requires_grad=parameter.requires_grad)
        for name, buffer in each._buffers.items():
            each._buffers[name] = None if buffer is None else like(buffer, mode)
    return module


def like(tensor, mode):
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
