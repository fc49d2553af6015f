"""A Cross-Mamba of ``sisma-xl`` with and without kept states: ``python -m benchmarks.kept_states``.

Both are timed in turn on the same inputs, over several layers, so that states come from memory and not from a cache.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import arguments, measure, medians, write
from ssmgen.nn import CrossCondition, CrossMamba
from ssmgen.nn.kept_states import read_states
from ssmgen.nn.parts import expanded

SIZE, DIM, LAYERS = (16, 16), 1024, 3


def main() -> None:
    """Print ratios of medians."""
    given = arguments(__doc__, rounds=7)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layers = [CrossMamba(DIM, order="column").eval().to(device) for _ in range(LAYERS)]
    with torch.no_grad():
        conds = [layer.condition(torch.randn(1, 256, DIM, device=device), SIZE) for layer in layers]
        kept = _kept(layers, conds)
        ratios = {}
        for batch in (1, 8):
            x, C = torch.randn(batch, 256, DIM, device=device), torch.randn(batch, 256, 16, device=device)
            ways = {
                "scan": lambda C=C: [_scan(*pair, C) for pair in zip(layers, conds, strict=True)],
                "read": lambda C=C: [read_states([each], C) for each in kept],
                "layer, scanned": partial(_layers, layers, conds, x),
                "layer, kept": partial(_layers, layers, kept, x),
                "keep": partial(_kept, layers, conds),
            }
            found = medians(measure(ways, given.rounds))
            ratios[batch] = {
                "read / scan": found["read"] / found["scan"],
                "layer kept / scanned": found["layer, kept"] / found["layer, scanned"],
                "computing the states / scan": found["keep"] / found["scan"],
            }
            print(f"batch {batch}: {', '.join(f'{name} {ratio:.2f}' for name, ratio in ratios[batch].items())}")
    write(given.json, "kept_states", {"ratios": ratios})


def _kept(layers: list[CrossMamba], conds: list[CrossCondition]) -> list[Any]:
    return [layer.keep(cond, SIZE) for layer, cond in zip(layers, conds, strict=True)]


def _scan(layer: CrossMamba, cond: CrossCondition, C: Tensor) -> Tensor:
    own: CrossCondition = expanded(cond, len(C))
    assert own.u is not None
    return layer.ssm.scan(own.u, own.delta, own.B, C, SIZE, constants=own.constants)


def _layers(layers: list[CrossMamba], conds: list[CrossCondition], x: Tensor) -> None:
    for layer, cond in zip(layers, conds, strict=True):
        layer(x, cond, SIZE)


if __name__ == "__main__":
    main()
