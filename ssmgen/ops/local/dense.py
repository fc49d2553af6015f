"""`sum_rows` as one dense product: a GPU multiplies matrices far faster than it gathers rows.

Each row of the first matrix has a one for each place of a token. It is made for a block of tokens at a time, forward
and again in backward, where it multiplies from the left: blocks are added in their order, and results repeat to the
bit wherever torch's products do. How these round float32 is torch's setting of its matrix products.
"""

import torch
from torch import Tensor

from ssmgen.ops.backend import FLOATS_UP_TO_32, full_precision
from ssmgen.ops.operator import define

name = "dense"
devices: tuple[str, ...] | None = None
dtypes = FLOATS_UP_TO_32
auto_for: tuple[str, ...] | None = ("cuda",)
#: Elements of a block's matrix: 128 MiB in float32, with a byte more for each while it is made.
_LARGEST = 2**25


def unavailable() -> str | None:
    return None  # PyTorch runs everywhere


def describe() -> str:
    return "a one-hot matrix times the table, any device"


def _blocks(tokens: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    """Rows or gradients of the tokens of each block."""
    return tokens.split(max(1, _LARGEST // len(table)))


def _one_hot(rows: Tensor, table: Tensor, classes: int) -> Tensor:
    """``(tokens, places * classes)`` in the table's dtype."""
    known = torch.arange(len(table), device=rows.device).view(-1, classes)
    return (rows.unsqueeze(2) == known).flatten(1).to(table.dtype)


def _sum_rows(table: Tensor, rows: Tensor, classes: int) -> Tensor:
    with full_precision(table.device.type):
        return torch.cat([_one_hot(block, table, classes) @ table for block in _blocks(rows, table)])


def _sum_rows_backward(dout: Tensor, table: Tensor, rows: Tensor, classes: int) -> Tensor:
    total = table.new_zeros(table.shape, dtype=torch.float32)
    with full_precision(table.device.type):
        for block, up in zip(_blocks(rows, table), _blocks(dout, table), strict=True):
            total += _one_hot(block, table, classes).t() @ up
    return total.to(table.dtype)


define(
    *("dense_sum_rows", "Tensor table, Tensor rows, int classes", _sum_rows, _sum_rows_backward),
    *(lambda table, rows, _: table.new_empty(len(rows), table.shape[1]), (0,)),
    dispatch_key="CompositeExplicitAutograd",
)
