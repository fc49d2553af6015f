"""Mamba-2's scan: its contract and the checks of its arguments."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmgen.ops.backend import FLOATS, ScanBackend, TorchForm
from ssmgen.ops.dispatch import Operator, run_scan
from ssmgen.ops.scan_order import ScanOrder
from ssmgen.ops.ssd import triton
from ssmgen.ops.ssd.forms import SEQUENCES, SSDInputs, chunked, loop
from ssmgen.ops.tensor_check import Expected, check_tensors

SSD: Operator[ScanBackend] = Operator(
    "ssd",
    (
        TorchForm("chunked", chunked, "pure PyTorch, products of matrices over chunks, any device", auto_for=None),
        triton,
        TorchForm("reference", loop, "plain PyTorch loop over the length, for checking"),
    ),
)


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
        chunk: steps per chunk of ``"chunked"``.
        backend: ``"auto"``, ``"chunked"`` (products of matrices), ``"triton"`` or ``"reference"`` (a loop for
            checking). Auto chooses ``"chunked"`` on every device: the Triton kernels have not been timed on a GPU.

    Returns:
        ``y`` of the shape and dtype of ``x``, and the last state if asked for. State, A, D and step sizes are held in
        float64 for float64 inputs and in float32 otherwise.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit, or an unknown backend.
        RuntimeError: the backend cannot run here or does not take this device or dtype; says why.
    """
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
    _check(x, delta, A, B, C, D, delta_bias, initial_state, chunk)
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    step = _step_sizes(delta.to(precision), delta_bias, delta_softplus)
    inputs = SSDInputs(x, step, A.to(precision), B, C, initial_state.to(precision), chunk=chunk)
    y, last_state = run_scan(SSD, inputs, SEQUENCES, order, backend)
    if D is not None:
        y = y + D.to(precision).unsqueeze(-1) * x
    return (y.to(x.dtype), last_state) if return_last_state else y.to(x.dtype)


def _step_sizes(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """softplus(delta + bias), each part optional, ``(batch, length, heads)``."""
    if bias is not None:
        delta = delta + bias.to(delta.dtype)
    return F.softplus(delta) if softplus else delta


def _check(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor,
    chunk: int,
) -> None:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x must be (batch, length, heads, head_dim) and not empty, got {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    batch, length, heads, width = x.shape
    if B.dim() != 4 or 0 in B.shape or heads % B.shape[2]:
        raise ValueError(
            f"B must be ({batch}, {length}, groups, d_state) with groups that divide {heads} heads, got "
            f"{tuple(B.shape)}"
        )
    groups, d_state = B.shape[2:]
    expected: dict[str, Expected] = {
        "delta": (delta, (batch, length, heads)),
        **{name: (tensor, (heads,)) for name, tensor in (("A", A), ("D", D), ("delta_bias", delta_bias))},
        **{name: (tensor, (batch, length, groups, d_state)) for name, tensor in (("B", B), ("C", C))},
        "initial_state": (initial_state, (batch, heads, width, d_state)),
    }
    beside = f"x {tuple(x.shape)} (batch, length, heads, head_dim) and B {tuple(B.shape)} (.., .., groups, d_state)"
    check_tensors(expected, x, "x", beside, ("B", "C"))
