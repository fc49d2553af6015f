"""Mamba-2's scan: its contract and the checks of its arguments."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmgen.ops.scan.backend import FLOATS
from ssmgen.ops.scan_order import ScanOrder, reorder
from ssmgen.ops.ssd.forms import SSDInputs, chunked, loop

BACKENDS = ("auto", "chunked", "reference")


def ssd(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    order: ScanOrder | None = None,
    chunk: int = 32,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan of Mamba-2 (Dao and Gu, arXiv 2405.21060, listing 1), channel-last: one decay per head, not per channel.

    With delta' = softplus(delta + delta_bias) (each part optional), for each head:
    ``H_k = exp(delta'_k A) H_{k-1} + delta'_k x_k B_k'``, ``y_k = H_k C_k + D x_k``.

    Args:
        x: the scanned sequence, ``(batch, length, heads, head_dim)``, float32, float64, bfloat16 or float16.
        delta: step sizes, ``(batch, length, heads)``.
        A: ``(heads,)``, usually negative.
        B, C: input and output maps, ``(batch, length, groups, d_state)``, dtype of ``x``; ``groups`` divides ``heads``,
            and neighbouring heads share a group.
        D, delta_bias: skip, and what is added to ``delta``; both ``(heads,)``.
        delta_softplus: pass ``delta`` through softplus after the bias.
        initial_state: state before the first step, ``(batch, heads, head_dim, d_state)``; zero where None.
        return_last_state: also return the state after the last step.
        order: the sequence in which the tokens are scanned, as in `ssmgen.ops.selective_scan`.
        chunk: steps per chunk of the matrix form.
        backend: ``"auto"`` and ``"chunked"`` are the matrix form, ``"reference"`` a loop for checking.

    Returns:
        ``y`` of the shape and dtype of ``x``, and the last state if asked for. State, A, D and step sizes are held in
        float64 for float64 inputs and in float32 otherwise.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, or an unknown backend.
    """
    _check(x, delta, A, B, C, backend, chunk)
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]) if initial_state is None else initial_state
    step = _step_sizes(delta.to(precision), delta_bias, delta_softplus)
    index = None if order is None else order.forward
    sequences = (reorder(each, index) for each in (x, step, B, C))
    ordered_x, ordered_step, ordered_B, ordered_C = sequences
    inputs = SSDInputs(ordered_x, ordered_step, A.to(precision), ordered_B, ordered_C, state.to(precision))
    y, last_state = loop(inputs) if backend == "reference" else chunked(inputs, chunk)
    y = reorder(y, None if order is None else order.inverse)
    if D is not None:
        y = y + D.to(precision).unsqueeze(-1) * x
    return (y.to(x.dtype), last_state) if return_last_state else y.to(x.dtype)


def _step_sizes(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """softplus(delta + bias), each part optional, ``(batch, length, heads)``."""
    if bias is not None:
        delta = delta + bias.to(delta.dtype)
    return F.softplus(delta) if softplus else delta


def _check(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, backend: str, chunk: int) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if x.dtype not in FLOATS or B.dtype != x.dtype or C.dtype != x.dtype:
        raise TypeError(f"x, B and C must share one float dtype, got {x.dtype}, {B.dtype} and {C.dtype}")
    if x.dim() != 4:
        raise ValueError(f"x must be (batch, length, heads, head_dim), got {tuple(x.shape)}")
    batch, length, heads, _ = x.shape
    if delta.shape != (batch, length, heads) or A.shape != (heads,):
        raise ValueError(
            f"delta and A must be {(batch, length, heads)} and {(heads,)}, got {tuple(delta.shape)} and "
            f"{tuple(A.shape)}"
        )
    if B.dim() != 4 or B.shape != C.shape or B.shape[:2] != (batch, length) or heads % B.shape[2]:
        raise ValueError(
            f"B and C must be ({batch}, {length}, groups, d_state) with groups that divide {heads} heads, got "
            f"{tuple(B.shape)} and {tuple(C.shape)}"
        )
