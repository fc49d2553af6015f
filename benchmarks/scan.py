"""The selective scan's CPU backends against mambapy, a per-step loop and the floor: ``python -m benchmarks.scan``.

Every implementation gets its native layout. Ratios are what to quote: single times move with the load of the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.floor import FORWARD, WITH_BACKWARD, floor_ms, vector_rate
from benchmarks.timing import arguments, measure, medians, show, write
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


def main() -> None:
    """Print a table per shape; write JSON if asked."""
    given = arguments(__doc__, rounds=5)
    scans = {"ssmgen cpu": ours("cpu"), "ssmgen portable": ours("portable"), "mambapy": mambapy}
    print(f"{backends()['cpu'].detail}; torch {torch.__version__}; median of {given.rounds}, interleaved")
    rows = []
    for shape in SHAPES:
        tensors = inputs(*shape)
        for label, call, operations in (
            ("forward", forward, FORWARD),
            ("forward + backward", with_backward, WITH_BACKWARD),
        ):
            times = measure({name: partial(call, scan, tensors) for name, scan in scans.items()}, given.rounds)
            if label == "forward" and shape == SHAPES[0]:
                times |= measure({"per-step loop": partial(call, step_loop, tensors)}, 1)
            show(f"(batch, dim, length, d_state) = {shape}, {label}", times, "ssmgen cpu")
            floor = floor_ms(shape, operations)
            print(f"  {'arithmetic floor':<34}{floor:>10.2f} ms   {medians(times)['ssmgen cpu'] / floor:.2f} times it")
            rows.append(
                {"shape": shape, "what": label, "milliseconds": times, "medians": medians(times), "floor": floor}
            )
    write(given.json, "scan", {"rows": rows, "vector_rate": vector_rate()})


if __name__ == "__main__":
    main()
