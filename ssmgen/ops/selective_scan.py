"""The one public scan: argument checks, choice of a backend, and the report of what runs.

Letters: b batch, l length, d dim (channels), n d_state.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ssmgen.ops import cpu, mamba_ssm, portable, reference, triton_scan
from ssmgen.ops.scan_order import ScanOrder, reorder

_BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "portable": portable,
    "cpu": cpu,
    "triton": triton_scan,
    "mamba-ssm": mamba_ssm,
}
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_warned: set[str] = set()


@dataclass(frozen=True)
class BackendStatus:
    """What `backends` reports of one backend.

    Attributes:
        available: whether it can run in this installation.
        detail: what it is, or why it cannot run and what to do about it.
        auto_for: the device types for which ``backend="auto"`` takes it.
    """

    available: bool
    detail: str
    auto_for: tuple[str, ...]


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
        D: skip, ``(dim,)``.
        z: gate, shape and dtype of ``u``.
        delta_bias: ``(dim,)``, added to ``delta``.
        delta_softplus: pass ``delta`` through softplus after the bias.
        initial_state: state before the first step, ``(batch, dim, d_state)``; zero where None.
        return_last_state: also return the state after the last step, ``(batch, dim, d_state)``.
        order: the sequence in which the tokens are scanned, from `ssmgen.ops.scan_order`; as they lie where None. The
            output stays where its token lies. The fused backends need no permuted copies for it.
        backend: ``"auto"`` (``"cpu"`` or ``"triton"`` by the device, ``"portable"`` where neither can run), or one of
            these, ``"reference"`` or ``"mamba-ssm"``.

    Returns:
        ``y`` of the shape and dtype of ``u``, and the last state if asked for. The state, A, D and delta_bias are held
        in float64 for float64 inputs and in float32 otherwise.

    Raises:
        ValueError: a shape or device that does not fit, or an unknown backend.
        TypeError: a dtype that does not fit.
        RuntimeError: the backend asked for cannot run here; says why.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    _check_order(order, u)
    module = _BACKENDS[choose_backend(u.device.type, u.dtype, backend)]
    precision = torch.float64 if u.dtype == torch.float64 else torch.float32

    def exact(parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else parameter.to(precision)

    A, D, delta_bias, initial_state = A.to(precision), exact(D), exact(delta_bias), exact(initial_state)
    if order is None:
        y, last_state = module.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    elif module.TAKES_ORDER:
        y, last_state = module.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, order.forward)
    else:
        u, delta, B, C = (reorder(x, order.forward) for x in (u, delta, B, C))
        z = None if z is None else reorder(z, order.forward)
        y, last_state = module.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
        y = reorder(y, order.inverse)
    return (y, last_state) if return_last_state else y


def _check_order(order: ScanOrder | None, u: Tensor) -> None:
    if order is None:
        return
    length = u.shape[1]
    for index in order:
        if tuple(index.shape) != (length,) or index.dtype != torch.int64 or index.device != u.device:
            raise ValueError(
                f"order must be two int64 tensors ({length},) on {u.device}, as ssmgen.ops.scan_order makes them for "
                f"{length} tokens, got {index.dtype} {tuple(index.shape)} on {index.device}"
            )


def choose_backend(device_type: str, dtype: torch.dtype, backend: str = "auto") -> str:
    """The backend that runs for a device and dtype; warns once where ``auto`` takes a slow one."""
    if backend == "auto":
        return _auto(device_type, dtype)
    if backend not in _BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: expected 'auto' or one of {', '.join(_BACKENDS)}")
    reason = _BACKENDS[backend].unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    if backend == "cpu" and (device_type != "cpu" or dtype == torch.float64):
        raise RuntimeError(
            f"backend 'cpu' takes float32 and 16-bit tensors on the CPU, got {dtype} on {device_type}: "
            "use backend='portable' (or 'auto')"
        )
    if backend == "triton" and dtype == torch.float64:
        raise RuntimeError("backend 'triton' keeps its state in float32: for float64 use backend='portable'")
    if backend == "triton" and device_type != "cuda" and not triton_scan.interpreted():
        raise RuntimeError(f"backend 'triton' takes CUDA tensors, got one on {device_type}: use backend='auto'")
    if backend == "mamba-ssm" and (device_type != "cuda" or dtype == torch.float64):
        raise RuntimeError(
            f"backend 'mamba-ssm' takes float32 and 16-bit CUDA tensors, got {dtype} on {device_type}: "
            "use backend='auto'"
        )
    return backend


def backends() -> dict[str, BackendStatus]:
    """Each backend with whether it can run here, why not, and the devices for which ``auto`` takes it."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    chosen = {device: _auto(device, torch.float32, quiet=True) for device in devices}
    report = {}
    for name, module in _BACKENDS.items():
        reason = module.unavailable()
        auto_for = tuple(device for device, choice in chosen.items() if choice == name)
        report[name] = BackendStatus(reason is None, reason or module.describe(), auto_for)
    return report


def _auto(device_type: str, dtype: torch.dtype, quiet: bool = False) -> str:
    if dtype == torch.float64 or device_type == "meta":
        return "portable"  # the fused kernels keep a float32 state; float64 is asked for to be exact
    fused = {"cpu": "cpu", "cuda": "triton"}.get(device_type)
    reason = _BACKENDS[fused].unavailable() if fused else f"There is no fused scan for {device_type}."
    if reason is None:
        return str(fused)
    if not quiet:
        _warn_once(
            f"selective_scan runs its portable PyTorch form on {device_type}: correct, but many times slower. {reason}"
        )
    return "portable"


def _warn_once(message: str) -> None:
    if message not in _warned and not torch.compiler.is_compiling():
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    if u.dim() != 3 or 0 in u.shape:
        raise ValueError(f"u must be (batch, length, dim) and not empty, got {tuple(u.shape)}")
    if A.dim() != 2 or A.shape[0] != u.shape[2] or A.shape[1] == 0:
        raise ValueError(
            f"A must be (dim, d_state) with dim {u.shape[2]} as in u {tuple(u.shape)}, got {tuple(A.shape)}"
        )
    batch, length, dim = u.shape
    d_state = A.shape[1]
    expected = {
        "delta": (delta, (batch, length, dim)),
        "B": (B, (batch, length, d_state)),
        "C": (C, (batch, length, d_state)),
        "D": (D, (dim,)),
        "z": (z, (batch, length, dim)),
        "delta_bias": (delta_bias, (dim,)),
        "initial_state": (initial_state, (batch, dim, d_state)),
    }
    if u.dtype not in _FLOATS:
        raise TypeError(f"u must be float32, float64, bfloat16 or float16, got {u.dtype}")
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} to go with u {tuple(u.shape)} (batch, length, dim) and A {tuple(A.shape)} "
                f"(dim, d_state), got {tuple(tensor.shape)}"
            )
        if tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device} but u is on {u.device}: move one of them")
        if name in ("delta", "B", "C", "z") and tensor.dtype != u.dtype:
            raise TypeError(f"{name} must have u's dtype {u.dtype}, got {tensor.dtype}")
    if A.device != u.device:
        raise ValueError(f"A is on {A.device} but u is on {u.device}: move one of them")
    if A.is_complex():
        raise TypeError("A must be real, got a complex tensor; complex state spaces are not supported")
