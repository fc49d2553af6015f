"""Time a training step of variants: ``python -m benchmarks.fidelity.step_time design [--rounds 15]``.

In one process and in turn, so that what else the machine does falls on all alike. Only the ratios are worth anything.
Reading data is left out; settings that do not change the model differ by what the machine does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch

import benchmarks.fidelity.variants  # noqa: F401  (registers the models)
from benchmarks.fidelity.experiments import EXPERIMENTS
from benchmarks.timing import RESULTS, measure, medians, show, write
from recipes.sisma import train
from recipes.sisma.pairs import load_autoencoder
from recipes.sisma.runs import new_model
from ssmgen import build
from ssmgen.precision import choose_precision
from ssmgen.training.launch import make_accelerator
from ssmgen.training.step import prepare, training_step

TIMED = "a training step, without reading data"


def main() -> None:
    """Time, show, write."""
    parser = argparse.ArgumentParser("python -m benchmarks.fidelity.step_time", description=__doc__)
    parser.add_argument("experiment", choices=[name for name, e in EXPERIMENTS.items() if not e.sampled])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    experiment = EXPERIMENTS[arguments.experiment]
    steps = {name: whole_step(experiment.training(words)) for name, words in experiment.variants.items()}
    times = measure(steps, arguments.rounds)
    first = next(iter(times))
    show(f"{arguments.experiment}: a training step", times, first)
    base = medians(times)[first]
    ratios = {name: round(median / base, 3) for name, median in medians(times).items()}
    module = f"fidelity.step_time {arguments.experiment} --rounds {arguments.rounds}"
    milliseconds = {name: round(median, 1) for name, median in medians(times).items()}
    content = {"timed": TIMED, "threads": torch.get_num_threads(), "milliseconds": milliseconds, "ratios": ratios}
    write(RESULTS / "fidelity" / f"step-time-{arguments.experiment}.json", module, content)


def whole_step(words: list[str]) -> Callable[[], None]:
    """A training step of a variant, on latents and masks of the shapes it is trained on."""
    config = train.parse(words)
    autoencoder = load_autoencoder(config)
    settings = replace(config.train, precision=choose_precision(config.train.precision).precision, steps=10**6)
    accelerator = make_accelerator(settings, quiet=True)
    state = prepare(new_model(config, autoencoder), settings, accelerator)
    objective = build("flow-matching", t_sampling=config.t_sampling)
    side = config.image_size // autoencoder.factor
    latents = torch.randn(config.train.batch_size, autoencoder.channels, side, side)
    masks = torch.randint(0, 19, (config.train.batch_size, config.image_size, config.image_size), dtype=torch.uint8)
    batch = {"data": latents, "mask": masks}
    return lambda: training_step(state, objective, batch, settings, 0)


if __name__ == "__main__":
    main()
