"""The gated delta rule: its contract and the checks of its arguments."""

import torch
from torch import Tensor

from ssmgen.ops.linear_attention.forms import DeltaInputs, chunked, loop
from ssmgen.ops.scan.backend import FLOATS
from ssmgen.ops.scan_order import ScanOrder, reorder

BACKENDS = ("auto", "chunked", "reference")


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    order: ScanOrder | None = None,
    chunk: int = 32,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated delta rule (Yang et al., arXiv 2412.06464, eq. 10), channel-last: attention with a state of fixed size.

    For each head: ``S_k = exp(g_k) S_{k-1} (I - beta_k k_k k_k') + beta_k v_k k_k'``, ``y_k = S_k q_k``. The state maps
    keys to values. Each step reads the value under its key and moves it towards ``v`` by the share ``beta``: at 1 the
    new value replaces the old, at 0 nothing is written. With ``g = 0`` this is the delta rule (arXiv 2406.06484).

    Args:
        q, k: queries and keys, ``(batch, length, heads, key_dim)``, dtype of ``v``. Keys should have length 1 or less:
            the state can grow without bound where ``beta |k|^2 > 2``.
        v: values, ``(batch, length, heads, value_dim)``, float32, float64, bfloat16 or float16.
        g: logarithm of the decay, 0 or less, ``(batch, length, heads)``.
        beta: share of the correction, usually in [0, 1], ``(batch, length, heads)``.
        initial_state: state before the first step, ``(batch, heads, value_dim, key_dim)``; zero where None.
        return_last_state: also return the state after the last step.
        order: the sequence in which the tokens are scanned, as in `ssmgen.ops.selective_scan`.
        chunk: steps per chunk of the matrix form.
        backend: ``"auto"`` and ``"chunked"`` are the matrix form, ``"reference"`` a loop for checking.

    Returns:
        ``y`` of the shape and dtype of ``v``, and the last state if asked for. State, ``g`` and ``beta`` are held in
        float64 for float64 inputs and in float32 otherwise.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit, or an unknown backend.
    """
    _check(q, k, v, g, beta, backend, chunk)
    precision = torch.float64 if v.dtype == torch.float64 else torch.float32
    state = v.new_zeros(v.shape[0], *v.shape[2:], k.shape[-1]) if initial_state is None else initial_state
    index = None if order is None else order.forward
    q, k, v, g, beta = (reorder(x, index) for x in (q, k, v, g.to(precision), beta.to(precision)))
    inputs = DeltaInputs(q, k, v, g, beta, state.to(precision))
    y, last_state = loop(inputs) if backend == "reference" else chunked(inputs, chunk)
    y = reorder(y, None if order is None else order.inverse).to(v.dtype)
    return (y, last_state) if return_last_state else y


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, backend: str, chunk: int) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if v.dtype not in FLOATS or q.dtype != v.dtype or k.dtype != v.dtype:
        raise TypeError(f"q, k and v must share one float dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if v.dim() != 4 or 0 in v.shape:
        raise ValueError(f"v must be (batch, length, heads, value_dim) and not empty, got {tuple(v.shape)}")
    steps = tuple(v.shape[:3])
    if q.shape != k.shape or k.dim() != 4 or tuple(k.shape[:3]) != steps or k.shape[3] == 0:
        raise ValueError(
            f"q and k must both be {(*steps, 'key_dim')} to go with v {tuple(v.shape)}, got {tuple(q.shape)} and "
            f"{tuple(k.shape)}"
        )
    if g.shape != steps or beta.shape != steps:
        raise ValueError(f"g and beta must be {steps}, got {tuple(g.shape)} and {tuple(beta.shape)}")
