"""Selective scan on a CPU: a fused kernel in C with its own backward, vector instructions and torch's threads.

The library beside this file is compiled when the package is built and loaded through ctypes; it knows nothing of Python
or torch. Two `torch.library` operators wrap it, so that `torch.compile` sees one node.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
    save = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (u, delta, A, B, C, D, delta_bias, initial_state)
    )
    wide = (u, delta) if u.dtype == torch.bfloat16 else (u.float(), delta.float())
    inputs = (*wide, A, B.float(), C.float(), D, delta_bias, initial_state)
    y, last, _ = torch.ops.ssmgen.cpu_scan(*inputs, order, delta_softplus, save)
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(u.dtype), last


_Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _run(inputs: _Inputs, softplus: bool, backward: bool, **buffers: Tensor) -> None:
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


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    order: Tensor | None,
    softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, last = u.new_empty(u.shape), A.new_empty(u.shape[0], *A.shape)
    saved = A.new_empty(_saved_shape(u, A) if save else (0,))
    _run((u, delta, A, B, C, D, bias, initial, order), softplus, False, y=y, last=last, saved=saved)
    return y, last, saved


def _fake_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Any,
    bias: Any,
    initial: Any,
    order: Any,
    softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    saved = A.new_empty(_saved_shape(u, A) if save else (0,))
    return u.new_empty(u.shape), A.new_empty(u.shape[0], *A.shape), saved


def _backward(
    dy: Tensor,
    dlast: Tensor,
    saved: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    order: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, ...]:
    """Gradients in the order u, delta, A, B, C, D, bias, initial; partial sums are added in a fixed order."""
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
    _run((u, delta, A, B, C, D, bias, initial, order), softplus, True, **given, **made)
    du, ddelta, dA, dB, dC, dD, dbias, dinitial = made.values()
    return du, ddelta, dA.sum(0), dB.sum(1), dC.sum(1), dD.sum(0), dbias.sum(0), dinitial


def _fake_backward(
    dy: Tensor, dlast: Tensor, saved: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    batch, _, dim = u.shape
    vectors = A.new_empty(dim), A.new_empty(dim)
    made = (x.new_empty(x.shape) for x in (u, delta, A, B, C))
    return *made, *vectors, A.new_empty(batch, *A.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # the saved states would get a gradient of zeros as large as themselves
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *inputs, saved = ctx.saved_tensors
    u, A = inputs[0], inputs[2]
    dy = u.new_zeros(u.shape) if dy is None else dy
    dlast = A.new_zeros(u.shape[0], *A.shape) if dlast is None else dlast
    gradients = torch.ops.ssmgen.cpu_scan_backward(dy, dlast, saved, *inputs, ctx.softplus)
    kept = (None if x is None else gradient for x, gradient in zip(inputs[:-1], gradients, strict=True))
    return *kept, None, None, None  # order, softplus and save have none


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("backend 'cpu' of selective_scan is differentiable once: use backend='reference' for more")


_TENSORS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? bias, Tensor? initial, Tensor? order, "
    "bool softplus"
)
_LIB = torch.library.Library("ssmgen", "FRAGMENT")
_LIB.define(f"cpu_scan({_TENSORS}, bool save) -> (Tensor, Tensor, Tensor)")
_LIB.define(
    f"cpu_scan_backward(Tensor dy, Tensor dlast, Tensor saved, {_TENSORS}) -> ({', '.join(['Tensor'] * 8)})",
)
_LIB.impl("cpu_scan", _forward, "CPU")
_LIB.impl("cpu_scan_backward", _backward, "CPU")
torch.library.register_fake("ssmgen::cpu_scan", _fake_forward, lib=_LIB)
torch.library.register_fake("ssmgen::cpu_scan_backward", _fake_backward, lib=_LIB)
torch.library.register_autograd("ssmgen::cpu_scan_backward", _refuse_second_derivative, lib=_LIB)
torch.library.register_autograd("ssmgen::cpu_scan", _differentiate, setup_context=_setup_context, lib=_LIB)
