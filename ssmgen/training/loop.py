"""The training loop.

Step k's examples, noise and times derive from (seed, k): on a CPU a resumed run equals an uninterrupted one to the bit.
"""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ssmgen.training.checkpoint import load_checkpoint, prune_checkpoints, save_checkpoint
from ssmgen.training.health import Health
from ssmgen.training.launch import make_accelerator, stop_requests
from ssmgen.training.log import RunLog
from ssmgen.training.resume import History, continued, find_checkpoint, schedule_changes, schedule_of, settle_precision
from ssmgen.training.settings import TrainSettings
from ssmgen.training.step import Batch, TrainState, batches_from, origin_of, prepare, training_step


@dataclass
class TrainResult:
    """The end of a training.

    Attributes:
        step: the step reached.
        seconds: duration of training, over the whole run.
        ema: the averaged weights.
        interrupted: it was asked to stop.
        skipped: steps of the whole run that changed no weight because the loss or the gradient was not finite.
        spikes: steps of the whole run whose loss was far above its running mean, see `ssmgen.training.health`.
    """

    step: int
    seconds: float
    ema: nn.Module
    interrupted: bool
    skipped: int = 0
    spikes: int = 0


@dataclass
class _Progress:
    """How far a run has come, and what its checkpoints say of it."""

    step: int
    health: Health
    seconds_before: float  # in earlier parts of the run
    pending: list[float | None]  # losses that the log has not written yet
    history: History
    record: dict[str, Any]
    started: float | None = None

    def check_trained(self) -> None:
        """Raise `FloatingPointError` if every step was skipped."""
        if self.health.skipped == self.step:
            raise FloatingPointError(
                f"none of the {self.step} steps had a finite loss and gradient, so nothing was trained: lower lr, or "
                "look at the data and the autoencoder"
            )

    def seconds(self) -> float:
        return self.seconds_before + (0 if self.started is None else time.monotonic() - self.started)

    def for_checkpoint(self, pending: list[float | None]) -> dict[str, Any]:
        """What a checkpoint keeps beside the weights."""
        kept = {"seconds": self.seconds(), "pending": pending, "schedule": self.history}
        return kept | {"record": self.record, "health": asdict(self.health)}


def train(
    model: nn.Module,
    objective: Any,
    data: Dataset[Batch],
    settings: TrainSettings,
    run: Path,
    *,
    record: dict[str, Any] | None = None,
    resume: Path | str | None = None,
    on_step: Callable[[int, nn.Module], Path | None] | None = None,
) -> TrainResult:
    """Train ``model`` and write log and checkpoints into the folder ``run``.

    On a CPU the process keeps the memory it frees from now on, see `ssmgen.training.launch.keep_freed_memory`.

    Args:
        model: what is trained.
        objective: has ``loss(model, data, **others)``, see `ssmgen.objectives`.
        data: the examples. ``data[index, draw]`` is a mapping ``{"data": x, NAME: condition, ...}`` with the names of
            the model's conditions and an optional ``weight`` of the error; ``draw`` counts the epochs and seeds
            augmentation. A batch of them goes to the loss as keyword arguments.
        settings: how to train.
        run: gets ``log.jsonl`` and ``checkpoints/``.
        record: what a checkpoint must agree on to be resumed, besides the precision; JSON. An ``lr_decay_steps`` in it
            may grow or become 0.
        resume: ``"auto"`` for the newest usable checkpoint of ``run``, a checkpoint's folder, or None to start afresh.
        on_step: called by the main process as ``on_step(step, ema_model)`` after each step and at the start. It may
            return the file of a picture of samples, which goes to the tracker.

    Raises:
        ValueError: ``settings.steps`` is 0, or the batch does not divide into processes and parts.
        CheckpointError: nothing usable to resume from, or it belongs to another configuration.
        FloatingPointError: the loss or its gradient was not finite ten steps in a row, or in every step of the run.
        OSError: a checkpoint cannot be written; the older ones are intact.
    """
    if settings.steps < 1:
        raise ValueError(f"steps={settings.steps} leaves the number of steps undecided: set TrainSettings.steps")
    torch.set_float32_matmul_precision(settings.matmul_precision)
    accelerator = make_accelerator(settings)
    settings = settle_precision(settings, run, resume, accelerator)
    record = (record or {}) | {"precision": settings.precision}
    state = prepare(model, settings, accelerator)
    progress = _resumed(state, settings, run, resume, record)
    if progress.step < settings.steps:
        _steps(state, objective, data, settings, progress, run, on_step)
        accelerator.wait_for_everyone()
    else:
        progress.check_trained()
    interrupted = progress.step < settings.steps
    health = progress.health
    return TrainResult(progress.step, progress.seconds(), state.ema.module, interrupted, health.skipped, health.spikes)


def _resumed(
    state: TrainState, settings: TrainSettings, run: Path, resume: Path | str | None, record: dict[str, Any]
) -> _Progress:
    """Load the checkpoint to resume from, if any."""
    found = find_checkpoint(run, resume, record)
    saved = load_checkpoint(found, **state.saved) if found else {}
    step, seconds = (saved.get(key, 0) for key in ("step", "seconds"))
    health = Health(**saved.get("health", {"skipped": saved.get("skipped", 0)}))  # earlier checkpoints count no spikes
    history = continued(schedule_of(saved, settings.decay_steps), step, settings.decay_steps)
    return _Progress(step, health, seconds, saved.get("pending", []), history, record)


def _steps(
    state: TrainState,
    objective: Any,
    data: Dataset[Batch],
    settings: TrainSettings,
    progress: _Progress,
    run: Path,
    on_step: Callable[[int, nn.Module], Path | None] | None,
) -> None:
    """Train until the last step or a request to stop; the main process logs, samples and saves."""
    batches, log = batches_from(progress.step, data, settings, state.accelerator), None
    if state.accelerator.is_main_process:
        log = RunLog(run, progress.step, settings, progress.record, progress.pending)
        _warn_of_the_rate(settings, progress)
        if on_step is not None:
            on_step(progress.step, state.ema.module)
    state.wrapped.train()
    progress.started = time.monotonic()
    with log or nullcontext(), stop_requests() as stop:
        for batch in batches:
            result = training_step(state, objective, batch, settings, progress.step, bool(stop))
            event = progress.health.count(result.loss, result.norm)
            progress.step += 1
            step = progress.step
            ending = step >= settings.steps or result.stop
            if log is not None and event is not None:
                log.event(step, event, result.loss, result.norm, origin_of(step, len(data), settings))  # type: ignore[arg-type]
            progress.health.check(step)
            if log is not None:
                log.step(step, result.loss, result.norm, settings.lr_at(step - 1), progress.health)
            if step >= settings.steps:
                progress.check_trained()
            if log is not None and (ending or step % settings.checkpoint_every == 0):
                kept = progress.for_checkpoint(log.pending)
                save_checkpoint(run / "checkpoints", step, **state.saved, state=kept)
                prune_checkpoints(run / "checkpoints", settings.keep_checkpoints)
            if log is not None and on_step is not None:
                log.samples(step, on_step(step, state.ema.module))
                state.wrapped.train()
            if ending:
                break


def _warn_of_the_rate(settings: TrainSettings, progress: _Progress) -> None:
    """Report a warm-up that outlasts training, and a schedule that changes here."""
    if settings.warmup >= settings.steps:
        late = f"warmup={settings.warmup} is not over when steps={settings.steps} are done"
        print(f"{late}: the learning rate never reaches lr={settings.lr:g}", file=sys.stderr)
    if progress.history[-1]["step"] == progress.step > 0:
        print(schedule_changes(progress.history)[-1], file=sys.stderr)
