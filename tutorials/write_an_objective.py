"""Write an objective: ``python -m tutorials.write_an_objective``. Explained in docs/tutorials/objective.md."""

from __future__ import annotations

import argparse

import torch

from ssmgen import build, initial_noise, register, sample
from ssmgen.data import DrawnFaces
from ssmgen.objectives import FlowMatching


@register("objective", "data-prediction")
class DataPrediction(FlowMatching):
    """The model predicts the data; the loss is still that of the velocity, kept finite near t = 1."""

    def loss(self, model, data, noise=None, t=None, generator=None, **condition):
        def as_velocity(x_t, t, **condition):
            return self.velocity(model(x_t, t, **condition), x_t, t)

        return super().loss(as_velocity, data, noise, t, generator, **condition)

    def velocity(self, prediction, x_t, t):
        remaining = (1 - t).clamp(min=0.05).view(-1, *[1] * (x_t.dim() - 1))
        return (prediction - x_t) / remaining


def main() -> None:
    options = parse()
    check_with_a_perfect_model()

    faces = DrawnFaces(options.faces, size=32)
    images, masks = (torch.stack(part) for part in zip(*(faces[i] for i in range(len(faces))), strict=True))
    data = images / 127.5 - 1
    for name in ("flow-matching", "data-prediction"):
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


def check_with_a_perfect_model() -> None:
    """A model that knows the answer has no loss, and following its velocity ends in the data."""
    objective = build("data-prediction")
    data, noise = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    t = torch.tensor([0.0, 0.3, 0.6, 0.9])
    assert objective.loss(lambda x_t, t: data, data, noise, t) < 1e-10
    x_t = objective.interpolate(noise, data, t)
    torch.testing.assert_close(objective.velocity(data, x_t, t), data - noise)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faces", type=int, default=512, help="faces to draw")
    parser.add_argument("--steps", type=int, default=200, help="steps to train each of the two models")
    return parser.parse_args()


if __name__ == "__main__":
    main()
