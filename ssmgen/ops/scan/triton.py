"""Selective scan on a GPU in Triton: states in registers, chunks of the length in parallel, its own backward.

A program holds the states of a few channels of one image and walks over its chunk of the length; nothing of size
(batch, length, dim, d_state) is ever written. Where batch x channels alone would leave most of the chip idle, the
length is cut in chunks: the product of the decays over a chunk is exp(A sum(delta)), so a first pass needs only each
chunk's own end state and its sum of step sizes, a small pass chains them, and the last pass starts every chunk from
where the one before it ends. Backward does the same from the end, and rebuilds the states of eight steps at a time from
what forward saved. Sums over channels are partial sums per program, added in a fixed order: results repeat to the bit.
"""

import importlib.metadata
import importlib.util
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmgen.ops.backend import FLOATS_UP_TO_32
from ssmgen.ops.operator import dense_rows
from ssmgen.ops.scan.fused import define_scan, run_scan
from ssmgen.ops.scan.inputs import ScanInputs

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs its kernels in Python, for tests
name, takes_order = "triton", True
devices: tuple[str, ...] | None = None if _INTERPRETED else ("cuda",)
dtypes = FLOATS_UP_TO_32
auto_for: tuple[str, ...] | None = ("cuda",)
# Looked up once, since Dynamo of torch 2.11 refuses to trace the look-up.
_INSTALLED = importlib.util.find_spec("triton") is not None
# Steps that are loaded together, and whose states backward rebuilds together.
_STEPS = 8
# Channels and warps of a program. Backward holds nine sets of states: more of them per thread would not fit into the
# registers (as ptxas reports for sm_90; not timed on a GPU).
_CHANNELS, _WARPS = 32, 1
_BACKWARD_CHANNELS, _BACKWARD_WARPS = 16, 2
# Programs (of one warp) that fill a chip: some eight for each of 132 multiprocessors.
_ENOUGH_PROGRAMS = 1024


def unavailable() -> str | None:
    if not _INSTALLED:
        return "triton is not installed: pip install triton (it comes with PyTorch's CUDA builds)"
    if not (torch.cuda.is_available() or _INTERPRETED):
        return "Triton's kernels need a CUDA device and none is visible (TRITON_INTERPRET=1 runs them on a CPU, slowly)"
    return None


def describe() -> str:
    return f"fused Triton {importlib.metadata.version('triton')} kernel" + (", interpreted" if _INTERPRETED else "")


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """SISMA eq. 5 for float32 and 16-bit inputs: y ``(batch, length, dim)`` and the state; autograd for the gate."""
    y, last = run_scan("triton_scan", inputs._replace(z=None))
    return (y if inputs.z is None else (y.float() * F.silu(inputs.z.float())).to(y.dtype)), last


def _kernels() -> Any:
    from ssmgen.ops.scan import triton_kernels

    return triton_kernels


class _Plan:
    """How a call is divided among programs, and the arguments that all its kernels share."""

    def __init__(self, inputs: ScanInputs, channels: int, warps: int) -> None:
        inputs = inputs.apply(dense_rows, "u", "delta", "B", "C")
        inputs = inputs.apply(Tensor.contiguous, "A", "D", "delta_bias", "initial_state", "order")
        self.u, self.delta, self.A, self.B, self.C, self.D, _, self.bias, self.initial, self.order, softplus = inputs
        self.batch, self.length, self.dim = self.u.shape
        self.order_batch = self.length if self.order is not None and self.order.dim() == 2 else 0
        self.n = self.A.shape[1]
        self.blocks = -(-self.dim // channels)
        self.groups = -(-self.length // _STEPS)
        wanted = max(1, min(_ENOUGH_PROGRAMS // (self.batch * self.blocks), self.groups // 4))
        self.chunk_length = -(-self.groups // wanted) * _STEPS
        self.chunks = -(-self.length // self.chunk_length)
        self.grid = self.blocks, self.chunks, self.batch
        self.flags: dict[str, Any] = {
            "SOFTPLUS": softplus,
            "HAS_BIAS": self.bias is not None,
            "HAS_ORDER": self.order is not None,
            "CHANNELS": channels,
            "STATES": max(2, 1 << (self.n - 1).bit_length()),
            "num_warps": warps,
        }
        self.strides = [stride for x in (self.u, self.delta, self.B, self.C) for stride in x.stride()[:2]]
        self.layout = (*self.strides, self.order_batch, self.length, self.dim, self.n, self.chunk_length, self.groups)

    def states(self, *count: int) -> Tensor:
        """An uninitialised float32 tensor of states, ``(batch, *count, dim, n)``."""
        return self.A.new_empty(self.batch, *count, self.dim, self.n)

    def chain(self, first: Tensor | None, end: Tensor, total: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        """Where each chunk starts, and what comes out after the last."""
        start, last = self.states(self.chunks), self.states()
        _kernels().chain_kernel[(self.blocks, self.batch)](
            *(self.A, first, end, total, start, last, self.dim, self.n, self.chunks),
            HAS_FIRST=first is not None,
            REVERSE=reverse,
            CHANNELS=self.flags["CHANNELS"],
            STATES=self.flags["STATES"],
            num_warps=1,
        )
        return start, last


def _saved_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """The states before every group of steps."""
    return u.shape[0], -(-u.shape[1] // _STEPS), *A.shape


def _forward(inputs: ScanInputs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    plan = _Plan(inputs, _CHANNELS, _WARPS)
    y = plan.u.new_empty(plan.u.shape)
    saved = plan.states(plan.groups) if save else plan.A.new_empty(0)
    end, total = plan.states(plan.chunks), plan.A.new_empty(plan.batch, plan.chunks, plan.dim)

    def walk(start: Tensor | None, output: bool) -> None:
        _kernels().forward_kernel[plan.grid](
            *(plan.u, plan.delta, plan.A, plan.B, plan.C, plan.D, plan.bias, plan.order, start, y, end, total, saved),
            *plan.layout,
            HAS_D=plan.D is not None,
            HAS_START=start is not None,
            OUTPUT=output,
            SAVE=save and output,
            STEPS=_STEPS,
            **plan.flags,
        )

    if plan.chunks == 1:
        walk(None if plan.initial is None else plan.initial.unsqueeze(1), True)
        return y, end.squeeze(1), saved
    walk(None, False)
    start, last = plan.chain(plan.initial, end, total, reverse=False)
    walk(start, True)
    return y, last, saved


def _backward(dy: Tensor, dlast: Tensor, saved: Tensor, inputs: ScanInputs) -> tuple[Tensor | None, ...]:
    plan = _Plan(inputs, _BACKWARD_CHANNELS, _BACKWARD_WARPS)
    dy, dlast = dy.contiguous(), dlast.contiguous()
    start = dlast.unsqueeze(1)
    if plan.chunks > 1:
        end, total = plan.states(plan.chunks), plan.A.new_empty(plan.batch, plan.chunks, plan.dim)
        _kernels().gradient_kernel[plan.grid](
            *(plan.delta, plan.A, plan.C, plan.bias, plan.order, dy, end, total),
            *(*plan.strides[2:4], *plan.strides[6:8], plan.order_batch),
            *(plan.length, plan.dim, plan.n, plan.chunk_length),
            **plan.flags,
        )
        start, _ = plan.chain(dlast, end, total, reverse=True)
    du, ddelta = (x.new_empty(x.shape) for x in (plan.u, plan.delta))
    dA, dinitial = plan.states(plan.chunks), plan.states()
    dB, dC = (plan.A.new_empty(plan.batch, plan.blocks, plan.length, plan.n) for _ in range(2))
    dD, dbias = (plan.A.new_empty(plan.batch, plan.chunks, plan.dim) for _ in range(2))
    _kernels().backward_kernel[plan.grid](
        *(plan.u, plan.delta, plan.A, plan.B, plan.C, plan.D, plan.bias, plan.order, dy, saved, start),
        *(du, ddelta, dA, dB, dC, dD, dbias, dinitial),
        *plan.layout,
        HAS_D=plan.D is not None,
        STEPS=_STEPS,
        **plan.flags,
    )
    maps = (sums.sum(1).to(plan.B.dtype) for sums in (dB, dC))
    return du, ddelta, dA.sum((0, 1)), *maps, dD.sum((0, 1)), None, dbias.sum((0, 1)), dinitial


define_scan("triton_scan", name, _forward, _backward, _saved_shape, "CompositeExplicitAutograd")
