"""Selective scan as a plain loop: the definition every other backend is held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: `selective_scan` hands over tokens in the order of the scan.
TAKES_ORDER = False


def unavailable() -> str | None:
    """Why this backend cannot run here; it always can."""
    return None


def describe() -> str:
    """What runs, for the backend report."""
    return "plain PyTorch loop over the length, for checking"


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
) -> tuple[Tensor, Tensor]:
    """One step of SISMA eq. 5 after the other, in float64 for float64 inputs and in float32 otherwise.

    Shapes are those of `ssmgen.ops.selective_scan`. Autograd differentiates through the loop, twice if asked to. Its
    memory grows with length x dim x d_state: use it to check, not to train.
    """
    precision = A.dtype
    delta = delta.to(precision)
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    x = u.to(precision)
    batch, _, dim = u.shape
    state = x.new_zeros(batch, dim, A.shape[1]) if initial_state is None else initial_state.to(precision)
    outputs = []
    steps = zip(x.unbind(1), delta.unbind(1), B.to(precision).unbind(1), C.to(precision).unbind(1), strict=True)
    for u_k, delta_k, B_k, C_k in steps:
        decay = torch.exp(delta_k.unsqueeze(-1) * A)
        state = decay * state + (delta_k * u_k).unsqueeze(-1) * B_k.unsqueeze(1)
        outputs.append((state * C_k.unsqueeze(1)).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * F.silu(z.to(precision))
    return y.to(u.dtype), state
