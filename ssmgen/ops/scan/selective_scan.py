"""The public scan: its contract and the checks of its arguments."""

import torch
from torch import Tensor

from ssmgen.ops.scan.backend import FLOATS, SEQUENCES, ScanInputs
from ssmgen.ops.scan.dispatch import choose_backend
from ssmgen.ops.scan_order import ScanOrder, reorder


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
        backend: ``"auto"``, ``"cpu"``, ``"triton"``, ``"mamba-ssm"``, ``"portable"`` or ``"reference"``; auto chooses
            ``"cpu"`` or ``"triton"`` by the device, ``"portable"`` where neither can run.

    Returns:
        ``y`` of the shape and dtype of ``u``, and the last state if asked for. The state, A, D and delta_bias are held
        in float64 for float64 inputs and in float32 otherwise.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit, or an unknown backend.
        RuntimeError: the backend cannot run here or does not take this device or dtype; says why.
    """
    index = None if order is None else order.forward
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, initial_state, index, delta_softplus)
    _check(inputs)
    _check_order(order, u)
    chosen = choose_backend(u.device.type, u.dtype, backend)
    precision = torch.float64 if u.dtype == torch.float64 else torch.float32
    inputs = inputs.apply(lambda x: x.to(precision), "A", "D", "delta_bias", "initial_state")
    if order is None or chosen.takes_order:
        y, last_state = chosen.scan(inputs)
    else:
        permuted = inputs.apply(lambda x: reorder(x, index), *SEQUENCES)
        y, last_state = chosen.scan(permuted._replace(order=None))
        y = reorder(y, order.inverse)
    return (y, last_state) if return_last_state else y


def _check_order(order: ScanOrder | None, u: Tensor) -> None:
    if order is None:
        return
    batch, length, _ = u.shape
    for index in order:
        fits = index.shape == order.forward.shape and tuple(index.shape) in ((length,), (batch, length))
        if not fits or index.dtype != torch.int64 or index.device != u.device:
            raise ValueError(
                f"order must be two int64 tensors ({length},) for all images or ({batch}, {length}) for one order per "
                f"image, on {u.device}, as ssmgen.ops.scan_order makes them for {length} tokens, got {index.dtype} "
                f"{tuple(index.shape)} on {index.device}"
            )


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
    expected = {"delta": tokens, "B": maps, "C": maps, "D": (dim,), "z": tokens, "delta_bias": (dim,)}
    if u.dtype not in FLOATS:
        raise TypeError(f"u must be float32, float64, bfloat16 or float16, got {u.dtype}")
    for name, shape in (expected | {"initial_state": states, "A": A.shape}).items():
        tensor = getattr(inputs, name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} to go with u {tuple(u.shape)} (batch, length, dim) and A {tuple(A.shape)} "
                f"(dim, d_state), got {tuple(tensor.shape)}"
            )
        if tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device} but u is on {u.device}: move one of them")
        if name in SEQUENCES and tensor.dtype != u.dtype:
            raise TypeError(f"{name} must have u's dtype {u.dtype}, got {tensor.dtype}")
    if A.is_complex():
        raise TypeError("A must be real, got a complex tensor; complex state spaces are not supported")
