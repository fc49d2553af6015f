"""Time the selective scan's CPU backends against mambapy and a per-step loop: ``python -m benchmarks.scan``.

One process, interleaved, medians; every implementation gets its native layout. ``--json FILE`` also writes the figures
with hardware, versions and commit. Ratios are what to quote: single times move with the load of the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.sisma.evaluate import provenance
from ssmgen.ops import backends, selective_scan

#: (batch, dim, length, d_state)
SHAPES = [(1, 2048, 256, 16), (1, 768, 1024, 16), (8, 2048, 256, 16), (2, 384, 4096, 16)]
Scan = Callable[..., Tensor]


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


def mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """mambapy's parallel scan, used as its own MambaBlock uses it."""
    from mambapy.pscan import pscan

    delta = F.softplus(delta + bias)
    states = pscan(torch.exp(delta.unsqueeze(-1) * A), delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1))
    return (states @ C.unsqueeze(-1)).squeeze(3) + D * u


def step_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """The algorithm of mamba-ssm's reference: decays and inputs for all steps at once, then a loop that slices them."""
    delta = F.softplus(delta + bias)
    decays = torch.exp(torch.einsum("bld,dn->bdln", delta, A))
    driven = torch.einsum("bld,bln,bld->bdln", delta, B, u)
    state = u.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for k in range(u.shape[1]):
        state = decays[:, :, k] * state + driven[:, :, k]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, k]))
    return torch.stack(outputs, dim=1) + D * u


def forward(scan: Scan, tensors: list[Tensor]) -> None:
    """One call without gradients."""
    with torch.no_grad():
        scan(*tensors)


def with_backward(scan: Scan, tensors: list[Tensor]) -> None:
    """One call and its backward."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = scan(*leaves)
    y.backward(torch.ones_like(y))


def measure(
    scans: dict[str, Scan], tensors: list[Tensor], call: Callable[..., None], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each scan in each round, taken in turn after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in scans}
    for number in range(rounds + 1):
        for name, scan in scans.items():
            started = time.perf_counter()
            call(scan, tensors)
            if number:
                times[name].append((time.perf_counter() - started) * 1e3)
    return times


def main() -> None:
    """Print a table per shape; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument(
        "--loop", action="store_true", help="also time the per-step loop (minutes: its backward is slow)"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    scans = {"ssmgen cpu": ours("cpu"), "ssmgen portable": ours("portable"), "mambapy": mambapy}
    print(f"{backends()['cpu'].detail}; torch {torch.__version__}; median of {arguments.rounds}, interleaved")
    rows = []
    for shape in SHAPES:
        tensors = inputs(*shape)
        for label, call in (("forward", forward), ("forward + backward", with_backward)):
            chosen = scans | ({"per-step loop": step_loop} if arguments.loop and shape == SHAPES[0] else {})
            times = measure(chosen, tensors, call, arguments.rounds)
            medians = {name: statistics.median(values) for name, values in times.items()}
            print(f"\n(batch, dim, length, d_state) = {shape}, {label}")
            for name, median in medians.items():
                spread = f"{min(times[name]):.2f} .. {max(times[name]):.2f}"
                ratio = median / medians["ssmgen cpu"]
                print(f"  {name:<16}{median:>10.2f} ms   ({spread})   {ratio:.1f}x")
            rows.append({"shape": shape, "what": label, "milliseconds": times, "medians": medians})
    if arguments.json:
        content = {"rows": rows, **provenance("python -m benchmarks.scan", 0)}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
