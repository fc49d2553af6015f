"""The Triton scan on a GPU against mamba-ssm's CUDA op and the floor: ``python -m benchmarks.gpu_scan``.

The floor is that of `benchmarks.gpus.scan_floor_ms`. mamba-ssm is timed where its op can be had: from the installed
package, or from the hub through the package ``kernels``. Its op is channel-first; the copies that a channel-last model
makes for it are part of its time.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpus import limits, measure_kernels, scan_floor_ms
from benchmarks.rows import run
from benchmarks.scan import Scan, forward, inputs, ours, with_backward
from benchmarks.timing import arguments, medians, show
from ssmgen.ops import backends

#: (batch, dim, length, d_state)
SHAPES = [
    *((1, 2048, 256, 16), (8, 2048, 256, 16), (32, 2048, 256, 16), (1, 768, 1024, 16), (8, 768, 1024, 16)),
    *((2, 384, 4096, 16), (1, 2048, 4096, 16), (8, 2048, 1024, 16)),
]
_HUB = "kernels-community/mamba-ssm"


def mamba_ssm() -> tuple[Scan | None, str]:
    """mamba-ssm's CUDA op as a channel-last scan and where it comes from, or None and why it cannot be had."""
    status = backends()["mamba-ssm"]
    try:
        if status.available:
            module, origin = importlib.import_module("mamba_ssm.ops.selective_scan_interface"), "the package mamba-ssm"
        else:
            package, origin = importlib.import_module("kernels").get_kernel(_HUB), f"{_HUB}, by the package kernels"
            module = importlib.import_module(f"{package.__name__}.ops.selective_scan_interface")
    except Exception as error:  # no package, no hub, or no build for this torch
        return None, f"{status.detail}; from the hub: {type(error).__name__}: {error}"
    op = module.selective_scan_fn

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        u, delta, B, C = (x.transpose(1, 2).contiguous() for x in (u, delta, B, C))
        return op(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True).transpose(1, 2)

    return scan, origin


def main() -> None:
    """Print a table per shape and dtype; write JSON if asked."""
    given = arguments(__doc__, rounds=5, rows=True)
    if not torch.cuda.is_available():
        print("no CUDA device is visible: nothing was timed")
        return
    scans = {"ssmgen triton": ours("triton"), "ssmgen portable": ours("portable")}
    peer, origin = mamba_ssm()
    if peer is None:
        print(f"mamba-ssm is not timed: {origin}", file=sys.stderr)
    else:
        scans["mamba-ssm"] = peer
    rows = {
        f"{shape} {str(dtype).removeprefix('torch.')} {what}": partial(_row, scans, shape, dtype, what, given.rounds)
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
        for what in ("forward", "forward + backward")
    }
    run(given, "gpu_scan", {"rows": rows}, mamba_ssm=origin)


def _row(
    scans: dict[str, Scan], shape: tuple[int, int, int, int], dtype: torch.dtype, what: str, rounds: int
) -> dict[str, Any]:
    tensors, backward = on_gpu(inputs(*shape), dtype), what != "forward"
    call = with_backward if backward else forward
    times = measure_kernels({name: partial(call, scan, tensors) for name, scan in scans.items()}, rounds)
    found, floor = limits(), None
    if found is not None:
        multiprocessors = torch.cuda.get_device_properties().multi_processor_count
        floor = scan_floor_ms(shape, tensors[0].element_size(), backward, multiprocessors, found)
    show(f"{shape}, {dtype}, {what}; floor {floor}", times, "ssmgen triton")
    figures = {"milliseconds": times, "medians": medians(times), "floor": floor}
    return {"shape": shape, "dtype": str(dtype), "what": what, **figures}


def on_gpu(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """u, delta, B and C in ``dtype``; A, D and the bias stay float32."""
    narrow = (0, 1, 3, 4)
    return [x.cuda().to(dtype if i in narrow else torch.float32) for i, x in enumerate(tensors)]


if __name__ == "__main__":
    main()
