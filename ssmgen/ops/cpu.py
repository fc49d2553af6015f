"""Selective scan on a CPU: a fused kernel in C with its own backward, vector instructions and torch's threads.

The library beside this file is compiled when the package is built and loaded through ctypes; it knows nothing of Python
or torch. Two `torch.library` operators wrap it, so that `torch.compile` sees one node.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch
from torch import Tensor

from ssmgen.ops.fused import Inputs, define_scan, run_scan

#: `selective_scan` need not permute the tokens: this scan reads and writes them in any order.
TAKES_ORDER = True
_CHUNK = 8
_TILE = 128
_SIZES = ("batch", "length", "dim", "n", "softplus", "bf16")
_STRIDES = ("u_batch", "u_step", "delta_batch", "delta_step", "B_batch", "B_step", "C_batch", "C_step")
_POINTERS = (
    *("order", "u", "delta", "A", "B", "C", "D", "bias", "initial", "y", "last", "saved", "dy", "dlast"),
    *("du", "ddelta", "dA", "dB", "dC", "dD", "dbias", "dinitial"),
)


class _Args(ctypes.Structure):
    """``scan_args`` of csrc/cpu_scan.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_SIZES, *_STRIDES)),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


def _load() -> tuple[ctypes.CDLL | None, str | None, int]:
    """The compiled library, why there is none, and how many floats its vectors hold."""
    file = Path(__file__).with_name("_cpu_scan.so")
    if not file.is_file():
        return None, "its library was not compiled: reinstall ssmgen from a wheel, or where there is a C compiler", 1
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        return None, f"{file.name} does not load ({error}): reinstall ssmgen", 1
    library.ssmgen_scan_choose.restype = ctypes.c_int64
    library.ssmgen_scan_choose.argtypes = [ctypes.c_char_p]
    library.ssmgen_scan_chosen.restype = ctypes.c_char_p
    library.ssmgen_is_permutation.restype = ctypes.c_int64
    library.ssmgen_is_permutation.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.ssmgen_scan_run.restype = ctypes.c_int64
    library.ssmgen_scan_run.argtypes = [ctypes.POINTER(_Args), ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    forced = os.environ.get("SSMGEN_CPU_ISA")
    lanes = library.ssmgen_scan_choose(forced.encode() if forced else None)
    if not lanes:
        return None, f"SSMGEN_CPU_ISA={forced} is not avx512, avx2 or generic, or this processor lacks it", 1
    return library, None, lanes


def _team() -> int | None:
    """Address of the parallel call of the OpenMP runtime that torch has loaded, so that both share its threads."""
    for name in ("libgomp.so.1", None):
        try:
            return ctypes.cast(ctypes.CDLL(name).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError, TypeError):
            continue
    return None


_LIBRARY, _REASON, _LANES = _load()
_TEAM = _team() if _LIBRARY is not None else None


def unavailable() -> str | None:
    """Why this backend cannot run here, or None."""
    return _REASON


def describe() -> str:
    """What runs, for the backend report."""
    assert _LIBRARY is not None
    isa = _LIBRARY.ssmgen_scan_chosen().decode()
    return f"fused C kernel, {isa}, {torch.get_num_threads()} threads" + ("" if _TEAM else " of its own")


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan of `ssmgen.ops.selective_scan` for float32 and 16-bit inputs; the gate is left to autograd.

    bfloat16 is read and written as it is, float16 by way of float32; the state is float32 always. Repeats to the bit,
    for any number of threads: every sum has a fixed order.

    Args:
        order: ``(length,)`` int64, the token of each step; None is 0, 1, 2, ...

    Raises:
        ValueError: ``order`` is no permutation.
    """
    wide = (u, delta) if u.dtype == torch.bfloat16 else (u.float(), delta.float())
    inputs = (*wide, A, B.float(), C.float(), D, delta_bias, initial_state, order)
    y, last = run_scan("cpu_scan", inputs, delta_softplus, z)
    return y.to(u.dtype), last


def _run(inputs: Inputs, softplus: bool, backward: bool, **buffers: Tensor) -> None:
    u, delta, A, B, C, D, bias, initial, order = inputs
    batch, length, dim = u.shape
    # Only the last dimension must be dense: expanded conditions and slices of a projection are not copied.
    strided = {name: _dense_rows(x) for name, x in (("u", u), ("delta", delta), ("B", B), ("C", C))}
    optional = {"A": A, "D": D, "bias": bias, "initial": initial, "order": order}
    dense = {name: x.contiguous() for name, x in optional.items() if x is not None}
    assert _LIBRARY is not None
    if order is not None and not _LIBRARY.ssmgen_is_permutation(dense["order"].data_ptr(), length):
        raise ValueError(f"order must hold each of 0..{length - 1} once: make it with ssmgen.ops.scan_order")
    bf16 = u.dtype == torch.bfloat16
    args = _Args(batch=batch, length=length, dim=dim, n=A.shape[1], softplus=softplus, bf16=bf16)
    for name, x in strided.items():
        setattr(args, f"{name}_batch", x.stride(0))
        setattr(args, f"{name}_step", x.stride(1))
    for name, x in (strided | dense | buffers).items():
        setattr(args, name, x.data_ptr() if x.numel() else None)
    if _LIBRARY.ssmgen_scan_run(ctypes.byref(args), backward, torch.get_num_threads(), _TEAM):
        raise MemoryError("selective_scan: no memory for its working buffers")


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _saved_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """One state per chunk and vector of channels, in the kernel's own layout."""
    batch, length, dim = u.shape
    return batch, -(-length // _CHUNK), -(-dim // _LANES), A.shape[1], _LANES


def _forward(inputs: Inputs, softplus: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    u, A = inputs[0], inputs[2]
    y, last = u.new_empty(u.shape), A.new_empty(u.shape[0], *A.shape)
    saved = A.new_empty(_saved_shape(u, A) if save else (0,))
    _run(inputs, softplus, False, y=y, last=last, saved=saved)
    return y, last, saved


def _backward(dy: Tensor, dlast: Tensor, saved: Tensor, inputs: Inputs, softplus: bool) -> tuple[Tensor, ...]:
    """Partial sums are added in a fixed order."""
    u, A = inputs[0], inputs[2]
    batch, length, dim = u.shape
    d_state, tiles = A.shape[1], -(-dim // _TILE)
    made = {
        "du": u.new_empty(u.shape),
        "ddelta": u.new_empty(u.shape),
        "dA": A.new_empty(batch, dim, d_state),
        "dB": A.new_empty(batch, tiles, length, d_state),
        "dC": A.new_empty(batch, tiles, length, d_state),
        "dD": A.new_empty(batch, dim),
        "dbias": A.new_empty(batch, dim),
        "dinitial": A.new_empty(batch, dim, d_state),
    }
    given = {"dy": dy.contiguous(), "dlast": dlast.contiguous(), "saved": saved}
    _run(inputs, softplus, True, **given, **made)
    du, ddelta, dA, dB, dC, dD, dbias, dinitial = made.values()
    return du, ddelta, dA.sum(0), dB.sum(1), dC.sum(1), dD.sum(0), dbias.sum(0), dinitial


define_scan("cpu_scan", "cpu", _forward, _backward, _saved_shape, "CPU")
