"""Mamba-2's scan on a GPU in Triton: chunks in parallel, states passed between them, and a backward of its own.

Three kernels: what each chunk adds to the state; the states that enter the chunks, in turn; the outputs. Backward runs
the first two from the end and one more for all gradients of a chunk. Tokens are read and written in any order, in
place. The matrices of a chunk stay on the chip; the states that enter the chunks, and each head's gradients of B and C,
are the only large intermediate tensors. Sums over heads and chunks have a fixed order: results repeat to the bit.
"""

from typing import Any

import torch
from torch import Tensor

from ssmgen.ops.backend import FLOATS_UP_TO_32
from ssmgen.ops.launch import launch
from ssmgen.ops.operator import define, dense_rows
from ssmgen.ops.scan import triton as scan_triton
from ssmgen.ops.ssd.forms import SSDInputs

name, takes_order = "triton", True
devices: tuple[str, ...] | None = scan_triton.devices
dtypes = FLOATS_UP_TO_32
auto_for: tuple[str, ...] | None = ()  # it has not been timed against "chunked" on a GPU
unavailable, describe = scan_triton.unavailable, scan_triton.describe
_STEPS, _WARPS = 32, 4
_ELEMENTS = 512  # of a state, for one program that passes states on
#: Elements of a head's state that a program can hold beside its chunk: with 64 x 128 in float32, the gradients need 116
#: KiB of shared memory (compiled for sm_80, which has 163).
_LARGEST = 2**13

_ARGUMENTS = "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor state, Tensor? order"


def scan(inputs: SSDInputs) -> tuple[Tensor, Tensor]:
    """y ``(b, l, h, p)`` and the last state; see `SSDInputs`.

    Raises:
        ValueError: heads with a state that is too large for the kernels.
    """
    width, n = inputs.x.shape[3], inputs.B.shape[3]
    if _padded(width) * _padded(n) > _LARGEST:
        raise ValueError(
            f"backend 'triton' of ssd takes head_dim x d_state up to {_LARGEST}, each as the next power of two, got "
            f"{width} x {n}: use backend='chunked'"
        )
    y, last, _ = torch.ops.ssmgen.triton_ssd(*inputs[:-1])
    return y, last


def _padded(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length())  # a dot takes 16 or more


def _kernels() -> Any:
    from ssmgen.ops.ssd import triton_kernels

    return triton_kernels


class _Plan:
    """The arguments that the kernels of a call share."""

    def __init__(
        self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, order: Tensor | None
    ) -> None:
        self.x, self.B, self.C = map(dense_rows, (x, B, C))
        self.delta, self.A, self.state = delta.contiguous(), A.contiguous(), state.contiguous()
        self.order = None if order is None else order.contiguous()
        self.batch, self.length, self.heads, self.width = x.shape
        self.groups, self.n = B.shape[2:]
        self.chunks = -(-self.length // _STEPS)
        self.grid = self.chunks, self.heads, self.batch
        order_batch = self.length if order is not None and order.dim() == 2 else 0
        self.layout = (order_batch, self.length, self.heads, self.groups, self.width, self.n)
        self.flags: dict[str, Any] = {
            "HAS_ORDER": order is not None,
            "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
            "STEPS": _STEPS,
            "WIDTH": _padded(self.width),
            "STATES": _padded(self.n),
            "num_warps": _WARPS,
        }

    def states_between(self, first: Tensor, x: Tensor, B: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
        """The state, or its gradient, that enters each chunk ``(b, c, h, p, n)``, and the one after the last."""
        gain = first.new_empty(self.batch, self.chunks, *first.shape[1:])
        entering, last = torch.empty_like(gain), torch.empty_like(first)
        passed = first.new_empty(self.batch, self.chunks, self.heads)
        launch(
            *(_kernels().gain_kernel, self.grid),
            *(x, self.delta, self.A, B, self.order, gain, passed, *x.stride()[:3], *B.stride()[:3], *self.layout),
            BACKWARD=backward,
            **self.flags,
        )
        size = self.width * self.n
        launch(
            *(_kernels().pass_kernel, (-(-size // _ELEMENTS), self.heads, self.batch)),
            *(first, gain, passed, entering, last, self.heads, size, self.chunks),
            REVERSE=backward,
            ELEMENTS=_ELEMENTS,
            num_warps=_WARPS,
        )
        return entering, last

    def inputs(self) -> tuple[Any, ...]:
        """What the kernels of outputs and gradients read first."""
        return self.x, self.delta, self.A, self.B, self.C, self.order

    def strides(self) -> tuple[int, ...]:
        return *self.x.stride()[:3], *self.B.stride()[:3], *self.C.stride()[:3]


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    plan = _Plan(*arguments)
    entering, last = plan.states_between(plan.state, plan.x, plan.B, backward=False)
    y = plan.x.new_empty(plan.x.shape)
    launch(
        *(_kernels().output_kernel, plan.grid),
        *(*plan.inputs(), entering, y, *plan.strides(), *plan.layout),
        **plan.flags,
    )
    return y, last, entering


def _backward(dy: Tensor | None, dlast: Tensor | None, entering: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    plan = _Plan(*arguments)
    dy = plan.x.new_zeros(plan.x.shape) if dy is None else dy.contiguous()
    dlast = torch.zeros_like(plan.state) if dlast is None else dlast.contiguous()
    leaving, dstate = plan.states_between(dlast, dy, plan.C, backward=True)
    dx, ddelta = plan.x.new_empty(plan.x.shape), plan.delta.new_empty(plan.delta.shape)
    dA = plan.delta.new_empty(plan.batch, plan.chunks, plan.heads)
    dB, dC = (plan.delta.new_empty(plan.batch, plan.length, plan.heads, plan.n) for _ in range(2))
    launch(
        *(_kernels().gradient_kernel, plan.grid),
        *(*plan.inputs(), entering, dy, leaving, dx, ddelta, dA, dB, dC),
        *(*plan.strides(), *plan.layout),
        **plan.flags,
    )
    of_groups = (x.unflatten(2, (plan.groups, -1)).sum(3).to(plan.B.dtype) for x in (dB, dC))
    return dx, ddelta, dA.sum((0, 1)), *of_groups, dstate


def _fake(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, order: Tensor | None) -> Any:
    chunks = -(-x.shape[1] // _STEPS)
    return x.new_empty(x.shape), state.new_empty(state.shape), state.new_empty(len(x), chunks, *state.shape[1:])


define(
    *("triton_ssd", _ARGUMENTS, _forward, _backward, _fake, tuple(range(6))),
    refusal="backend 'triton' of ssd is differentiable once: use backend='chunked' for more",
    results=3,
    dispatch_key="CompositeExplicitAutograd",
)
