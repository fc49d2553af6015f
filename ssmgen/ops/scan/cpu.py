"""Selective scan on a CPU: a fused, vectorised C kernel with its own backward, run on torch's threads.

Two `torch.library` operators wrap the kernels of `ssmgen.ops.cpu_library`, so that `torch.compile` sees one node each.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ssmgen.ops import cpu_library
from ssmgen.ops.scan.backend import FLOATS_UP_TO_32, ScanInputs
from ssmgen.ops.scan.operator import define_scan, run_scan

name, takes_order = "cpu", True
devices: tuple[str, ...] | None = ("cpu",)
dtypes = FLOATS_UP_TO_32
auto_for: tuple[str, ...] | None = ("cpu",)
_CHUNK = 8
_TILE = 128
_SIZES = ("batch", "length", "dim", "n", "softplus", "bf16")
_STRIDED = ("u", "delta", "z", "B", "C")
_POINTERS = (
    *("order", "u", "delta", "z", "A", "B", "C", "D", "bias", "initial", "y", "last", "saved", "dy", "dlast"),
    *("du", "ddelta", "dz", "dA", "dB", "dC", "dD", "dbias", "dinitial"),
)
unavailable, describe = cpu_library.unavailable, cpu_library.describe


class _Args(ctypes.Structure):
    """``scan_args`` of csrc/cpu_kernels.c."""

    _fields_ = cpu_library.structure(
        (*_SIZES, *(f"{name}_{way}" for name in _STRIDED for way in ("batch", "step")), "order_batch"), _POINTERS
    )


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """SISMA eq. 5 for float32 and 16-bit inputs, the gate included.

    bfloat16 is read and written as it is, float16 by way of float32; the state is always float32. Results repeat to the
    bit for any number of threads: every sum has a fixed order.

    Raises:
        ValueError: ``order`` is no permutation.
    """
    wide = torch.bfloat16 if inputs.u.dtype == torch.bfloat16 else torch.float32
    u, delta, B, C = inputs.u.to(wide), inputs.delta.to(wide), inputs.B.float(), inputs.C.float()
    z = None if inputs.z is None else inputs.z.to(wide)
    y, last = run_scan("cpu_scan", inputs._replace(u=u, delta=delta, B=B, C=C, z=z))
    return y.to(inputs.u.dtype), last


def _run(inputs: ScanInputs, kernel: str, **buffers: Tensor) -> None:
    u, delta, A, B, C, D, z, bias, initial, order, softplus = inputs
    batch, length, dim = u.shape
    # Only the last dimension must be dense: expanded conditions and slices of a projection are not copied.
    given = {"u": u, "delta": delta, "z": z, "B": B, "C": C}
    strided = {name: cpu_library.dense_rows(x) for name, x in given.items() if x is not None}
    optional = {"A": A, "D": D, "bias": bias, "initial": initial, "order": order}
    dense = {name: x.contiguous() for name, x in optional.items() if x is not None}
    bf16 = u.dtype == torch.bfloat16
    args = _Args(batch=batch, length=length, dim=dim, n=A.shape[1], softplus=softplus, bf16=bf16)
    if order is not None:
        if not all(map(cpu_library.is_permutation, dense["order"].view(-1, length))):
            raise ValueError(f"order must hold each of 0..{length - 1} once: make it with ssmgen.ops.scan_order")
        args.order_batch = length if order.dim() == 2 else 0
    for name, x in strided.items():
        setattr(args, f"{name}_batch", x.stride(0))
        setattr(args, f"{name}_step", x.stride(1))
    cpu_library.run(kernel, args, strided | dense | buffers)


def _saved_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """One state per chunk and vector of channels, in the kernel's own layout."""
    batch, length, dim = u.shape
    return batch, -(-length // _CHUNK), -(-dim // cpu_library.LANES), A.shape[1], cpu_library.LANES


def _forward(inputs: ScanInputs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    u, A = inputs.u, inputs.A
    y, last = u.new_empty(u.shape), A.new_empty(u.shape[0], *A.shape)
    saved = A.new_empty(_saved_shape(u, A) if save else (0,))
    _run(inputs, "scan_forward", y=y, last=last, saved=saved)
    return y, last, saved


def _backward(dy: Tensor, dlast: Tensor, saved: Tensor, inputs: ScanInputs) -> tuple[Tensor, ...]:
    """Partial sums are added in a fixed order."""
    u, A = inputs.u, inputs.A
    batch, length, dim = u.shape
    d_state, tiles = A.shape[1], -(-dim // _TILE)
    gradients = {
        "du": u.new_empty(u.shape),
        "ddelta": u.new_empty(u.shape),
        "dA": A.new_empty(batch, dim, d_state),
        "dB": A.new_empty(batch, tiles, length, d_state),
        "dC": A.new_empty(batch, tiles, length, d_state),
        "dD": A.new_empty(batch, dim),
        "dz": u.new_empty(u.shape if inputs.z is not None else (0,)),
        "dbias": A.new_empty(batch, dim),
        "dinitial": A.new_empty(batch, dim, d_state),
    }
    given = {"dy": dy.contiguous(), "dlast": dlast.contiguous(), "saved": saved}
    _run(inputs, "scan_backward", **given, **gradients)
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = gradients.values()
    return du, ddelta, dA.sum(0), dB.sum(1), dC.sum(1), dD.sum(0), dz, dbias.sum(0), dinitial


define_scan("cpu_scan", name, _forward, _backward, _saved_shape, "CPU")
