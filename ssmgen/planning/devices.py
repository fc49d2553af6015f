"""Figures of devices: published ones for GPUs, measured ones for this machine."""

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ssmgen import bench
from ssmgen.ops import selective_scan
from ssmgen.registry import closest


@dataclass(frozen=True)
class Device:
    """Rates of one device and its connections. Those of GPUs are peaks; `shares` of them are assumed to be reached.

    Attributes:
        name: as ``--gpu`` takes it.
        bfloat16, float32: operations of dense matrix products per second.
        memory, bandwidth: bytes, and bytes per second.
        link: bytes per second that one device sends to others in its node; NVLink where there is one.
        per_node: devices in a node.
        network: bytes per second that one device sends to other nodes; None where no vendor's system defines it.
        scan_forward, scan_backward: state updates of the selective scan per second.
        call: seconds of the host per operation.
        matrix_share, bandwidth_share, link_share: assumed shares of the peaks.
        memory_share: share of the memory that tensors can fill.
        waits: a CPU: it waits for each operation rather than running ahead, and hides no traffic behind arithmetic.
        source: where the figures come from.
    """

    name: str
    bfloat16: float
    float32: float
    memory: float
    bandwidth: float
    link: float
    per_node: int
    network: float | None
    scan_forward: float
    scan_backward: float
    source: str
    # Large bfloat16 products reach 60 to 75 % of the peak and copies 80 to 90 %; the lower ends are taken. An eager
    # operation costs the host 5 to 10 microseconds. None of the four was measured for this package.
    call: float = 7e-6
    matrix_share: float = 0.6
    bandwidth_share: float = 0.8
    link_share: float = 0.8
    memory_share: float = 0.9
    waits: bool = False

    def matrix(self, precision: str) -> float:
        """Operations per second that matrix products are assumed to reach; ``"bf16"`` or ``"no"`` (float32)."""
        return self.matrix_share * (self.bfloat16 if precision == "bf16" else self.float32)


# Cycles of a streaming multiprocessor per state update in the package's Triton scan, forward and backward. The modelled
# cycles of a quarter of a multiprocessor for bfloat16 in an order, d_state 16, that `tests/test_ops_triton.py` pins,
# for 67.1 million updates on 132 multiprocessors. No GPU ran it; the model is good to about 40 %.
_FORWARD_CYCLES, _BACKWARD_CYCLES = (132 * cycles / (8 * 2048 * 256 * 16) for cycles in (48_848, 291_852))


def _gpu(name: str, multiprocessors: int, clock: float, **figures: Any) -> Device:
    cycles = multiprocessors * clock
    return Device(name, scan_forward=cycles / _FORWARD_CYCLES, scan_backward=cycles / _BACKWARD_CYCLES, **figures)


_HOPPER: dict[str, Any] = {"bfloat16": 989e12, "float32": 67e12, "link": 450e9, "per_node": 8, "network": 50e9}

#: GPUs by name: dense rates without sparsity, links in one direction.
DEVICES = {
    device.name: device
    for device in (
        _gpu(
            *("h100", 132, 1.98e9),
            **_HOPPER,
            memory=80e9,
            bandwidth=3.35e12,
            source="NVIDIA H100 datasheet (SXM5); DGX H100: 8 GPUs, 400 Gb/s of InfiniBand each",
        ),
        _gpu(
            *("h200", 132, 1.98e9),
            **_HOPPER,
            memory=141e9,
            bandwidth=4.8e12,
            source="NVIDIA H200 datasheet (SXM); DGX H200: 8 GPUs, 400 Gb/s of InfiniBand each",
        ),
        _gpu(
            *("a100", 108, 1.41e9),
            bfloat16=312e12,
            float32=19.5e12,
            memory=80e9,
            bandwidth=2.039e12,
            link=300e9,
            per_node=8,
            network=25e9,
            source="NVIDIA A100 80GB datasheet (SXM4); DGX A100: 8 GPUs, 200 Gb/s of InfiniBand each",
        ),
        _gpu(
            *("l40s", 142, 2.52e9),
            bfloat16=362e12,
            float32=91.6e12,
            memory=48e9,
            bandwidth=0.864e12,
            link=32e9,
            per_node=8,
            network=None,
            source="NVIDIA L40S datasheet; PCIe 4.0 x16, no NVLink; 8 in a node is an assumption",
        ),
        _gpu(
            *("rtx-4090", 128, 2.52e9),
            bfloat16=165.2e12,
            float32=82.6e12,
            memory=24e9,
            bandwidth=1.008e12,
            link=32e9,
            per_node=8,
            network=None,
            source="NVIDIA Ada GPU architecture whitepaper; PCIe 4.0 x16, no NVLink; 8 in a node is an assumption",
        ),
    )
}


def device_named(name: str) -> Device:
    """A GPU of `DEVICES`, or ``"cpu"``: this machine, measured for a moment.

    Raises:
        ValueError: an unknown name; offers the closest.
    """
    if name == "cpu":
        return measured(bench.measure(rate_calls(), 9))
    if name not in DEVICES:
        near = closest(name.lower(), [*DEVICES, "cpu"])
        raise ValueError(f"no figures for the GPU {name!r}{near} There are: {', '.join(DEVICES)}, and cpu.")
    return DEVICES[name]


# Products of a feed-forward of width 384 on 1,024 tokens, the three of a linear layer; tensors of 32 MB, which no cache
# holds; a scan of 768 channels; and an operation on one number.
_TOKENS, _WIDTH, _WIDER, _VALUES, _CHANNELS, _STATES, _TINY = 1024, 384, 1536, 2**23, 768, 16, 200
_TIMED = ("float32", "bfloat16", "bandwidth", "scan forward", "scan both", "calls")


def rate_calls() -> dict[str, Callable[[], object]]:
    """What `measured` needs the times of; each takes some milliseconds."""
    x, weight, up = torch.randn(_TOKENS, _WIDTH), torch.randn(_WIDER, _WIDTH), torch.randn(_TOKENS, _WIDER)
    halves = [tensor.bfloat16() for tensor in (x, weight, up)]
    a, b, out = torch.randn(3, _VALUES)
    one = torch.zeros(1)
    scan = bench.scan_inputs(1, _TOKENS, _CHANNELS, "cpu")
    run = partial(selective_scan, **scan, delta_softplus=True)
    return {
        "float32": partial(_linear, x, weight, up),
        "bfloat16": partial(_linear, *halves),
        "bandwidth": partial(torch.mul, a, b, out=out),
        "scan forward": partial(bench.forward, run),
        "scan both": partial(bench.forward_backward, run, list(scan.values())),
        "calls": partial(_tiny, one),
    }


def measured(times: dict[str, list[float]]) -> Device:
    """This machine's CPU from the seconds of `rate_calls`; medians count."""
    seconds = {name: statistics.median(times[name]) for name in _TIMED}
    products = 6 * _TOKENS * _WIDTH * _WIDER
    updates = _TOKENS * _CHANNELS * _STATES
    return Device(
        name="cpu",
        bfloat16=products / seconds["bfloat16"],
        float32=products / seconds["float32"],
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        bandwidth=12 * _VALUES / seconds["bandwidth"],
        link=0.0,
        per_node=1,
        network=None,
        scan_forward=updates / seconds["scan forward"],
        scan_backward=updates / (seconds["scan both"] - seconds["scan forward"]),
        call=seconds["calls"] / _TINY,
        source="measured on this machine just now",
        matrix_share=1.0,
        bandwidth_share=1.0,
        waits=True,
    )


@torch.no_grad()
def _linear(x: torch.Tensor, weight: torch.Tensor, up: torch.Tensor) -> None:
    F.linear(x, weight)
    torch.mm(up, weight)
    torch.mm(up.mT, x)


def _tiny(one: torch.Tensor) -> None:
    for _ in range(_TINY):
        torch.add(one, one)
