"""Predictions beside measurements, on this machine: the same model of time and memory, with the rates of its CPU."""

import ctypes
import gc
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmgen import bench
from ssmgen.planning.counting import count_step
from ssmgen.planning.devices import measured, rate_calls
from ssmgen.planning.plan import Job, memory_of, peak_of, reduce_seconds, seconds_of
from ssmgen.registry import build
from ssmgen.training import make_optimizer, moving_average
from ssmgen.training.launch import keep_freed_memory

#: Models, their settings, and batches that the check runs: two-block versions, and a latent of 32 x 32.
CASES: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("sisma-s", {"depth": 2}, 4),
    ("sisma-mini", {}, 16),
    ("dit-s", {"depth": 2}, 4),
    ("sisma-attn-s", {"depth": 2}, 4),
    ("sisma-attn-s", {"depth": 2}, 8),
)
SIZE = 32
_M_MMAP_THRESHOLD = -3  # malloc.h of glibc


@dataclass(frozen=True)
class Checked:
    """One quantity: predicted and measured, bytes or seconds."""

    what: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1


def check_here(rounds: int, cases: tuple[Any, ...] = CASES, size: int = SIZE) -> dict[str, list[Checked]]:
    """Measure and predict; "seconds of a step", "activations", "peak" and "all-reduce" by case.

    Rates and steps take turns in one process, and medians count.
    """
    training_step("sisma-debug", {}, 1, 16)[0]()  # what a process allocates once
    found: dict[str, list[Checked]] = {"activations": [], "peak": [], "seconds of a step": []}
    steps: dict[str, Callable[[], object]] = {}
    predictions: dict[str, tuple[Job, Any]] = {}
    for name, settings, batch in cases:
        what = ", ".join([name, *(f"{key} {value}" for key, value in settings.items()), f"batch {batch}"])
        job = Job(name, 1, batch, size=size, precision="no")
        counts = count_step(name, batch, size, gpu=False, precision="no", **settings)
        predictions[what] = job, counts
        found["peak"].append(Checked(what, peak_of(counts, job), _peak_here(name, settings, batch, size)))
        step, model, loss = training_step(name, settings, batch, size)
        saved = saved_bytes(model, loss)
        found["activations"].append(Checked(what, memory_of(counts, job)["activations"], saved))
        steps[what] = step
    keep_freed_memory()  # as training does
    times = bench.measure(rate_calls() | steps, rounds)
    device = measured(times)
    for what, (_, counts) in predictions.items():
        average = 3 * counts.weights / device.bandwidth
        predicted = sum(seconds_of(counts.calls, device, "no").values()) + average
        found["seconds of a step"].append(Checked(what, predicted, statistics.median(times[what])))
    return found


def training_step(
    name: str, settings: dict[str, Any], batch: int, size: int
) -> tuple[Callable[[], None], nn.Module, Callable[[], Tensor]]:
    """A whole step on random latents ``(batch, channels, size, size)``, its model, and its loss ``()`` alone."""
    torch.manual_seed(0)
    model: Any = build(name, **settings).train()
    optimizer = make_optimizer(model, "adamw", lr=1e-4, weight_decay=0.0)
    ema, objective = moving_average(model, 0.99), build("flow-matching")
    x = torch.randn(batch, model.in_channels, size, size)
    side = size * model.mask_scale
    mask = torch.randint(0, model.num_classes, (batch, side, side))

    def loss() -> Tensor:
        value: Tensor = objective.loss(model, x, mask=mask)
        return value

    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(model)
        optimizer.zero_grad()

    return step, model, loss


def saved_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd saves for the backward pass of ``loss``, a scalar ``()``, without parameters.

    Every storage counts once.
    """
    held: dict[int, Tensor] = {}
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in owned:
            held[x.untyped_storage().data_ptr()] = x  # kept, so that its address is not given to another
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        value = loss()
    size = sum(x.untyped_storage().nbytes() for x in held.values())
    del value
    return size


def _peak_here(name: str, settings: dict[str, Any], batch: int, size: int) -> float:
    """How much the process grew at most while it trained, in bytes; NaN where the system does not say."""
    if platform.system() != "Linux":
        return float("nan")
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)  # freed tensors return to the system at once
    before = _status("VmRSS")
    step, *_ = training_step(name, settings, batch, size)
    step()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    step()
    most = _status("VmHWM") - before
    del step, _
    return most


def _status(field: str) -> float:
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024.0 * int(found[1])


def check_reduce(sizes: tuple[int, ...] = (2**24, 2**26), rounds: int = 9) -> list[Checked]:
    """An all-reduce of two processes over gloo, predicted from the rate at which they exchange one message."""
    with torch.multiprocessing.get_context("spawn").Pool(2) as pool:  # type: ignore[attr-defined]
        address = f"tcp://127.0.0.1:{_free_port()}"
        times, _ = pool.starmap(_exchange, [(rank, address, sizes, rounds) for rank in range(2)])
    bandwidth = 2**24 / times.pop("message")
    return [
        Checked(f"all-reduce of {size >> 20} MiB", reduce_seconds(size, 2, bandwidth), times[str(size)])
        for size in sizes
    ]


def _exchange(rank: int, address: str, sizes: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Median seconds of a message of 16 MiB each way, and of all-reduces."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    sent, received = torch.ones(2**22), torch.empty(2**22)
    tensors = {str(size): torch.ones(size // 4) for size in sizes}
    taken: dict[str, list[float]] = {}

    def message() -> None:
        request = dist.isend(sent, 1 - rank)
        dist.recv(received, 1 - rank)
        assert request is not None
        request.wait()

    calls: dict[str, Callable[[], object]] = {"message": message}
    calls |= {key: lambda x=x: dist.all_reduce(x) for key, x in tensors.items()}  # type: ignore[misc]
    for _ in range(rounds):
        for key, call in calls.items():
            dist.barrier()
            started = time.perf_counter()
            call()
            taken.setdefault(key, []).append(time.perf_counter() - started)
    dist.destroy_process_group()
    return {key: statistics.median(seconds) for key, seconds in taken.items()}


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
