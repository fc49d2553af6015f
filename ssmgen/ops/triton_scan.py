"""Selective scan on a GPU in Triton: state in registers, length cut in chunks that run side by side, own backward.

A program holds the states of a few channels of one image and walks over its chunk of the length; nothing of size
(batch, length, dim, d_state) is ever written. Where batch x channels alone would leave most of the chip idle, the length
is cut in chunks: the product of the decays over a chunk is exp(A sum(delta)), so a first pass needs only each chunk's
own end state and its sum of step sizes, a small pass chains them, and the last pass starts every chunk from where the
one before it ends. Backward does the same from the end, and rebuilds the states of eight steps at a time from what
forward saved. Sums over channels are partial sums per program, added in a fixed order: results repeat to the bit.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssmgen.ops.fused import Inputs, define_scan, run_scan

TAKES_ORDER = True
# Steps that are loaded together, and whose states backward rebuilds together.
_STEPS = 8
# Channels and warps of a program. Backward holds nine sets of states: with more to a thread the registers do not suffice
# (seen in what ptxas says for sm_90; not timed on a GPU).
_CHANNELS, _WARPS = 32, 1
_BACKWARD_CHANNELS, _BACKWARD_WARPS = 16, 2
# Programs (of one warp) that fill a chip: some eight for each of 132 multiprocessors.
_ENOUGH_PROGRAMS = 1024

_AVAILABLE = importlib.util.find_spec("triton") is not None
if TYPE_CHECKING:
    triton: Any = None
    tl: Any = None
elif _AVAILABLE:
    import triton
    import triton.language as tl


def unavailable() -> str | None:
    """Why this backend cannot run here, or None."""
    if not _AVAILABLE:
        return "triton is not installed: pip install triton (it comes with PyTorch's CUDA builds)"
    if not (torch.cuda.is_available() or interpreted()):
        return "Triton's kernels need a CUDA device and none is visible (TRITON_INTERPRET=1 runs them on a CPU, slowly)"
    return None


def describe() -> str:
    """What runs, for the backend report."""
    return f"fused Triton {triton.__version__} kernel" + (", interpreted" if interpreted() else "")


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


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

    Args:
        order: ``(length,)`` int64, the token of each step; None is 0, 1, 2, ...
    """
    inputs = (u, delta, A, B, C, D, delta_bias, initial_state, order)
    return run_scan("triton_scan", inputs, delta_softplus, z)


if _AVAILABLE and not TYPE_CHECKING:

    @triton.jit
    def _step_size(delta, bias, SOFTPLUS: tl.constexpr):
        """Step sizes; log(1 + e) by its series where e is tiny."""
        x = delta + bias
        if SOFTPLUS:
            e = tl.exp(-tl.abs(x))
            x = tl.maximum(x, 0) + tl.where(e < 1e-3, e - e * e * 0.5, tl.log(1 + e))
        return x

    @triton.jit
    def _slope(step, SOFTPLUS: tl.constexpr):
        """Derivative of a step size by what softplus made it of: 1 - exp(-step), by its series where step is tiny."""
        if SOFTPLUS:
            return tl.where(step < 1e-3, step - step * step * 0.5, 1 - tl.exp(-step))
        return step * 0 + 1

    @triton.jit
    def _token(order, k, length, HAS_ORDER: tl.constexpr):
        if HAS_ORDER:
            return tl.load(order + k, mask=length > k, other=0)
        return tl.full([], 0, tl.int64) + k

    @triton.jit
    def _forward_kernel(
        u, delta, A, B, C, D, bias, order, start, y, end, total, saved,
        u_batch, u_step, delta_batch, delta_step, B_batch, B_step, C_batch, C_step,
        length, dim, n, chunk_length, groups,
        SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr,
        HAS_START: tl.constexpr, OUTPUT: tl.constexpr, SAVE: tl.constexpr,
        CHANNELS: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr,
    ):  # fmt: skip
        """One chunk of one image and a few channels: its output, or only its end state and sum of step sizes."""
        chunk, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        chunks = tl.num_programs(1)
        d, i = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
        in_d, in_n = d < dim, i < n
        tile = in_d[:, None] & in_n[None, :]
        at = d[:, None] * n + i[None, :]
        a = tl.load(A + at, mask=tile, other=0.0) * 1.4426950408889634
        skip = tl.load(D + d, mask=in_d, other=0.0) if HAS_D else tl.zeros([CHANNELS], tl.float32)
        shift = tl.load(bias + d, mask=in_d, other=0.0) if HAS_BIAS else tl.zeros([CHANNELS], tl.float32)
        h = tl.zeros([CHANNELS, STATES], tl.float32)
        if HAS_START:
            h = tl.load(start + (batch * chunks + chunk) * dim * n + at, mask=tile, other=0.0)
        passed = tl.zeros([CHANNELS], tl.float32)
        last = tl.minimum((chunk + 1) * chunk_length, length)
        for k0 in range(chunk * chunk_length, last, STEPS):
            if SAVE:
                tl.store(saved + (batch * groups + k0 // STEPS) * dim * n + at, h, mask=tile)
            # All loads of a group of steps first, so that they are under way together.
            xs, steps, Bs, Cs = (), (), (), ()
            for j in tl.static_range(STEPS):
                o = _token(order, k0 + j, length, HAS_ORDER)
                live = d < tl.where(last > k0 + j, dim, 0)
                row = i < tl.where(last > k0 + j, n, 0)
                xs += (tl.load(u + batch * u_batch + o * u_step + d, mask=live, other=0.0).to(tl.float32),)
                raw = tl.load(delta + batch * delta_batch + o * delta_step + d, mask=live, other=0.0).to(tl.float32)
                step = _step_size(raw, shift, SOFTPLUS)
                steps += (tl.where(live, step, 0.0),)
                Bs += (tl.load(B + batch * B_batch + o * B_step + i, mask=row, other=0.0).to(tl.float32),)
                if OUTPUT:
                    Cs += (tl.load(C + batch * C_batch + o * C_step + i, mask=row, other=0.0).to(tl.float32),)
            for j in tl.static_range(STEPS):
                h = tl.exp2(steps[j][:, None] * a) * h + (steps[j] * xs[j])[:, None] * Bs[j][None, :]
                if OUTPUT:
                    o = _token(order, k0 + j, length, HAS_ORDER)
                    out = tl.sum(h * Cs[j][None, :], axis=1) + skip * xs[j]
                    tl.store(y + (batch * length + o) * dim + d, out, mask=d < tl.where(last > k0 + j, dim, 0))
                else:
                    passed += steps[j]
        tl.store(end + (batch * chunks + chunk) * dim * n + at, h, mask=tile)
        if not OUTPUT:
            tl.store(total + (batch * chunks + chunk) * dim + d, passed, mask=in_d)

    @triton.jit
    def _chain_kernel(
        A, first, end, total, start, last, dim, n, chunks,
        HAS_FIRST: tl.constexpr, REVERSE: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
    ):  # fmt: skip
        """Where each chunk starts, from where the chunks end when they start at zero; from the back if REVERSE."""
        batch = tl.program_id(1).to(tl.int64)
        d, i = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
        tile = (d < dim)[:, None] & (i < n)[None, :]
        at = d[:, None] * n + i[None, :]
        a = tl.load(A + at, mask=tile, other=0.0) * 1.4426950408889634
        h = tl.zeros([CHANNELS, STATES], tl.float32)
        if HAS_FIRST:
            h = tl.load(first + batch * dim * n + at, mask=tile, other=0.0)
        for step in range(chunks):
            chunk = chunks - 1 - step if REVERSE else step
            place = batch * chunks + chunk
            tl.store(start + place * dim * n + at, h, mask=tile)
            passed = tl.load(total + place * dim + d, mask=d < dim, other=0.0)
            h = tl.exp2(passed[:, None] * a) * h + tl.load(end + place * dim * n + at, mask=tile, other=0.0)
        tl.store(last + batch * dim * n + at, h, mask=tile)

    @triton.jit
    def _gradient_kernel(
        delta, A, C, bias, order, dy, end, total,
        delta_batch, delta_step, C_batch, C_step, length, dim, n, chunk_length,
        SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr,
        CHANNELS: tl.constexpr, STATES: tl.constexpr,
    ):  # fmt: skip
        """The gradient that a chunk hands to the one before it when it gets none itself, and its sum of step sizes."""
        chunk, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        chunks = tl.num_programs(1)
        d, i = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
        in_d, in_n = d < dim, i < n
        tile = in_d[:, None] & in_n[None, :]
        at = d[:, None] * n + i[None, :]
        a = tl.load(A + at, mask=tile, other=0.0) * 1.4426950408889634
        shift = tl.load(bias + d, mask=in_d, other=0.0) if HAS_BIAS else tl.zeros([CHANNELS], tl.float32)
        g = tl.zeros([CHANNELS, STATES], tl.float32)
        passed = tl.zeros([CHANNELS], tl.float32)
        first = chunk * chunk_length
        last = tl.minimum(first + chunk_length, length)
        for back in range(0, last - first):
            k = last - 1 - back
            o = _token(order, k, length, HAS_ORDER)
            raw = tl.load(delta + batch * delta_batch + o * delta_step + d, mask=in_d, other=0.0).to(tl.float32)
            step = _step_size(raw, shift, SOFTPLUS)
            step = tl.where(in_d, step, 0.0)
            up = tl.load(dy + (batch * length + o) * dim + d, mask=in_d, other=0.0).to(tl.float32)
            c = tl.load(C + batch * C_batch + o * C_step + i, mask=in_n, other=0.0).to(tl.float32)
            g = tl.exp2(step[:, None] * a) * (g + up[:, None] * c[None, :])
            passed += step
        tl.store(end + (batch * chunks + chunk) * dim * n + at, g, mask=tile)
        tl.store(total + (batch * chunks + chunk) * dim + d, passed, mask=in_d)

    @triton.jit
    def _backward_kernel(
        u, delta, A, B, C, D, bias, order, dy, saved, start, du, ddelta, dA, dB, dC, dD, dbias, dinitial,
        u_batch, u_step, delta_batch, delta_step, B_batch, B_step, C_batch, C_step,
        length, dim, n, chunk_length, groups,
        SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr,
        CHANNELS: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr,
    ):  # fmt: skip
        """All gradients of one chunk; those shared by several programs as partial sums."""
        block, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        blocks, chunks = tl.num_programs(0), tl.num_programs(1)
        d, i = block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
        in_d, in_n = d < dim, i < n
        tile = in_d[:, None] & in_n[None, :]
        at = d[:, None] * n + i[None, :]
        a = tl.load(A + at, mask=tile, other=0.0)
        skip = tl.load(D + d, mask=in_d, other=0.0) if HAS_D else tl.zeros([CHANNELS], tl.float32)
        shift = tl.load(bias + d, mask=in_d, other=0.0) if HAS_BIAS else tl.zeros([CHANNELS], tl.float32)
        place = batch * chunks + chunk
        g = tl.load(start + place * dim * n + at, mask=tile, other=0.0)
        sum_A = tl.zeros([CHANNELS, STATES], tl.float32)
        sum_D = tl.zeros([CHANNELS], tl.float32)
        sum_bias = tl.zeros([CHANNELS], tl.float32)
        first = chunk * chunk_length
        last = tl.minimum(first + chunk_length, length)
        rounds = tl.cdiv(last - first, STEPS)
        for back in range(rounds):
            k0 = first + (rounds - 1 - back) * STEPS
            h = tl.load(saved + (batch * groups + k0 // STEPS) * dim * n + at, mask=tile, other=0.0)
            xs, steps, ups, hs = (), (), (), (h,)
            for j in tl.static_range(STEPS):
                o = _token(order, k0 + j, length, HAS_ORDER)
                live = d < tl.where(last > k0 + j, dim, 0)
                xs += (tl.load(u + batch * u_batch + o * u_step + d, mask=live, other=0.0).to(tl.float32),)
                raw = tl.load(delta + batch * delta_batch + o * delta_step + d, mask=live, other=0.0).to(tl.float32)
                step = _step_size(raw, shift, SOFTPLUS)
                steps += (tl.where(live, step, 0.0),)
                ups += (tl.load(dy + (batch * length + o) * dim + d, mask=live, other=0.0).to(tl.float32),)
            for j in tl.static_range(STEPS):
                o = _token(order, k0 + j, length, HAS_ORDER)
                row = i < tl.where(last > k0 + j, n, 0)
                b = tl.load(B + batch * B_batch + o * B_step + i, mask=row, other=0.0).to(tl.float32)
                decay = tl.exp2(steps[j][:, None] * (a * 1.4426950408889634))
                h = decay * h + (steps[j] * xs[j])[:, None] * b[None, :]
                hs += (h,)
            for j in tl.static_range(STEPS - 1, -1, -1):
                o = _token(order, k0 + j, length, HAS_ORDER)
                live = d < tl.where(last > k0 + j, dim, 0)
                row = i < tl.where(last > k0 + j, n, 0)
                b = tl.load(B + batch * B_batch + o * B_step + i, mask=row, other=0.0).to(tl.float32)
                c = tl.load(C + batch * C_batch + o * C_step + i, mask=row, other=0.0).to(tl.float32)
                g += ups[j][:, None] * c[None, :]
                partial = ((batch * blocks + block) * length + o) * n + i
                tl.store(dC + partial, tl.sum(ups[j][:, None] * hs[j + 1], axis=0), mask=row)
                tl.store(dB + partial, tl.sum(g * (steps[j] * xs[j])[:, None], axis=0), mask=row)
                to_input = tl.sum(g * b[None, :], axis=1)
                g = g * tl.exp2(steps[j][:, None] * (a * 1.4426950408889634))
                exponent = g * hs[j]
                d_step = (tl.sum(exponent * a, axis=1) + to_input * xs[j]) * _slope(steps[j], SOFTPLUS)
                sum_A += exponent * steps[j][:, None]
                sum_D += ups[j] * xs[j]
                sum_bias += tl.where(live, d_step, 0.0)
                dense = (batch * length + o) * dim + d
                tl.store(du + dense, to_input * steps[j] + skip * ups[j], mask=live)
                tl.store(ddelta + dense, d_step, mask=live)
        tl.store(dA + place * dim * n + at, sum_A, mask=tile)
        tl.store(dD + place * dim + d, sum_D, mask=in_d)
        tl.store(dbias + place * dim + d, sum_bias, mask=in_d)
        if chunk == 0:
            tl.store(dinitial + batch * dim * n + at, g, mask=tile)


class _Plan:
    """How a call is cut up, and the arguments that all its kernels share."""

    def __init__(self, inputs: Inputs, softplus: bool, channels: int, warps: int) -> None:
        u, delta, A, B, C, D, bias, initial, order = inputs
        self.u, self.delta, self.B, self.C = (_dense_rows(x) for x in (u, delta, B, C))
        self.A, self.D, self.bias, self.initial, self.order = (
            None if x is None else x.contiguous() for x in (A, D, bias, initial, order)
        )
        self.batch, self.length, self.dim = u.shape
        self.n = A.shape[1]
        self.blocks = -(-self.dim // channels)
        self.groups = -(-self.length // _STEPS)
        wanted = max(1, min(_ENOUGH_PROGRAMS // (self.batch * self.blocks), self.groups // 4))
        self.chunk_length = -(-self.groups // wanted) * _STEPS
        self.chunks = -(-self.length // self.chunk_length)
        self.flags = {
            "SOFTPLUS": softplus,
            "HAS_BIAS": bias is not None,
            "HAS_ORDER": order is not None,
            "CHANNELS": channels,
            "STATES": max(2, triton.next_power_of_2(self.n)),
            "num_warps": warps,
        }
        strided = (self.u, self.delta, self.B, self.C)
        self.strides = [stride for x in strided for stride in (x.stride(0), x.stride(1))]

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.blocks, self.chunks, self.batch

    def states(self, *count: int) -> Tensor:
        """An uninitialised float32 tensor of states, ``(batch, *count, dim, n)``."""
        return self.A.new_empty(self.batch, *count, self.dim, self.n)

    def chain(self, first: Tensor | None, end: Tensor, total: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        """Where each chunk starts, and what comes out after the last."""
        start, last = self.states(self.chunks), self.states()
        _chain_kernel[(self.blocks, self.batch)](
            *(self.A, first, end, total, start, last, self.dim, self.n, self.chunks),
            HAS_FIRST=first is not None,
            REVERSE=reverse,
            CHANNELS=self.flags["CHANNELS"],
            STATES=self.flags["STATES"],
            num_warps=1,
        )
        return start, last


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _saved_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """The states before every group of steps."""
    return u.shape[0], -(-u.shape[1] // _STEPS), *A.shape


def _forward(inputs: Inputs, softplus: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    plan = _Plan(inputs, softplus, _CHANNELS, _WARPS)
    y = torch.empty(plan.u.shape, dtype=plan.u.dtype, device=plan.u.device)
    saved = plan.states(plan.groups) if save else plan.A.new_empty(0)
    end, total = plan.states(plan.chunks), plan.A.new_empty(plan.batch, plan.chunks, plan.dim)

    def walk(start: Tensor | None, output: bool) -> None:
        _forward_kernel[plan.grid](
            *(plan.u, plan.delta, plan.A, plan.B, plan.C, plan.D, plan.bias, plan.order, start, y, end, total, saved),
            *plan.strides,
            *(plan.length, plan.dim, plan.n, plan.chunk_length, plan.groups),
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


def _backward(dy: Tensor, dlast: Tensor, saved: Tensor, inputs: Inputs, softplus: bool) -> tuple[Tensor, ...]:
    plan = _Plan(inputs, softplus, _BACKWARD_CHANNELS, _BACKWARD_WARPS)
    dy, dlast = dy.contiguous(), dlast.contiguous()
    start = dlast.unsqueeze(1)
    if plan.chunks > 1:
        end, total = plan.states(plan.chunks), plan.A.new_empty(plan.batch, plan.chunks, plan.dim)
        _gradient_kernel[plan.grid](
            *(plan.delta, plan.A, plan.C, plan.bias, plan.order, dy, end, total),
            *(*plan.strides[2:4], *plan.strides[6:8], plan.length, plan.dim, plan.n, plan.chunk_length),
            **plan.flags,
        )
        start, _ = plan.chain(dlast, end, total, reverse=True)
    du, ddelta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (plan.u, plan.delta))
    dA, dinitial = plan.states(plan.chunks), plan.states()
    dB, dC = (plan.A.new_empty(plan.batch, plan.blocks, plan.length, plan.n) for _ in range(2))
    dD, dbias = (plan.A.new_empty(plan.batch, plan.chunks, plan.dim) for _ in range(2))
    _backward_kernel[plan.grid](
        *(plan.u, plan.delta, plan.A, plan.B, plan.C, plan.D, plan.bias, plan.order, dy, saved, start),
        *(du, ddelta, dA, dB, dC, dD, dbias, dinitial),
        *plan.strides,
        *(plan.length, plan.dim, plan.n, plan.chunk_length, plan.groups),
        HAS_D=plan.D is not None,
        STEPS=_STEPS,
        **plan.flags,
    )
    maps = (sums.sum(1).to(plan.B.dtype) for sums in (dB, dC))
    return du, ddelta, dA.sum((0, 1)), *maps, dD.sum((0, 1)), dbias.sum((0, 1)), dinitial


define_scan("triton_scan", "triton", _forward, _backward, _saved_shape, "CompositeExplicitAutograd")
