"""The two forms of Mamba-2's scan: a plain loop, the definition; and products of matrices over chunks.

Letters: b batch, l length, h heads, p width of a head, g groups, n d_state; c chunks of s steps.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SSDInputs(NamedTuple):
    """What both forms read; see `ssmgen.ops.ssd`. ``delta`` has its bias and softplus applied.

    Attributes:
        x: ``(b, l, h, p)``.
        delta, A, state: ``(b, l, h)``, ``(h,)`` and ``(b, h, p, n)``, in the precision of the state.
        B, C: ``(b, l, g, n)``.
        order: the token of each step, int64, ``(l,)`` or ``(b, l)``, for a backend that takes it.
        chunk: steps per chunk of the matrix form.
    """

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    state: Tensor
    order: Tensor | None = None
    chunk: int = 32


#: The inputs that have a row for each token.
SEQUENCES = ("x", "delta", "B", "C")


def loop(inputs: SSDInputs) -> tuple[Tensor, Tensor]:
    """The recurrence step by step: y ``(b, l, h, p)`` and the last state, for checking."""
    x, delta, A, B, C, state, *_ = inputs
    x, B, C = (each.to(state) for each in (x, *_of_heads(inputs)))
    outputs = []
    for x_k, delta_k, B_k, C_k in zip(x.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        decay = torch.exp(delta_k * A)[..., None, None]
        state = decay * state + (delta_k.unsqueeze(-1) * x_k).unsqueeze(-1) * B_k.unsqueeze(-2)
        outputs.append((state * C_k.unsqueeze(-2)).sum(-1))
    return torch.stack(outputs, dim=1), state


def chunked(inputs: SSDInputs) -> tuple[Tensor, Tensor]:
    """The same by products of matrices (Mamba-2, section 6): y ``(b, l, h, p)`` and the last state.

    Inside every chunk at once, then from chunk to chunk.
    Every exponent is a sum of ``delta A`` over later steps, so none overflows where A <= 0. Decays and states keep the
    state's precision, products take x's.
    """
    length, precision, dtype = inputs.x.shape[1], inputs.state.dtype, inputs.x.dtype
    x, delta, B, C = _chunks(inputs, min(inputs.chunk, length))  # (b, c, s, h, p), (b, c, s, h), (b, c, g, s, n) twice
    heads, width, groups = *x.shape[3:], B.shape[2]
    total = (delta * inputs.A).cumsum(2)  # the exponent from the chunk's start, (b, c, s, h)
    steps = x * delta.unsqueeze(-1).to(dtype)

    scores = (C @ B.mT).unsqueeze(3)  # (b, c, g, 1, s, s)
    inside = (scores * _decays(total).unflatten(2, (groups, -1)).to(dtype)).flatten(2, 3)
    y = (inside @ steps.transpose(2, 3)).transpose(2, 3).to(precision)

    # Heads of one group side by side: a product for each group, not for each head.
    kept = steps * torch.exp(total[:, :, -1:] - total).unsqueeze(-1).to(dtype)
    gained = _grouped(kept, groups).mT @ B  # (b, c, g, h/g p, n)
    gained = gained.to(precision).view(*gained.shape[:2], heads, width, -1)
    before, state = [], inputs.state
    for decay, gain in zip(torch.exp(total[:, :, -1]).unbind(1), gained.unbind(1), strict=True):
        before.append(state)
        state = decay[..., None, None] * state + gain
    entering = torch.stack(before, dim=1).to(dtype).unflatten(2, (groups, -1)).flatten(3, 4)  # (b, c, g, h/g p, n)
    carried = (C @ entering.mT).transpose(2, 3).reshape(x.shape)
    y = y + torch.exp(total).unsqueeze(-1) * carried
    return y.flatten(1, 2)[:, :length], state


def _grouped(x: Tensor, groups: int) -> Tensor:
    """``(b, c, s, h, p)`` to ``(b, c, g, s, h/g p)``."""
    return x.unflatten(3, (groups, -1)).flatten(4, 5).transpose(2, 3)


def _chunks(inputs: SSDInputs, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sequences cut into chunks, filled up with steps of size 0, which change nothing."""
    missing = -inputs.x.shape[1] % chunk
    given = (inputs.x, inputs.delta, inputs.B, inputs.C)
    padded = (F.pad(each, (0, 0) * (each.dim() - 2) + (0, missing)) if missing else each for each in given)
    x, delta, B, C = (each.unflatten(1, (-1, chunk)) for each in padded)
    return x, delta, B.transpose(2, 3), C.transpose(2, 3)


def _decays(total: Tensor) -> Tensor:
    """``exp(total_i - total_j)`` for i >= j, else 0: ``(b, c, s, h)`` to ``(b, c, h, s, s)``."""
    total = total.transpose(2, 3)
    later = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).triu(1)
    return torch.exp((total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf))


def _of_heads(inputs: SSDInputs) -> tuple[Tensor, Tensor]:
    """B and C of every head, ``(b, l, h, n)``: neighbouring heads share a group."""
    shared = inputs.A.shape[0] // inputs.B.shape[2]
    return inputs.B.repeat_interleave(shared, dim=2), inputs.C.repeat_interleave(shared, dim=2)
