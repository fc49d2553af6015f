"""Short timings on this machine: the scan by backend, one block, and the rates behind ``ssmgen info``'s guess.

Everything is timed in one process, in turn, and medians are compared: single times vary with the machine's load.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ssmgen.models.summary import SCAN_FLOPS
from ssmgen.ops import backends, selective_scan
from ssmgen.registry import build

#: The parts that `timings` times for each backend.
PARTS = ("scan forward", "scan forward + backward", "block forward", "block forward + backward")
_STATES = 16
Key = TypeVar("Key")


@dataclass(frozen=True)
class Rates:
    """Measured float32 throughput of matrix products and of scans, in operations per second."""

    device: str
    matrix: float
    scan: float


def default_device() -> str:
    """``cuda`` if available, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def rates(device: str) -> Rates:
    """Time a square matrix product and a scan, each for a fraction of a second; raises the error of `check_device`."""
    check_device(device)
    side = 4096 if device == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device)
    tokens, dim = 1024, 1024
    scan = partial(selective_scan, **scan_inputs(1, tokens, dim, device), delta_softplus=True)
    times = measure({"matrix": partial(torch.matmul, a, b), "scan": partial(forward, scan)}, 7)
    operations = {"matrix": 2 * side**3, "scan": SCAN_FLOPS * tokens * dim * _STATES}
    throughput = {name: operations[name] / statistics.median(seconds) for name, seconds in times.items()}
    return Rates(device, **throughput)


def timings(*, tokens: int, dim: int, batch: int, rounds: int, device: str) -> dict[str, dict[str, list[float]]]:
    """Seconds of each part in each round, by part and backend; backends that cannot run here are left out.

    Args:
        tokens: length of the sequence; the block gets the most nearly square grid of that many tokens.
        dim: width of the block; the scan has the block's ``2 * dim`` channels and 16 states.
        batch: sequences at a time.
        rounds: timed rounds, after one warm-up.
        device: ``cpu`` or ``cuda``.

    Raises:
        ValueError: a size below 1, or see `check_device`.
    """
    for name, value in (("tokens", tokens), ("dim", dim), ("batch", batch), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_device(device)
    torch.manual_seed(0)
    tensors = scan_inputs(batch, tokens, 2 * dim, device)
    inputs = _block_inputs(batch, tokens, dim, device)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for backend in usable(device):
        scan = partial(selective_scan, **tensors, delta_softplus=True, backend=backend)
        block = build("sisma-block", dim=dim, backend=backend).to(device)
        weights = [p for p in block.parameters() if p.requires_grad]
        for part, run, leaves in (("scan", scan, list(tensors.values())), ("block", partial(block, *inputs), weights)):
            calls[f"{part} forward", backend] = partial(forward, run)
            calls[f"{part} forward + backward", backend] = partial(forward_backward, run, leaves)
    times = measure(calls, rounds)
    return {part: {backend: t for (timed, backend), t in times.items() if timed == part} for part in PARTS}


def usable(device: str) -> list[str]:
    """The backends that run on a device; the one that ``auto`` takes comes first."""
    report = backends()
    elsewhere = {"cpu": ("triton", "mamba-ssm"), "cuda": ("cpu",)}[device]
    found = [name for name, status in report.items() if status.available and name not in elsewhere]
    return sorted(found, key=lambda name: device not in report[name].auto_for)


def check_device(device: str) -> None:
    """Raise a ValueError for a device other than ``cpu`` and ``cuda``, or for ``cuda`` if torch sees no such device."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch sees no CUDA device here; 'ssmgen doctor' lists what it sees")


def measure(calls: dict[Key, Callable[[], object]], rounds: int) -> dict[Key, list[float]]:
    """Seconds of each call in each round; the calls take turns, after one warm-up of each."""
    times: dict[Key, list[float]] = {name: [] for name in calls}
    for number in range(-1, rounds):
        for name, call in calls.items():
            _wait()
            started = time.perf_counter()
            call()
            _wait()
            if number >= 0:
                times[name].append(time.perf_counter() - started)
    return times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def scan_inputs(batch: int, tokens: int, channels: int, device: str) -> dict[str, Any]:
    """Random arguments of `selective_scan` with 16 states, all of which require gradients."""
    u, delta = torch.randn(2, batch, tokens, channels, device=device)
    B, C = torch.randn(2, batch, tokens, _STATES, device=device)
    A = -torch.rand(channels, _STATES, device=device) - 0.5
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": torch.ones(channels, device=device)}
    return {name: x.requires_grad_() for name, x in tensors.items()}


def _block_inputs(batch: int, tokens: int, dim: int, device: str) -> tuple[Any, ...]:
    height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    x, mask_tokens = torch.randn(2, batch, tokens, dim, device=device)
    return x, torch.randn(batch, dim, device=device), {"mask": mask_tokens}, (height, tokens // height)


@torch.no_grad()
def forward(run: Callable[[], object]) -> None:
    """Run without gradients."""
    run()


def forward_backward(run: Callable[[], Any], leaves: list[Tensor]) -> None:
    """Run, and compute the gradients of ``leaves``, tensors of any shape."""
    torch.autograd.grad(run().sum(), leaves, allow_unused=True)
