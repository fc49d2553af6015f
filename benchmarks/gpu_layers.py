"""The layers around the scan on a GPU, beside torch's own functions: ``python -m benchmarks.gpu_layers``.

The convolution with its SiLU reads the first half of wider rows, as it does in a block. The floor is the time to read
each input and write each result once at the memory's rate. The embedding is timed with the time of Python, which is
small beside it, since torch's backward of it may not be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpus import Limits, limits, measure_kernels
from benchmarks.rows import run
from benchmarks.scan import forward, with_backward
from benchmarks.timing import arguments, measure, medians, show
from ssmgen.ops import conv_silu, sum_rows

#: (batch, height, width, dim)
SHAPES = [(1, 16, 16, 2048), (8, 16, 16, 2048), (32, 16, 16, 2048), (2, 64, 64, 768)]
#: (tokens, places, classes, dim) of the label map of `sisma-xl`, eight images of 256 pixels.
EMBEDDING = (8 * 256, 256, 20, 1024)
BACKENDS = ("triton", "torch")
Calls = dict[str, Callable[[], object]]


def conv_calls(shape: tuple[int, int, int, int], dtype: torch.dtype, backward: bool, device: str) -> Calls:
    """The convolution of each backend, with or without gradients."""
    batch, height, width, dim = shape
    wide = torch.randn(batch, height * width, 2 * dim, device=device, dtype=dtype)
    weights = [torch.randn(dim, 1, 3, 3, device=device, dtype=dtype), torch.randn(dim, device=device, dtype=dtype)]

    def call(backend: str, x: Tensor, *weights: Tensor) -> Tensor:
        return conv_silu(x, *weights, (height, width), backend=backend)

    of = with_backward if backward else forward
    return {f"conv_silu {name}": partial(of, partial(call, name), [wide[..., :dim], *weights]) for name in BACKENDS}


def embedding_calls(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Calls:
    """The embedding of each backend, with its gradient."""
    tokens, places, classes, dim = shape
    labels = torch.randint(0, classes, (tokens, places), device=device)
    rows = labels + classes * torch.arange(places, device=device)
    table = torch.randn(places * classes, dim, device=device, dtype=dtype)

    def call(backend: str, table: Tensor) -> Tensor:
        return sum_rows(table, rows, classes, backend=backend)

    return {f"sum_rows {name}": partial(with_backward, partial(call, name), [table]) for name in ("dense", "torch")}


def floor_ms(
    shape: tuple[int, int, int, int], dtype: torch.dtype, backward: bool, found: Limits | None
) -> float | None:
    """Milliseconds to read the tokens and write the result.

    With backward, also to read the tokens and the gradient of the result, and to write that of the tokens.
    """
    batch, height, width, dim = shape
    values = batch * height * width * dim * (5 if backward else 2)
    return None if found is None else 1e3 * values * dtype.itemsize / found.bandwidth


def main() -> None:
    """Print a table per shape and dtype; write JSON if asked."""
    given = arguments(__doc__, rounds=5, rows=True)
    if not torch.cuda.is_available():
        print("no CUDA device is visible: nothing was timed")
        return
    rows = {
        f"conv {shape} {str(dtype).removeprefix('torch.')} {what}": partial(_conv, shape, dtype, what, given.rounds)
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
        for what in ("forward", "forward + backward")
    }
    rows |= {
        f"embedding {str(dtype).removeprefix('torch.')}": partial(_embedding, dtype, given.rounds)
        for dtype in (torch.float32, torch.bfloat16)
    }
    run(given, "gpu_layers", {"rows": rows})


def _conv(shape: tuple[int, int, int, int], dtype: torch.dtype, what: str, rounds: int) -> dict[str, Any]:
    backward = what != "forward"
    times = measure_kernels(conv_calls(shape, dtype, backward, "cuda"), rounds)
    return _figures(f"convolution, {shape}, {dtype}, {what}", times, floor_ms(shape, dtype, backward, limits()))


def _embedding(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    times = measure(embedding_calls(EMBEDDING, dtype, "cuda"), rounds)
    return _figures(f"embedding, {EMBEDDING}, {dtype}, forward + backward", times, None)


def _figures(what: str, times: dict[str, list[float]], floor: float | None) -> dict[str, Any]:
    show(f"{what}; floor {floor}", times, next(iter(times)))
    return {"what": what, "milliseconds": times, "medians": medians(times), "floor": floor}


if __name__ == "__main__":
    main()
