"""Selective scan on a CPU: a fused, vectorised C kernel with its own backward, run on torch's threads."""

import torch
from torch import Tensor

from ssmgen.ops import cpu_library
from ssmgen.ops.backend import FLOATS_UP_TO_32
from ssmgen.ops.operator import dense_rows
from ssmgen.ops.scan.fused import define_scan, run_scan
from ssmgen.ops.scan.inputs import SEQUENCES, ScanInputs

name, takes_order = "cpu", True
devices: tuple[str, ...] | None = ("cpu",)
dtypes = FLOATS_UP_TO_32
auto_for: tuple[str, ...] | None = ("cpu",)
_CHUNK, _TILE = 8, 128  # csrc/cpu_kernels.c
unavailable, describe = cpu_library.unavailable, cpu_library.describe
_Args = cpu_library.structure(
    "scan_args",
    "batch length dim n softplus bf16 "
    "u_batch u_step delta_batch delta_step B_batch B_step C_batch C_step z_batch z_step order_batch",
    "u delta A B C D z delta_bias initial_state order y last saved dy dlast du ddelta dA dB dC dD dz dbias dinitial",
)


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """SISMA eq. 5 for float32 and 16-bit inputs, the gate included: y ``(batch, length, dim)`` and the last state.

    bfloat16 is read and written as it is, float16 by way of float32; the state is always float32. Results repeat to the
    bit for any number of threads: every sum has a fixed order.

    Raises:
        ValueError: ``order`` is no permutation.
    """
    wide = torch.bfloat16 if inputs.u.dtype == torch.bfloat16 else torch.float32
    widened = inputs.apply(lambda x: x.to(wide), "u", "delta", "z").apply(Tensor.float, "B", "C")
    y, last = run_scan("cpu_scan", widened)
    return y.to(inputs.u.dtype), last


def _run(inputs: ScanInputs, kernel: str, **buffers: Tensor) -> None:
    # Only the last dimension must be dense: expanded conditions and slices of a projection are not copied.
    given = {name: x for name, x in inputs._asdict().items() if isinstance(x, Tensor)}
    given = {name: dense_rows(x) if name in SEQUENCES else x.contiguous() for name, x in given.items()}
    (batch, length, dim), order = inputs.u.shape, given.get("order")
    args = _Args(batch=batch, length=length, dim=dim, n=inputs.A.shape[1], softplus=inputs.softplus)
    args.bf16 = inputs.u.dtype == torch.bfloat16
    cpu_library.set_strides(args, {name: given[name] for name in SEQUENCES if name in given})
    if order is not None:
        if not all(map(cpu_library.is_permutation, order.view(-1, length))):
            raise ValueError(f"order must hold each of 0..{length - 1} once: make it with ssmgen.ops.scan_order")
        args.order_batch = length if order.dim() == 2 else 0
    cpu_library.run(kernel, args, given | buffers)


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
