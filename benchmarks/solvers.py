"""Error of every fixed-step solver against its evaluations, on a trained model: ``python -m benchmarks.solvers RUN``.

The error is that of the sampled latents against a fine reference from the same noise (rk4, 50 steps), relative and
over all images: ``|x - reference| / |reference|``. Weights, masks and noise are the same for all.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import write
from recipes.sisma.pairs import held_out_pairs
from recipes.sisma.presets import Config
from recipes.sisma.runs import load_run
from ssmgen import MaskToImage, build, initial_noise, names

EVALUATIONS = (6, 10, 16, 25, 50)
SHIFTS = (1.0, 2.0)


def main() -> None:
    """Print the table; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="a run of recipes.sisma.train")
    parser.add_argument("--masks", type=int, default=4, help="unseen masks, one image each (default 4)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    pipe, run = load_run(arguments.run)
    rows = measure(pipe, run.config, arguments.masks)
    print(f"relative error of the endpoint, guidance {run.config.sampling.guidance_scale}, {arguments.masks} masks")
    print(f"{'solver':<10}{'shift':>6}{'steps':>7}{'NFE':>6}{'error':>10}")
    for row in rows:
        print("{solver:<10}{shift:>6}{steps:>7}{evaluations:>6}{error:>10.4f}".format(**row))
    content = {"rows": rows, "guidance_scale": run.config.sampling.guidance_scale, "step": run.step}
    write(arguments.json, shlex.join(["solvers", str(arguments.run)]), content)


def measure(pipe: MaskToImage, config: Config, count: int) -> list[dict[str, object]]:
    """One row for each solver, shift and number of evaluations, and 200 Euler steps as the paper takes them."""
    pairs = held_out_pairs(config, count)
    masks = torch.stack([pairs[i][1] for i in range(count)])
    noise = initial_noise(range(count), pipe.latent_size)

    def endpoint(solver: str, steps: int, shift: float = 1.0) -> Tensor:
        return pipe.sampler(
            noise, masks, solver=solver, steps=steps, shift=shift, guidance_scale=config.sampling.guidance_scale
        )

    reference = endpoint("rk4", 50)
    fixed = [name for name in names("solver") if not build(name).adaptive]
    rows = []
    for solver in fixed:
        for shift in SHIFTS:
            for wanted in (*EVALUATIONS, *([200] if solver == "euler" else [])):
                steps = max(n for n in range(1, wanted + 1) if build(solver).nfe(n) <= wanted)
                error = (endpoint(solver, steps, shift) - reference).norm() / reference.norm()
                evaluations = build(solver).nfe(steps)
                rows.append(dict(solver=solver, shift=shift, steps=steps, evaluations=evaluations, error=error.item()))
    return rows


if __name__ == "__main__":
    main()
