"""Which backend runs a scan: the choice by device and dtype, and the report of what can run."""

import warnings
from dataclasses import dataclass

import torch

from ssmgen.ops.scan import cpu, mamba_ssm, portable, reference, triton
from ssmgen.ops.scan.backend import Backend

#: In order of preference: ``auto`` takes the first that lists the device in ``auto_for``, takes the dtype and can run.
BACKENDS: tuple[Backend, ...] = (cpu, triton, mamba_ssm, portable, reference)
_warned: set[str] = set()


@dataclass(frozen=True)
class BackendStatus:
    """What `backends` reports of one backend.

    Attributes:
        available: whether it can run in this installation.
        detail: what it is, or why it cannot run and what to do about it.
        auto_for: the device types for which ``backend="auto"`` chooses it.
    """

    available: bool
    detail: str
    auto_for: tuple[str, ...]


def choose_backend(device_type: str, dtype: torch.dtype, name: str = "auto") -> Backend:
    """The backend that runs for a device and dtype; warns once where ``auto`` chooses a slow one.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend cannot run here, or does not take this device or dtype.
    """
    if name == "auto":
        return _auto(device_type, dtype)
    known = {backend.name: backend for backend in BACKENDS}
    if name not in known:
        raise ValueError(f"unknown backend {name!r}: expected 'auto' or one of {', '.join(known)}")
    backend = known[name]
    reason = backend.unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    if dtype not in backend.dtypes or not _covers(backend.devices, device_type):
        raise RuntimeError(
            f"backend {name!r} takes {_alternatives(backend.dtypes)} on {_alternatives(backend.devices or ('any',))} "
            f"devices, got {dtype} on {device_type}: use backend={_auto(device_type, dtype, quiet=True).name!r} (or "
            "'auto')"
        )
    return backend


def backends() -> dict[str, BackendStatus]:
    """Each backend with whether it can run here, why not, and the devices for which ``auto`` chooses it."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    chosen = {device: _auto(device, torch.float32, quiet=True) for device in devices}
    report = {}
    for backend in BACKENDS:
        reason = backend.unavailable()
        auto_for = tuple(device for device, choice in chosen.items() if choice is backend)
        report[backend.name] = BackendStatus(reason is None, reason or backend.describe(), auto_for)
    return report


def _auto(device_type: str, dtype: torch.dtype, quiet: bool = False) -> Backend:
    missing = f"There is no fused scan for {device_type}."
    for backend in BACKENDS:
        if dtype not in backend.dtypes or not _covers(backend.auto_for, device_type):
            continue
        reason = backend.unavailable()
        if reason is None:
            break
        missing = reason
    # float64 is asked for to be exact, and nothing runs on the meta device: neither expects a fused kernel.
    quiet = quiet or dtype == torch.float64 or device_type == "meta" or torch.compiler.is_compiling()
    slow = f"selective_scan runs its portable PyTorch form on {device_type}: correct, but many times slower. {missing}"
    if backend.auto_for is None and not quiet and slow not in _warned:
        _warned.add(slow)
        warnings.warn(slow, stacklevel=3)
    return backend


def _covers(devices: tuple[str, ...] | None, device_type: str) -> bool:
    return devices is None or device_type in devices


def _alternatives(values: tuple[object, ...]) -> str:
    *rest, last = (str(value).removeprefix("torch.") for value in values)
    return f"{', '.join(rest)} or {last}" if rest else last
