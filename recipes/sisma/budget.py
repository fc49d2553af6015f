"""The number of steps of a run that leaves it to the time there is: ``steps=0 minutes=6``."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
    if config.steps:
        return config.with_steps(config.steps)
    if config.minutes <= 0:
        raise UsageError(f"steps must be positive, or 0 with minutes= to train for; got minutes={config.minutes:g}")
    if config.resume == "no":
        return config
    run = Path(config.run) if config.resume == "auto" else Path(config.resume).parent.parent
    if (run / "config.yaml").is_file():
        return config.with_steps(load_config(run).steps)
    if config.resume != "auto" or checkpoints(run / "checkpoints"):
        raise UsageError(f"{run / 'config.yaml'}: not found, so the run's number of steps is not known: give steps=")
    return config


def most_steps(config: Config) -> int:
    """The largest number that may be chosen: a cosine that is to end earlier is not trained beyond."""
    end = config.lr_decay_steps or 0
    return min(MOST, end) if end > 0 else MOST


def choose_steps(config: Config, seconds_per_step: Callable[[], float], *, quiet: bool = False) -> Config:
    """The settings with a number of steps: their own, or as many as fit in ``minutes``.

    Args:
        config: settings; ``steps`` 0 leaves the number open.
        seconds_per_step: measures a step; called only where the number is open.
        quiet: do not say what was chosen.
    """
    if config.steps:
        return config
    seconds, most = seconds_per_step(), most_steps(config)
    fitting = int(60 * config.minutes / seconds) // _MULTIPLE * _MULTIPLE
    steps = min(max(fitting, LEAST), most)
    if not quiet:
        why = f"{steps} steps fit in {config.minutes:g} minutes" if steps == fitting else (
            f"{steps} steps, {'the most' if steps < fitting else 'the fewest'} that are chosen, "
            f"take {steps * seconds / 60:.1f} of {config.minutes:g} minutes"
        )  # fmt: skip
        print(f"measured {seconds:.2f} s a step: {why}", file=sys.stderr)
    return config.with_steps(steps)
