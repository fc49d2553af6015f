"""The convolution of `ssmgen.ops.local.layers` on a GPU in Triton: one kernel forward and one backward.

Tokens are read where they lie, as a slice of wider rows, and the convolution is computed again in backward, so nothing
is saved but the inputs. Forward gives each program a small tile of the grid; backward walks down a strip of columns
and keeps the rows that meet in registers. The sums over tokens of the gradients of weights and bias are partial sums
per program, added in a fixed order: results repeat to the bit. No GPU has been timed: see `docs/performance.md`.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ssmgen.ops.backend import FLOATS_UP_TO_32
from ssmgen.ops.launch import launch
from ssmgen.ops.operator import define, dense_rows, like
from ssmgen.ops.scan import triton as scan_triton

name = "triton"
devices: tuple[str, ...] | None = scan_triton.devices
dtypes = FLOATS_UP_TO_32
auto_for: tuple[str, ...] | None = ("cuda",)
unavailable, describe = scan_triton.unavailable, scan_triton.describe
#: Side of the largest kernel: the rows that meet in backward are kept in registers, which hold no more.
LARGEST_KERNEL = 5
# Programs below which backward cuts the rows of the grid, and the fewest it leaves to one.
_ENOUGH_PROGRAMS, _FEWEST_ROWS = 1024, 8


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """As `ssmgen.ops.conv_silu`: tokens ``(batch, height * width, dim)``, weights ``(dim, 1, k, k)`` of any dtype.

    Raises:
        ValueError: a kernel that is too large.
    """
    if weight.shape[-1] > LARGEST_KERNEL:
        raise ValueError(
            f"backend 'triton' of conv_silu takes kernels up to {LARGEST_KERNEL} x {LARGEST_KERNEL}, got "
            f"{weight.shape[-1]} x {weight.shape[-1]}: use backend='torch'"
        )
    return torch.ops.ssmgen.triton_conv_silu(x, weight, bias, *size)


def _kernels() -> Any:
    from ssmgen.ops.local import triton_kernels

    return triton_kernels


class _Tile(NamedTuple):
    """What a program works on at once: channels, and tokens of the grid."""

    CHANNELS: int
    ROWS: int
    COLUMNS: int

    @classmethod
    def forward(cls, dim: int, k: int) -> Self:
        """ROWS x COLUMNS tokens."""
        return cls(_at_most(128 if k <= 3 else 64, dim), 2, 4)

    @classmethod
    def backward(cls, dim: int, k: int) -> Self:
        """A row of COLUMNS tokens at a time."""
        return cls(*((_at_most(64, dim), 1, 4) if k <= 3 else (_at_most(32, dim), 1, 2)))

    def flags(self, x: Tensor, k: int) -> dict[str, Any]:
        """The constants of a kernel."""
        return {"x_step": x.stride(1), "dim": x.shape[2], "K": k, **self._asdict(), "num_warps": 1}


def _at_most(channels: int, dim: int) -> int:
    return min(channels, max(32, 1 << (dim - 1).bit_length()))


def _forward(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    x, k = dense_rows(x), weight.shape[-1]
    batch, _, dim = x.shape
    tile, out = _Tile.forward(dim, k), x.new_empty(x.shape)
    tiles = -(-height // tile.ROWS) * -(-width // tile.COLUMNS)
    launch(
        *(_kernels().forward_kernel, (-(-dim // tile.CHANNELS), tiles, batch)),
        *(x, weight.contiguous(), bias.contiguous(), out, x.stride(0), height, width),
        **tile.flags(x, k),
    )
    return out


def _rows(height: int, programs: int) -> int:
    """Rows of the grid that a program of backward walks down, where so many ``programs`` would walk down all of it."""
    return min(height, max(_FEWEST_ROWS, height * programs // _ENOUGH_PROGRAMS))


def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    x, k = dense_rows(x), weight.shape[-1]
    batch, _, dim = x.shape
    tile, dx = _Tile.backward(dim, k), x.new_empty(x.shape)
    blocks, across = -(-dim // tile.CHANNELS), -(-width // tile.COLUMNS)
    rows = _rows(height, blocks * across * batch)
    pieces = across * -(-height // rows)
    sums = x.new_empty(batch * pieces, k * k + 1, dim, dtype=torch.float32)
    launch(
        *(_kernels().backward_kernel, (blocks, pieces, batch)),
        *(x, weight.contiguous(), bias.contiguous(), dout.contiguous(), dx, sums, x.stride(0), height, width, rows),
        **tile.flags(x, k),
    )
    dbias, *dweight = sums.sum(0)
    return dx, torch.stack(dweight, 1).view(weight.shape).to(weight.dtype), dbias.to(bias.dtype)


define(
    "triton_conv_silu",
    "Tensor x, Tensor weight, Tensor bias, int height, int width",
    *(_forward, _backward, like(0), (0, 1, 2)),
    dispatch_key="CompositeExplicitAutograd",
)
