"""Selective scan in pure PyTorch for any device: two-level scan, states recomputed in backward.

The length is cut into about sqrt(length) chunks. Inside all chunks at once the recurrence runs step by step, and one
carry then links the chunks, so a scan costs about 2 sqrt(length) kernel launches. Decays are only ever multiplied with
one another (each is in (0, 1]), never divided or taken out of a cumulative sum, so no delta * |A| can overflow. The
(batch, length, dim, d_state) tensors live for one slice of channels at a time and are rebuilt in backward: memory grows
with the length, not with its square.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmgen.ops.backend import FLOATS, full_precision
from ssmgen.ops.scan.inputs import ScanInputs
from ssmgen.ops.scan.reference import skip_and_gate, start_state, step_sizes

# Elements of one (batch, length, channels, d_state) working tensor: on a CPU a few of them should fit in its cache.
_WORKING_ELEMENTS_CPU = 2**20
_WORKING_ELEMENTS_GPU = 2**26

name, takes_order = "portable", False
devices: tuple[str, ...] | None = None
dtypes = FLOATS
auto_for: tuple[str, ...] | None = None


def unavailable() -> str | None:
    return None  # pure PyTorch runs everywhere


def describe() -> str:
    return "pure PyTorch in chunks, any device"


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """SISMA eq. 5 in chunks: y ``(batch, length, dim)`` and state; autograd differentiates the elementwise edges."""
    precision = inputs.A.dtype
    x, B, C = (tensor.to(precision) for tensor in (inputs.u, inputs.B, inputs.C))
    y, state = _Recurrence.apply(x, step_sizes(inputs), inputs.A, B, C, start_state(inputs))
    return skip_and_gate(y, x, inputs), state


class _Recurrence(torch.autograd.Function):
    """SISMA eq. 5 without its skip; backward recomputes the states (Mamba, section 3.3.2)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        u, delta, A, B, C, start = inputs
        y, last = torch.empty_like(u), torch.empty_like(start)
        with full_precision(u.device.type):
            for part in _channel_slices(u, A):
                states = _states(u[..., part], delta[..., part], A[part], B, start[:, part])
                y[..., part] = torch.einsum("bldn,bln->bld", states, C)
                last[:, part] = states[:, -1]
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
        u, _, A, *_ = inputs = ctx.saved_tensors
        grads = tuple(torch.zeros_like(x) for x in inputs)
        with full_precision(u.device.type):
            for part in _channel_slices(u, A):
                _backward_slice(part, inputs, grads, grad_y, grad_last)
        return grads


def _backward_slice(
    part: slice, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...], grad_y: Tensor, grad_last: Tensor
) -> None:
    """The adjoint of SISMA eq. 5 for the channels ``part``, added to ``grads``, which are ordered as the inputs are."""
    u, delta, A, B, C, start = inputs
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_start = grads
    u, delta, A, start, grad_y = u[..., part], delta[..., part], A[part], start[:, part], grad_y[..., part]

    states = _states(u, delta, A, B, start)
    grad_C += torch.einsum("bldn,bld->bln", states, grad_y)
    # The gradient of the states obeys the same recurrence backwards, with the decays shifted by one step.
    decay = torch.exp(delta.unsqueeze(-1) * A)
    grad_states = grad_y.unsqueeze(-1) * C.unsqueeze(2)
    grad_states[:, -1] += grad_last[:, part]
    ahead = torch.cat([decay[:, 1:], torch.ones_like(decay[:, :1])], dim=1)
    grad_states = _linear_recurrence(ahead.flip(1), grad_states.flip(1)).flip(1)

    previous = torch.cat([start.unsqueeze(1), states[:, :-1]], dim=1)
    grad_exponent = grad_states * previous * decay
    from_input = torch.einsum("bldn,bln->bld", grad_states, B)
    grad_u[..., part] = from_input * delta
    grad_delta[..., part] = from_input * u + torch.einsum("bldn,dn->bld", grad_exponent, A)
    grad_A[part] = torch.einsum("bldn,bld->dn", grad_exponent, delta)
    grad_B += torch.einsum("bldn,bld->bln", grad_states, delta * u)
    grad_start[:, part] = decay[:, 0] * grad_states[:, 0]


def _states(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, initial_state: Tensor) -> Tensor:
    """All states h_k of SISMA eq. 5, ``(batch, length, dim, d_state)``."""
    decay = torch.exp(delta.unsqueeze(-1) * A)
    states = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
    states[:, 0] += decay[:, 0] * initial_state
    return _linear_recurrence(decay, states)


def _linear_recurrence(decay: Tensor, values: Tensor) -> Tensor:
    """h_k = decay_k h_{k-1} + values_k along dimension 1, from zero (Blelloch 1990, section 1.4, in two levels).

    Overwrites both arguments.
    """
    length = values.shape[1]
    chunk = max(1, math.isqrt(length))
    padding = -length % chunk
    if padding:
        pad = (0, 0, 0, 0, 0, padding)
        decay, values = F.pad(decay, pad), F.pad(values, pad)
    decay, values = decay.unflatten(1, (-1, chunk)), values.unflatten(1, (-1, chunk))
    for k in range(1, chunk):
        values[:, :, k].addcmul_(decay[:, :, k], values[:, :, k - 1])
        decay[:, :, k].mul_(decay[:, :, k - 1])
    for i in range(1, values.shape[1]):
        values[:, i].addcmul_(decay[:, i], values[:, i - 1, -1:])
    return values.flatten(1, 2)[:, :length]


def _channel_slices(u: Tensor, A: Tensor) -> list[slice]:
    batch, length, dim = u.shape
    budget = _WORKING_ELEMENTS_CPU if u.device.type == "cpu" else _WORKING_ELEMENTS_GPU
    step = max(1, budget // (batch * length * A.shape[1]))
    return [slice(i, min(i + step, dim)) for i in range(0, dim, step)]
