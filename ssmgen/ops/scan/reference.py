"""Selective scan as a plain loop: the definition against which every other backend is tested."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmgen.ops.backend import FLOATS
from ssmgen.ops.scan.inputs import ScanInputs

name, takes_order = "reference", False
devices: tuple[str, ...] | None = None
dtypes = FLOATS
auto_for: tuple[str, ...] | None = ()


def unavailable() -> str | None:
    return None  # a plain loop runs everywhere


def describe() -> str:
    return "plain PyTorch loop over the length, for checking"


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """SISMA eq. 5 step by step, in float64 for float64 inputs, else float32: y ``(batch, length, dim)`` and the state.

    Autograd differentiates through the loop, twice if asked to. Its memory grows with length x dim x d_state: use it to
    check, not to train.
    """
    A, precision = inputs.A, inputs.A.dtype
    x, delta, state = inputs.u.to(precision), step_sizes(inputs), start_state(inputs)
    B, C = inputs.B.to(precision), inputs.C.to(precision)
    outputs = []
    for u_k, delta_k, B_k, C_k in zip(*(sequence.unbind(1) for sequence in (x, delta, B, C)), strict=True):
        decay = torch.exp(delta_k.unsqueeze(-1) * A)
        state = decay * state + (delta_k * u_k).unsqueeze(-1) * B_k.unsqueeze(1)
        outputs.append((state * C_k.unsqueeze(1)).sum(-1))
    return skip_and_gate(torch.stack(outputs, dim=1), x, inputs), state


def step_sizes(inputs: ScanInputs) -> Tensor:
    """softplus(delta + delta_bias), each part optional (Mamba, algorithm 2), ``(batch, length, dim)``."""
    delta = inputs.delta.to(inputs.A.dtype)
    if inputs.delta_bias is not None:
        delta = delta + inputs.delta_bias
    return F.softplus(delta) if inputs.softplus else delta


def start_state(inputs: ScanInputs) -> Tensor:
    """The initial state, zero where none is given, ``(batch, dim, d_state)``."""
    if inputs.initial_state is not None:
        return inputs.initial_state.to(inputs.A.dtype)
    return inputs.A.new_zeros(inputs.u.shape[0], *inputs.A.shape)


def skip_and_gate(y: Tensor, x: Tensor, inputs: ScanInputs) -> Tensor:
    """(y + D x) silu(z) of ``(batch, length, dim)``, each part optional (SISMA eq. 5; Mamba's gate), in u's dtype."""
    if inputs.D is not None:
        y = y + inputs.D * x
    if inputs.z is not None:
        y = y * F.silu(inputs.z.to(x.dtype))
    return y.to(inputs.u.dtype)
