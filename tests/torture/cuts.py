"""Trainings that are cut at a drawn step and resumed: every bit equals that of an uncut one."""

import os
import signal
from pathlib import Path
from typing import Any

import torch

from torture.campaign import Campaign, Case, Failed, status_name
from torture.process import end, fork
from torture.trainings import same_end, trained

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)


def cut(case: Case) -> str:
    """Train once without a cut and once with one or two, and compare."""
    draw = case.random
    options = drawn_options(case)
    whole, parts, output = case.folder / "whole", case.folder / "parts", case.folder / "output.txt"
    _end_of(whole, options, output, [0])
    cuts = sorted(draw.sample(range(1, options["steps"]), draw.choice((1, 1, 2))))
    for step in cuts:
        number = draw.choice(_SIGNALS)
        allowed = [-signal.SIGKILL] if number == signal.SIGKILL else [0]
        _end_of(parts, options, output, allowed, _SignalAt(step, number))
    _end_of(parts, options, output, [0])
    same_end(whole, parts)
    return f"{options['optimizer']}, {options['num_workers']} workers"


def drawn_options(case: Case) -> dict[str, Any]:
    """Settings of a small training, of those that decide what a step sees and changes."""
    draw = case.random
    return {
        "steps": draw.randint(4, 12),
        "accumulate": draw.choice((1, 2, 4)),
        "optimizer": draw.choice(("adamw", "muon")),
        "num_workers": draw.choice((0, 2)),
        "ema_decay": draw.choice((0.9, 0.999)),
        "clip": draw.choice((0.0, 1.0)),
        "checkpoint_every": draw.randint(1, 5),
        "log_every": draw.randint(1, 4),
        "lr_decay_steps": draw.choice((0, None)),
        "precision": draw.choice(("no", "no", "bf16")),
        "seed": draw.randrange(2**31),
        "checkpoint_activations": draw.random() < 0.3,
    }


class _SignalAt:
    """Sends a signal to this process after a step. A training that begins there is not in its loop yet."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number, self.begun = step, number, False

    def __call__(self, done: int, model: torch.nn.Module) -> Path | None:
        if done == self.step and (self.begun or self.number == signal.SIGKILL):
            os.kill(os.getpid(), self.number)
        self.begun = True
        return None


def _end_of(folder: Path, options: dict[str, Any], output: Path, allowed: list[int], on_step: Any = None) -> None:
    status = end(fork(lambda: trained(folder, on_step=on_step, **options), output), 60)
    if status not in allowed:
        raise Failed(f"training {options} ended with {status_name(status)}: {output.read_text()[-3000:]}")


CAMPAIGN = Campaign(
    "cuts",
    "A training cut at a drawn step (SIGTERM, SIGINT, SIGKILL; once or twice) and resumed equals an uncut one: "
    "weights, average, optimiser, state and log, to the bit",
    cut,
    200,
    limit=120,
)
