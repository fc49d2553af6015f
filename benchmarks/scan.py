"""The scan on a CPU against mambapy, mamba-ssm's reference and the floor: ``python -m benchmarks.scan``.

Every implementation gets its native layout. mamba-ssm's reference is timed once at the first shape: it takes seconds,
and its backward grows with the square of the length. Ratios are what to quote: single times move with the load.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.floor import FORWARD, WITH_BACKWARD, floor_ms, vector_rate
from benchmarks.timing import arguments, measure, medians, show, write
from ssmgen.ops import backends, selective_scan

#: (batch, dim, length, d_state)
SHAPES = [(1, 2048, 256, 16), (1, 768, 1024, 16), (8, 2048, 256, 16), (2, 384, 4096, 16)]
Scan = Callable[..., Tensor]
REFERENCE = "mamba-ssm's reference"


def inputs(batch: int, dim: int, length: int, d_state: int) -> list[Tensor]:
    """u, delta, A, B, C, D, delta_bias, channel-last, as a trained layer has them in size."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    A = -torch.arange(1.0, d_state + 1).repeat(dim, 1)
    sequences = normal(batch, length, dim), normal(batch, length, dim) * 0.1
    maps = normal(batch, length, d_state), normal(batch, length, d_state)
    return [*sequences, A, *maps, normal(dim), normal(dim) - 4]


def ours(backend: str) -> Scan:
    """A backend of `selective_scan`."""

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        y = selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, backend=backend)
        assert isinstance(y, Tensor)
        return y

    return scan


def forward(scan: Scan, tensors: list[Tensor]) -> None:
    """One call without gradients."""
    with torch.no_grad():
        scan(*tensors)


def with_backward(scan: Scan, tensors: list[Tensor]) -> None:
    """One call and its backward."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = scan(*leaves)
    y.backward(torch.ones_like(y))


def main() -> None:
    """Print a table per shape; write JSON if asked."""
    given = arguments(__doc__, rounds=5)
    others = peers.load({"mambapy": peers.mambapy, REFERENCE: peers.mamba_ssm_reference})
    reference = others.pop(REFERENCE, None)
    scans = {"ssmgen cpu": ours("cpu"), "ssmgen portable": ours("portable"), **others}
    print(f"{backends()['cpu'].detail}; torch {torch.__version__}; median of {given.rounds}, interleaved")
    rows = []
    for shape in SHAPES:
        tensors = inputs(*shape)
        for label, call, operations in (
            ("forward", forward, FORWARD),
            ("forward + backward", with_backward, WITH_BACKWARD),
        ):
            times = measure({name: partial(call, scan, tensors) for name, scan in scans.items()}, given.rounds)
            if reference is not None and shape == SHAPES[0]:
                times |= measure({REFERENCE: partial(call, reference, peers.channel_first(tensors))}, 1, warm=False)
            show(f"(batch, dim, length, d_state) = {shape}, {label}", times, "ssmgen cpu")
            floor = floor_ms(shape, operations)
            print(f"  {'arithmetic floor':<34}{floor:>10.2f} ms   {medians(times)['ssmgen cpu'] / floor:.2f} times it")
            rows.append(
                {"shape": shape, "what": label, "milliseconds": times, "medians": medians(times), "floor": floor}
            )
    write(given.json, "scan", {"rows": rows, "vector_rate": vector_rate()})


if __name__ == "__main__":
    main()
