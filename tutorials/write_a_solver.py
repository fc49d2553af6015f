"""Write two solvers and measure them: ``python -m tutorials.write_a_solver``. See docs/tutorials/solver.md."""

from __future__ import annotations

import argparse
import math

import torch

from ssmgen import MaskToImage, build, register
from ssmgen.data import draw_face
from ssmgen.solvers import RungeKutta, Solver


@register("solver", "ralston")
def ralston() -> RungeKutta:
    """Ralston's second-order method: its Butcher tableau is all there is to say."""
    return RungeKutta(order=2, nodes=(0.0, 2 / 3), matrix=((2 / 3,),), weights=(0.25, 0.75))


@register("solver", "leapfrog")
class Leapfrog(Solver):
    """Two-step midpoint: x[n + 1] = x[n - 1] + 2 h f(x[n]). One evaluation a step; needs a uniform grid."""

    order = 2

    def nfe(self, steps: int) -> int:
        return steps + 1

    def _integrate(self, f, x0, ts, progress):
        h = ts[1] - ts[0]
        if not torch.allclose(ts.diff(), h.expand(len(ts) - 1)):
            raise ValueError("leapfrog needs a uniform time grid: use shift=1")
        before, x = x0, build("midpoint").solve(f, x0, ts[:2])
        for step, t in enumerate(ts[1:-1], start=1):
            before, x = x, before + 2 * h * f(t, x)
            if progress is not None:
                progress(step + 1, x)
        return x


def main() -> None:
    options = parse()
    for name in ("ralston", "leapfrog"):
        print(f"{name}: order {measured_order(name):.2f}, {build(name).nfe(12)} evaluations in 12 steps")

    pipe = MaskToImage.from_pretrained(options.model)
    masks = [draw_face(1_000_000 + index, pipe.recipe.image_size)[1] for index in range(options.masks)]
    settings = {"guidance_scale": 1.0, "output_type": "latent"}  # guidance that begins later breaks the path there
    fine = pipe(masks, solver="rk4", steps=options.fine, **settings)
    for name, steps in (("euler", 24), ("heun", 12), ("ralston", 12), ("leapfrog", 23), ("ab3", 23)):
        rough = pipe(masks, solver=name, steps=steps, **settings)
        error = (rough - fine).norm() / fine.norm()
        print(f"{name:9} {build(name).nfe(steps)} evaluations: {error:.4f} off")


def measured_order(name: str) -> float:
    """The slope of the error on x' = -2 t x^2, whose solution from x = 1 is 1 / (1 + t^2)."""
    errors = []
    for steps in (64, 128):
        grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        end = build(name).solve(lambda t, x: -2 * t * x**2, torch.ones(1, dtype=torch.float64), grid)
        errors.append(abs(end.item() - 0.5))
    return math.log2(errors[0] / errors[1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="drawn-faces", help="what MaskToImage.from_pretrained takes")
    parser.add_argument("--masks", type=int, default=4, help="unseen masks to measure on")
    parser.add_argument("--fine", type=int, default=50, help="rk4 steps of the reference")
    return parser.parse_args()


if __name__ == "__main__":
    main()
