"""One SISMA block with each scan, its share of the time, and its cost per token: ``python -m benchmarks.blocks``.

Width 1024, batch 1, float32. The peers' scans take the place of ours inside the same block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import benchmarks.scan as scans
from benchmarks import peers
from benchmarks.timing import arguments, measure, medians, show, write
from ssmgen import build
from ssmgen.ops import ScanInputs
from ssmgen.ops.scan import reference
from ssmgen.ops.scan.selective_scan import SELECTIVE_SCAN

WIDTH = 1024


def add_backends() -> list[str]:
    """Make the peers' scans backends of `selective_scan`, for this process; their names."""
    found = peers.load({"mambapy": peers.mambapy, scans.REFERENCE: peers.mamba_ssm_reference})
    for name, scan in found.items():
        members = vars(reference) | {"name": name, "scan": partial(_scan, scan)}
        SELECTIVE_SCAN.backends += (SimpleNamespace(**members),)
    return list(found)


def _scan(scan: Callable[..., Tensor], inputs: ScanInputs) -> tuple[Any, None]:
    u, delta, A, B, C, D, _, bias, *_ = inputs
    return scan(u, delta, A, B, C, D, bias), None


def block(backend: str, length: int) -> Callable[[], object]:
    """A forward pass of the block without gradients, the mask's part made beforehand as in sampling left in."""
    torch.manual_seed(0)
    module = build("sisma-block", dim=WIDTH, backend=backend).eval()
    return partial(_forward, module, *_tokens(length))


def _tokens(length: int) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    side = int(length**0.5)
    tokens = torch.randn(1, side * side, WIDTH)
    return tokens, torch.randn(1, WIDTH), torch.randn_like(tokens), (side, side)


def _forward(module: nn.Module, *given: Any) -> object:
    with torch.no_grad():
        return module(*given)


def scan_alone(length: int) -> Callable[[], object]:
    """Both scans of the block."""
    tensors = scans.inputs(1, 2 * WIDTH, length, 16)

    def both() -> None:
        for _ in range(2):
            scans.forward(scans.ours("auto"), tensors)

    return both


def training_step(backend: str) -> Callable[[], object]:
    """Forward and backward of a model of two blocks of width 384, batch 4, 256 tokens."""
    torch.manual_seed(0)
    model = build("sisma-s", depth=2, backend=backend)
    x, t, mask = torch.randn(4, 4, 32, 32), torch.rand(4), torch.randint(0, 19, (4, 256, 256))

    def step() -> None:
        model(x, t, mask).square().mean().backward()

    return step


def layers() -> dict[str, Callable[[], object]]:
    """Our layer and transformers', which has the same sizes but for its convolution."""
    x = torch.randn(1, 256, WIDTH)
    calls = {"ssmgen self-mamba": partial(_forward, build("self-mamba", dim=WIDTH).eval(), x, (16, 16))}
    theirs = peers.load({"transformers' MambaMixer": partial(peers.transformers_mixer, WIDTH)})
    return calls | {name: partial(_forward, layer, x) for name, layer in theirs.items()}


def main() -> None:
    """Print the tables; write JSON if asked."""
    given = arguments(__doc__, rounds=5)
    rivals = add_backends()
    rows = []

    def table(title: str, times: dict[str, list[float]], against: str) -> None:
        show(title, times, against)
        rows.append({"what": title, "milliseconds": times, "medians": medians(times)})

    for length in (256, 1024):
        calls = {"ssmgen": block("auto", length), "both scans of it alone": scan_alone(length)}
        calls |= {name: block(name, length) for name in rivals if name != scans.REFERENCE}
        times = measure(calls, given.rounds)
        if scans.REFERENCE in rivals:
            times |= measure({scans.REFERENCE: block(scans.REFERENCE, length)}, 1)
        table(f"block forward, width {WIDTH}, {length} tokens", times, "ssmgen")
    table(f"one Mamba layer forward, width {WIDTH}, 256 tokens", measure(layers(), given.rounds), "ssmgen self-mamba")
    per_token = measure({f"{n} tokens": block("auto", n) for n in (1024, 16384)}, given.rounds)
    thousand = {name: [ms / int(name.split()[0]) * 1000 for ms in values] for name, values in per_token.items()}
    table("block forward, milliseconds per 1,000 tokens", thousand, "1024 tokens")
    steps = {"ssmgen": training_step("auto")}
    steps |= {name: training_step(name) for name in rivals if name != scans.REFERENCE}
    table("training step, 2 blocks of width 384, batch 4, 256 tokens", measure(steps, given.rounds), "ssmgen")
    write(given.json, "blocks", {"rows": rows})


if __name__ == "__main__":
    main()
