"""The public scan: its contract and the checks of its arguments."""

import torch
from torch import Tensor

from ssmgen.ops.backend import FLOATS, ScanBackend
from ssmgen.ops.dispatch import Operator, run_scan
from ssmgen.ops.scan import cpu, mamba_ssm, portable, reference, triton
from ssmgen.ops.scan.inputs import SEQUENCES, ScanInputs
from ssmgen.ops.scan_order import ScanOrder
from ssmgen.ops.tensor_check import Expected, check_tensors

SELECTIVE_SCAN: Operator[ScanBackend] = Operator(
    "selective_scan", (cpu, triton, mamba_ssm, portable, reference), slow_form="portable PyTorch form"
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    order: ScanOrder | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state-space scan (Mamba, algorithm 2; SISMA eqs. 4 and 5), channel-last.

    With delta' = softplus(delta + delta_bias) (each part optional):
    ``h_k = exp(delta'_k A) h_{k-1} + delta'_k B_k u_k``, ``y_k = C_k h_k + D u_k``, and ``y_k * silu(z_k)`` where a
    gate is given. A is discretised by zero-order hold and B by the first-order rule delta * B, as mamba-ssm does.

    Args:
        u: the scanned sequence, ``(batch, length, dim)``, float32, float64, bfloat16 or float16.
        delta: step sizes, same shape and dtype as ``u``.
        A: ``(dim, d_state)``, usually negative.
        B, C: input and output maps, ``(batch, length, d_state)``, dtype of ``u``.
        D, delta_bias: skip, and what is added to ``delta``; both ``(dim,)``.
        z: gate, shape and dtype of ``u``.
        delta_softplus: pass ``delta`` through softplus after the bias.
        initial_state: state before the first step, ``(batch, dim, d_state)``; zero where None.
        return_last_state: also return the state after the last step, ``(batch, dim, d_state)``.
        order: the sequence in which the tokens are scanned, from `ssmgen.ops.scan_order`; as they lie where None. Its
            index tensors are ``(length,)`` for all images or ``(batch, length)``, one order per image. The output stays
            where its token lies. ``"cpu"`` and ``"triton"`` read any order in place; the others scan permuted copies.
            Whether it is a permutation is checked on the CPU alone.
        backend: ``"auto"``, ``"cpu"``, ``"triton"``, ``"mamba-ssm"``, ``"portable"`` or ``"reference"``; auto chooses
            ``"cpu"`` or ``"triton"`` by the device, ``"portable"`` where neither can run.

    Returns:
        ``y`` of the shape and dtype of ``u``, and the last state if asked for. The state, A, D and delta_bias are held
        in float64 for float64 inputs and in float32 otherwise.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit, or an unknown backend.
        RuntimeError: the backend cannot run here or does not take this device or dtype; says why.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, initial_state, softplus=delta_softplus)
    _check(inputs)
    precision = torch.float64 if u.dtype == torch.float64 else torch.float32
    inputs = inputs.apply(lambda x: x.to(precision), "A", "D", "delta_bias", "initial_state")
    y, last_state = run_scan(SELECTIVE_SCAN, inputs, SEQUENCES, order, backend)
    return (y, last_state) if return_last_state else y


def _check(inputs: ScanInputs) -> None:
    u, A = inputs.u, inputs.A
    if u.dim() != 3 or 0 in u.shape:
        raise ValueError(f"u must be (batch, length, dim) and not empty, got {tuple(u.shape)}")
    if A.dim() != 2 or A.shape[0] != u.shape[2] or A.shape[1] == 0:
        raise ValueError(
            f"A must be (dim, d_state) with dim {u.shape[2]} as in u {tuple(u.shape)}, got {tuple(A.shape)}"
        )
    batch, length, dim = u.shape
    tokens, maps, states = (batch, length, dim), (batch, length, A.shape[1]), (batch, *A.shape)
    if u.dtype not in FLOATS:
        raise TypeError(f"u must be float32, float64, bfloat16 or float16, got {u.dtype}")
    expected: dict[str, Expected] = {
        **{name: (getattr(inputs, name), tokens) for name in ("delta", "z")},
        **{name: (getattr(inputs, name), maps) for name in ("B", "C")},
        **{name: (getattr(inputs, name), (dim,)) for name in ("D", "delta_bias")},
        "initial_state": (inputs.initial_state, states),
        "A": (A, tuple(A.shape)),
    }
    beside = f"u {tuple(u.shape)} (batch, length, dim) and A {tuple(A.shape)} (dim, d_state)"
    check_tensors(expected, u, "u", beside, SEQUENCES)
    if A.is_complex():
        raise TypeError("A must be real, got a complex tensor; complex state spaces are not supported")
