"""Which backend runs an operator: the choice by device and dtype, and the report of what can run."""

import warnings
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ssmgen.ops.backend import Backend, ScanBackend, apply_to
from ssmgen.ops.scan_order import ScanOrder, reorder

B = TypeVar("B", bound=Backend)
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


@dataclass
class Operator(Generic[B]):
    """A public function with several implementations.

    Args:
        name: of the function.
        backends: in order of preference: ``auto`` takes the first that lists the device in ``auto_for``, takes the
            dtype and can run. The last of them that ``auto`` may take must run everywhere.
        slow_form: what to call that last one in the warning that it runs; no warning where None.
    """

    name: str
    backends: tuple[B, ...]
    slow_form: str | None = None

    def choose(self, device_type: str, dtype: torch.dtype, name: str = "auto") -> B:
        """The backend that runs for a device and dtype; warns once where ``auto`` chooses a slow one.

        Raises:
            ValueError: an unknown name.
            RuntimeError: the backend cannot run here, or does not take this device or dtype.
        """
        if name == "auto":
            return self._auto(device_type, dtype)
        known = {backend.name: backend for backend in self.backends}
        if name not in known:
            raise ValueError(f"unknown backend {name!r}: expected 'auto' or one of {', '.join(known)}")
        backend = known[name]
        reason = backend.unavailable()
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
        if dtype not in backend.dtypes or not _covers(backend.devices, device_type):
            raise RuntimeError(
                f"backend {name!r} takes {_alternatives(backend.dtypes)} on "
                f"{_alternatives(backend.devices or ('any',))} devices, got {dtype} on {device_type}: use "
                f"backend={self._auto(device_type, dtype, quiet=True).name!r} (or 'auto')"
            )
        return backend

    def report(self) -> dict[str, BackendStatus]:
        """Each backend with whether it can run here, why not, and the devices for which ``auto`` chooses it."""
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        chosen = {device: self._auto(device, torch.float32, quiet=True) for device in devices}
        report = {}
        for backend in self.backends:
            reason = backend.unavailable()
            auto_for = tuple(device for device, choice in chosen.items() if choice is backend)
            report[backend.name] = BackendStatus(reason is None, reason or backend.describe(), auto_for)
        return report

    def _auto(self, device_type: str, dtype: torch.dtype, quiet: bool = False) -> B:
        missing = f"There is no fused scan for {device_type}."
        for backend in self.backends:
            if dtype not in backend.dtypes or not _covers(backend.auto_for, device_type):
                continue
            reason = backend.unavailable()
            if reason is None:
                break
            missing = reason
        # float64 is asked for to be exact, and nothing runs on the meta device: neither expects a fused kernel.
        quiet = quiet or dtype == torch.float64 or device_type == "meta" or torch.compiler.is_compiling()
        if self.slow_form is None or backend.auto_for is not None or quiet:
            return backend
        slow = f"{self.name} runs its {self.slow_form} on {device_type}: correct, but many times slower. {missing}"
        if slow not in _warned:
            _warned.add(slow)
            warnings.warn(slow, stacklevel=4)
        return backend


def run_scan(
    operator: Operator[ScanBackend], inputs: Any, sequences: tuple[str, ...], order: ScanOrder | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Run a scan by the backend that is asked for, in an order.

    Args:
        operator: the scan.
        inputs: its inputs, the scanned sequence first, without an order.
        sequences: the names of those with a row for each token.
        order: the sequence in which the tokens are scanned; as they lie where None.
        backend: its name, or ``"auto"``.

    Returns:
        ``y``, ``(batch, length, ...)`` like the scanned sequence, and the last state.

    Raises:
        ValueError: an order that does not fit the sequence, or, on the CPU, is no permutation with its inverse.
    """
    x = inputs[0]
    chosen = operator.choose(x.device.type, x.dtype, backend)
    if order is None:
        return chosen.scan(inputs)
    _check_order(order, x)
    if chosen.takes_order:
        return chosen.scan(inputs._replace(order=order.forward))
    y, last_state = chosen.scan(apply_to(inputs, lambda tokens: reorder(tokens, order.forward), *sequences))
    return reorder(y, order.inverse), last_state


def _check_order(order: ScanOrder, x: Tensor) -> None:
    batch, length = x.shape[:2]
    for index in order:
        fits = index.shape == order.forward.shape and tuple(index.shape) in ((length,), (batch, length))
        if not fits or index.dtype != torch.int64 or index.device != x.device:
            raise ValueError(
                f"order must be two int64 tensors ({length},) for all images or ({batch}, {length}) for one order per "
                f"image, on {x.device}, as ssmgen.ops.scan_order makes them for {length} tokens, got {index.dtype} "
                f"{tuple(index.shape)} on {index.device}"
            )
    # Reading it on a GPU would wait for the device at each call; graphs being compiled and fake tensors have no values.
    readable = x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()
    if readable and not _is_permutation(order):
        raise ValueError(
            f"order must hold each of 0..{length - 1} once, and its inverse undo it: make it with ssmgen.ops.scan_order"
        )


def _is_permutation(order: ScanOrder) -> bool:
    places = torch.arange(order.forward.shape[-1], device=order.forward.device)
    each_once = bool((order.forward.sort(-1).values == places).all())
    return each_once and bool((order.inverse.gather(-1, order.forward) == places).all())


def _covers(devices: tuple[str, ...] | None, device_type: str) -> bool:
    return devices is None or device_type in devices


def _alternatives(values: tuple[object, ...]) -> str:
    *rest, last = (str(value).removeprefix("torch.") for value in values)
    return f"{', '.join(rest)} or {last}" if rest else last
