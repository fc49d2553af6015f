"""The number of steps of a run that leaves it to the time there is: ``steps=0 minutes=6``."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from recipes.sisma.arguments import UsageError
from recipes.sisma.presets import Config
from recipes.sisma.runs import load_config
from ssmgen.training import checkpoints

#: With fewer steps the faces hardly follow their masks; with more, the small network of `quick` gains little.
LEAST, MOST = 400, 1300
# Measurements on one machine differ by some percent; rounded, they mostly give the same number.
_MULTIPLE = 50


def continued(config: Config) -> Config:
    """The settings with what a run to be continued knows: its number of steps where ``steps`` leaves it open.

    For fewer ``steps`` than its cosine has, the run keeps that cosine, unless ``lr_decay_steps`` gives another.

    Raises:
        UsageError: ``steps`` is left open without ``minutes``, or the run to continue does not tell its number.
    """
    run = Path(config.run) if config.resume in ("no", "auto") else Path(config.resume).parent.parent
    known = config.resume != "no" and (run / "config.yaml").is_file()
    steps = config.train.steps
    if steps:
        if known and config.train.lr_decay_steps is None:
            cosine = load_config(run).train.lr_decay_steps or 0
            if cosine > steps:
                config = replace(config, train=replace(config.train, lr_decay_steps=cosine))
        return config.with_steps(steps)
    if config.minutes <= 0:
        raise UsageError(f"steps must be positive, or 0 with minutes= to train for; got minutes={config.minutes:g}")
    if known:
        return config.with_steps(load_config(run).train.steps)
    if config.resume != "no" and (config.resume != "auto" or checkpoints(run / "checkpoints")):
        raise UsageError(f"{run / 'config.yaml'}: not found, so the run's number of steps is not known: give steps=")
    return config


def most_steps(config: Config) -> int:
    """The largest number that may be chosen: a cosine that is to end earlier is not trained beyond."""
    end = config.train.lr_decay_steps or 0
    return min(MOST, end) if end > 0 else MOST


def choose_steps(config: Config, seconds_per_step: Callable[[], float], *, quiet: bool = False) -> Config:
    """The settings with a number of steps: their own, or as many as fit in ``minutes``, which a measured step tells."""
    if config.train.steps:
        return config
    seconds = seconds_per_step()
    fitting = int(60 * config.minutes / seconds) // _MULTIPLE * _MULTIPLE
    steps = min(max(fitting, LEAST), most_steps(config))
    if not quiet:
        print(f"measured {seconds:.2f} s a step: {_why(config, steps, fitting, seconds)}", file=sys.stderr)
    return config.with_steps(steps)


def _why(config: Config, steps: int, fitting: int, seconds: float) -> str:
    if steps == fitting:
        return f"{steps} steps fit in {config.minutes:g} minutes"
    bound = f"the {'most' if steps < fitting else 'fewest'} that are chosen"
    if steps == most_steps(config) < MOST:
        bound = "as many as the cosine of the learning rate has"
    return f"{steps} steps, {bound}, take about {steps * seconds / 60:.1f} minutes ({config.minutes:g} were asked for)"
