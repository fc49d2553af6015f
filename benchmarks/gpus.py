"""What a GPU can do at most, and how calls on it are timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.timing import measure

#: Exponentials that one multiprocessor computes in a clock.
EXPONENTIALS_PER_CLOCK = 16
#: Milliseconds of calls in one timing, and calls in one where no CUDA graph is captured.
_REPEATED_MS, _REPEATS = 20, 20


class Limits(NamedTuple):
    """Bytes a second of the memory, the highest clock, and dense bfloat16 operations a second."""

    bandwidth: float
    clock: float
    bfloat16: float


#: By what a device's name contains.
LIMITS = {"H100 80GB HBM3": Limits(3.35e12, 1.98e9, 989e12), "H200": Limits(4.8e12, 1.98e9, 989e12)}


def limits() -> Limits | None:
    """Those of the current device; None on a CPU, and on a GPU that is not in the table."""
    if not torch.cuda.is_available():
        return None
    return next((found for name, found in LIMITS.items() if name in torch.cuda.get_device_name()), None)


def scan_floor_ms(
    shape: tuple[int, int, int, int], bytes_per_value: int, backward: bool, multiprocessors: int, found: Limits
) -> float:
    """Milliseconds that no scan of ``(batch, dim, length, d_state)`` can be faster than.

    The larger of two times: to read each input and write each result once, and to compute one exponential for each
    update of a state. With backward, ``u``, ``delta``, ``B``, ``C`` and the output's gradient are read once more and
    four gradients are written; that its states are computed again is not counted, for they might have been saved.
    """
    batch, dim, length, d_state = shape
    values = batch * length * (3 * dim + 2 * d_state)
    if backward:
        values += batch * length * (5 * dim + 4 * d_state)
    exponentials = batch * length * dim * d_state / (multiprocessors * EXPONENTIALS_PER_CLOCK * found.clock)
    return 1e3 * max(bytes_per_value * values / found.bandwidth, exponentials)


def measure_kernels(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, taken in turn, without the time that Python takes to launch it.

    Each call is captured in a CUDA graph, by `triton.testing.do_bench_cudagraph` where Triton has it; otherwise twenty
    calls are timed together, and at small sizes Python is part of what is timed.
    """
    captured = _captured()
    if captured is None:
        together = measure({name: _repeated(call) for name, call in calls.items()}, rounds)
        return {name: [ms / _REPEATS for ms in values] for name, values in together.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(captured(call, rep=_REPEATED_MS, return_mode="median"))
    return times


def _captured() -> Callable[..., float] | None:
    try:
        from triton import testing
    except ImportError:
        return None
    return getattr(testing, "do_bench_cudagraph", None)


def _repeated(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(_REPEATS):
            call()

    return run


def halved_until_it_fits(run: Callable[[int], Any], batch: int) -> tuple[Any, int]:
    """What ``run(batch)`` returns for the largest of batch, batch / 2, ... that fits into memory, and that batch."""
    while True:
        try:
            return run(batch), batch
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2  # outside of the handler, which keeps the tensors of the failed run alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
