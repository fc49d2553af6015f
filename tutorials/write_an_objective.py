"""Write an objective: ``python -m tutorials.write_an_objective``. Explained in docs/tutorials/objective.md."""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from ssmgen import build, initial_noise, register, sample
from ssmgen.data import DrawnFaces
from ssmgen.objectives import GaussianObjective, Path

# The network predicts the data; the loss is still that of the velocity, finite near t = 1.
register("objective", "data-prediction", prediction="data", weighting="velocity", smallest=0.05)(GaussianObjective)


class CosinePath(Path):
    """A quarter of a circle: alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * t)

    def alpha_rate(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.sigma(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.alpha(t)


register("objective", "cosine-v", path=CosinePath(), prediction="v")(GaussianObjective)
NEW = ("data-prediction", "cosine-v")


def main() -> None:
    options = parse()
    for name in NEW:
        check_with_a_perfect_model(name)

    faces = DrawnFaces(options.faces, size=32)
    images, masks = (torch.stack(part) for part in zip(*(faces[i] for i in range(len(faces))), strict=True))
    data = images / 127.5 - 1
    for name in ("flow-matching", *NEW):
        objective, losses = build(name), []
        torch.manual_seed(0)
        model = build("sisma-debug", dim=96, patch_size=4, mask_input="add")
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(options.steps):
            rows = torch.randint(len(faces), (16,))
            loss = objective.loss(model, data[rows], mask=masks[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        last = losses[-50:]
        made = sample(model, initial_noise([0], (3, 32, 32)), masks[:1], objective=objective, steps=12)
        print(f"{name}: mean loss of the last {len(last)} steps {sum(last) / len(last):.4f}, sample {made.std():.2f}")


def check_with_a_perfect_model(name: str) -> None:
    """A model that knows the answer has no loss, and its prediction converts to the true velocity and the data."""
    objective = build(name)
    data, noise = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    t = torch.tensor([0.0, 0.3, 0.6, 0.9])
    prediction = objective.target(noise, data, t)
    assert objective.loss(lambda x_t, t: prediction, data, noise, t) == 0
    x_t = objective.path.interpolate(noise, data, t)
    velocity = objective.path.velocity(noise, data, t)
    torch.testing.assert_close(objective.velocity(prediction, x_t, t), velocity, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(objective.data(prediction, x_t, t), data, rtol=1e-4, atol=1e-4)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faces", type=int, default=512, help="faces to draw")
    parser.add_argument("--steps", type=int, default=200, help="steps to train each model")
    return parser.parse_args()


if __name__ == "__main__":
    main()
