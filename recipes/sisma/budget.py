"""The number of steps of a run that leaves it to the time there is: ``steps=0 minutes=6``."""

from __future__ import annotations

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
    """Where ``steps`` is left open and a run is continued, the number that the run began with; else the same settings.

    Raises:
        UsageError: ``steps`` is left open without ``minutes``, or the run to continue does not tell its number.
    """
    if config.train.steps < 0:
        raise UsageError(f"steps must be positive, or 0 for as many as fit in minutes=; got {config.train.steps}")
    if config.train.steps:
        return _with_its_cosine(config).with_steps(config.train.steps)
    if config.minutes <= 0:
        raise UsageError(f"steps must be positive, or 0 with minutes= to train for; got minutes={config.minutes:g}")
    if config.resume == "no":
        return config
    run = _run_of(config)
    if (run / "config.yaml").is_file():
        return config.with_steps(load_config(run).train.steps)
    if config.resume != "auto" or checkpoints(run / "checkpoints"):
        raise UsageError(f"{run / 'config.yaml'}: not found, so the run's number of steps is not known: give steps=")
    return config


def _with_its_cosine(config: Config) -> Config:
    """Where a run is continued for fewer steps than its cosine has, and none is asked for: that cosine."""
    file = _run_of(config) / "config.yaml"
    if config.resume == "no" or config.train.lr_decay_steps is not None or not file.is_file():
        return config
    before = load_config(file.parent).train.lr_decay_steps or 0
    if before <= config.train.steps:
        return config
    return replace(config, train=replace(config.train, lr_decay_steps=before))


def _run_of(config: Config) -> Path:
    """The folder of the run that is begun or continued."""
    return Path(config.run) if config.resume in ("no", "auto") else Path(config.resume).parent.parent


def most_steps(config: Config) -> int:
    """The largest number that may be chosen: a cosine that is to end earlier is not trained beyond."""
    end = config.train.lr_decay_steps or 0
    return min(MOST, end) if end > 0 else MOST


def choose_steps(config: Config, seconds_per_step: Callable[[], float], *, quiet: bool = False) -> Config:
    """The settings with a number of steps: their own, or as many as fit in ``minutes``.

    Args:
        config: settings; ``steps`` 0 leaves the number open.
        seconds_per_step: measures a step; called only where the number is open.
        quiet: do not say what was chosen.
    """
    if config.train.steps:
        return config
    seconds, most = seconds_per_step(), most_steps(config)
    fitting = int(60 * config.minutes / seconds) // _MULTIPLE * _MULTIPLE
    steps = min(max(fitting, LEAST), most)
    if not quiet:
        print(f"measured {seconds:.2f} s a step: {_why(config, steps, fitting, seconds)}", file=sys.stderr)
    return config.with_steps(steps)


def _why(config: Config, steps: int, fitting: int, seconds: float) -> str:
    if steps == fitting:
        return f"{steps} steps fit in {config.minutes:g} minutes"
    bound = "as many as the cosine of the learning rate has" if steps < MOST and steps == most_steps(config) else (
        f"the {'most' if steps < fitting else 'fewest'} that are chosen"
    )  # fmt: skip
    return f"{steps} steps, {bound}, take about {steps * seconds / 60:.1f} minutes ({config.minutes:g} were asked for)"
