"""The gated delta rule: its contract and the checks of its arguments."""

import torch
from torch import Tensor

from ssmgen.ops.backend import FLOATS, ScanBackend, TorchForm
from ssmgen.ops.dispatch import Operator, run_scan
from ssmgen.ops.linear_attention.forms import SEQUENCES, DeltaInputs, chunked, loop
from ssmgen.ops.scan_order import ScanOrder
from ssmgen.ops.tensor_check import Expected, check_tensors

GATED_DELTA_RULE: Operator[ScanBackend] = Operator(
    "gated_delta_rule",
    (
        TorchForm("chunked", chunked, "pure PyTorch, products of matrices over chunks, any device", auto_for=None),
        TorchForm("reference", loop, "plain PyTorch loop over the length, for checking"),
    ),
)


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

    Both forms are plain PyTorch: autograd and `torch.compile` see through them, without an operator of `torch.library`.

    Args:
        q, k: queries and keys, ``(batch, length, heads, key_dim)``, dtype of ``v``. Keys should have length 1 or less:
            the state can grow without bound where ``beta |k|^2 > 2``.
        v: values, ``(batch, length, heads, value_dim)``, float32, float64, bfloat16 or float16.
        g: logarithm of the decay, 0 or less, ``(batch, length, heads)``; minus infinity empties the state.
        beta: share of the correction, usually in [0, 1], ``(batch, length, heads)``.
        initial_state: state before the first step, ``(batch, heads, value_dim, key_dim)``; zero where None.
        return_last_state: also return the state after the last step.
        order: the sequence in which the tokens are scanned, as in `ssmgen.ops.selective_scan`.
        chunk: steps per chunk of ``"chunked"``.
        backend: ``"auto"`` and ``"chunked"`` are the matrix form, ``"reference"`` a loop for checking.

    Returns:
        ``y`` of the shape and dtype of ``v``, and the last state if asked for. State, ``g`` and ``beta`` are held in
        float64 for float64 inputs and in float32 otherwise.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit, or an unknown backend.
    """
    if initial_state is None:
        initial_state = v.new_zeros(v.shape[0], *v.shape[2:], k.shape[-1])
    _check(q, k, v, g, beta, initial_state, chunk)
    precision = torch.float64 if v.dtype == torch.float64 else torch.float32
    g, beta, initial_state = (x.to(precision) for x in (g, beta, initial_state))
    inputs = DeltaInputs(q, k, v, g, beta, initial_state, chunk=chunk)
    y, last_state = run_scan(GATED_DELTA_RULE, inputs, SEQUENCES, order, backend)
    return (y.to(v.dtype), last_state) if return_last_state else y.to(v.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if v.dim() != 4 or 0 in v.shape:
        raise ValueError(f"v must be (batch, length, heads, value_dim) and not empty, got {tuple(v.shape)}")
    if v.dtype not in FLOATS:
        raise TypeError(f"v must be float32, float64, bfloat16 or float16, got {v.dtype}")
    batch, length, heads, width = v.shape
    if k.dim() != 4 or 0 in k.shape:
        raise ValueError(f"k must be ({batch}, {length}, {heads}, key_dim) and not empty, got {tuple(k.shape)}")
    keys = k.shape[3]
    expected: dict[str, Expected] = {
        **{name: (tensor, (batch, length, heads, keys)) for name, tensor in (("q", q), ("k", k))},
        **{name: (tensor, (batch, length, heads)) for name, tensor in (("g", g), ("beta", beta))},
        "initial_state": (initial_state, (batch, heads, width, keys)),
    }
    beside = f"v {tuple(v.shape)} (batch, length, heads, value_dim) and k {tuple(k.shape)} (.., .., heads, key_dim)"
    check_tensors(expected, v, "v", beside, ("q", "k"))
