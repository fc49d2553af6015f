"""Write a block and train a model of it: ``python -m tutorials.write_a_block``. See docs/tutorials/block.md."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssmgen import build, register
from ssmgen.data import CELEBAMASK19, DrawnFaces, LatentCache, write_latent_cache
from ssmgen.models import TokenModel
from ssmgen.training import TrainSettings, train


@register("block", "two-way-mamba")
class TwoWayMamba(nn.Module):
    """Scan forwards and backwards."""

    def __init__(self, dim: int, d_state: int = 16) -> None:
        super().__init__()
        self.forwards = build("self-mamba", dim=dim, d_state=d_state, order="row")
        self.backwards = build("self-mamba", dim=dim, d_state=d_state, order="row-reversed")

    def forward(self, x, size):
        return self.forwards(x, size) + self.backwards(x, size)


register(
    "model",
    "two-way-debug",
    **{"mixer": "two-way-mamba", "cross": {"mask": "cross-mamba"}, "num_classes": 19},
    **{"dim": 96, "depth": 2, "in_channels": 3, "mask_scale": 1, "patch_size": 4},
)(TokenModel)


def main() -> None:
    options = parse()

    block = build("two-way-mamba", dim=64)
    out = block(torch.randn(2, 6 * 8, 64), (6, 8))
    assert out.shape == (2, 48, 64)

    faces = DrawnFaces(options.faces, size=32)
    if not (options.out / "cache").exists():
        write_latent_cache(faces, build("identity"), options.out / "cache")
    cache = LatentCache(options.out / "cache", CELEBAMASK19)
    objective = build("flow-matching")
    settings = TrainSettings(steps=options.steps, batch_size=16, lr=2e-3, warmup=50, ema_decay=0.99)
    for name in ("two-way-debug", "sisma-debug"):
        torch.manual_seed(0)
        model = build(name, dim=96, patch_size=4, mask_input="add")
        trained = train(model, objective, cache, settings, options.out / name, resume="auto").ema
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{name}: {size:.2f} M parameters, loss on unseen faces {unseen_loss(trained, objective):.4f}")


@torch.no_grad()
def unseen_loss(model: nn.Module, objective: Any) -> float:
    """The loss on 64 faces that no run has seen, with the same noise and times for every model."""
    faces = DrawnFaces(64, size=32, start=1_000_000)
    images, masks = (torch.stack(part) for part in zip(*(faces[i] for i in range(64)), strict=True))
    same = torch.Generator().manual_seed(0)
    return objective.loss(model.eval(), images / 127.5 - 1, generator=same, mask=masks).item()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/two-way"), help="folder to write")
    parser.add_argument("--faces", type=int, default=1024, help="faces to draw")
    parser.add_argument("--steps", type=int, default=200, help="steps to train each of the two models")
    return parser.parse_args()


if __name__ == "__main__":
    main()
