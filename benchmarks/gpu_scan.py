"""The Triton scan on a GPU against mamba-ssm's CUDA op and the bound: ``python -m benchmarks.gpu_scan``.

The bound is the larger of two times: reading and writing every tensor once at the memory's rate, and one exponential a
state update at four to a clock and quarter of a multiprocessor. mamba-ssm is timed where it is installed with its
compiled op, on tensors in its own layout; where it is not, that is said.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor

from benchmarks.scan import forward, inputs, ours, with_backward
from benchmarks.timing import arguments, measure, medians, show, write
from ssmgen.ops import backends

SHAPES = [(1, 2048, 256, 16), (8, 2048, 256, 16), (32, 2048, 256, 16), (1, 2048, 4096, 16), (8, 768, 1024, 16)]
#: Bytes a second of the memory and the highest clock, by device name.
LIMITS = {"H100": (3.35e12, 1.98e9), "H200": (4.8e12, 1.98e9)}
_EXPONENTIALS_PER_CLOCK = 16
_REPEATS = 20


def mamba_ssm(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """mamba-ssm's CUDA op; its channel-first layout is made here and counted, as a channel-last model pays for it."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, B, C = (x.transpose(1, 2).contiguous() for x in (u, delta, B, C))
    return selective_scan_fn(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True).transpose(1, 2)


def bound_ms(shape: tuple[int, int, int, int], bytes_per_value: int) -> float | None:
    """Milliseconds no forward can be faster than; None on a GPU whose memory rate is not in the table."""
    batch, dim, length, d_state = shape
    properties = torch.cuda.get_device_properties(0)
    limits = next((limits for name, limits in LIMITS.items() if name in properties.name), None)
    if limits is None:
        return None
    bandwidth, clock = limits
    memory = bytes_per_value * batch * length * (3 * dim + 2 * d_state) / bandwidth
    exponentials = batch * length * dim * d_state / (properties.multi_processor_count * _EXPONENTIALS_PER_CLOCK * clock)
    return 1e3 * max(memory, exponentials)


def main() -> None:
    """Print a table per shape and dtype; write JSON if asked."""
    given = arguments(__doc__, rounds=5)
    if not torch.cuda.is_available():
        print("no CUDA device is visible: nothing was timed")
        return
    scans = {"ssmgen triton": ours("triton"), "ssmgen portable": ours("portable")}
    status = backends()["mamba-ssm"]
    if status.available:
        scans["mamba-ssm"] = mamba_ssm
    else:
        print(f"mamba-ssm is not timed: {status.detail}", file=sys.stderr)
    rows = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = on_gpu(inputs(*shape), dtype)
            for label, call in (("forward", forward), ("forward + backward", with_backward)):
                calls = {name: partial(_often, call, scan, tensors) for name, scan in scans.items()}
                times = {
                    name: [ms / _REPEATS for ms in values] for name, values in measure(calls, given.rounds).items()
                }
                bound = bound_ms(shape, tensors[0].element_size()) if label == "forward" else None
                show(f"{shape}, {dtype}, {label}; bound {bound}", times, "ssmgen triton")
                rows.append(
                    {"shape": shape, "dtype": str(dtype), "what": label, "medians": medians(times), "bound": bound}
                )
    write(given.json, "gpu_scan", {"rows": rows, "mamba_ssm": status.detail})


def on_gpu(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """u, delta, B and C in ``dtype``; A, D and the bias stay float32."""
    narrow = (0, 1, 3, 4)
    return [x.cuda().to(dtype if i in narrow else torch.float32) for i, x in enumerate(tensors)]


def _often(call: object, scan: object, tensors: list[Tensor]) -> None:
    for _ in range(_REPEATS):
        call(scan, tensors)  # type: ignore[operator]


if __name__ == "__main__":
    main()
