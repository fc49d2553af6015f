"""The training loop.

Step k's examples, noise and times derive from (seed, k): on a CPU a resumed run equals an uninterrupted one to the bit.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ssmgen.atomic import remove_leftovers
from ssmgen.extras import require
from ssmgen.precision import set_product_precision
from ssmgen.signals import StopRequests, say, stop_requests
from ssmgen.training.checkpoint import collect, load_checkpoint
from ssmgen.training.health import Health
from ssmgen.training.launch import make_accelerator
from ssmgen.training.lock import RunLock, run_lock
from ssmgen.training.log import RunLog
from ssmgen.training.results import StepResult, Unread
from ssmgen.training.resume import (
    History,
    check_free,
    check_lost,
    continued,
    find_checkpoint,
    keep_earlier_log,
    schedule_changes,
    schedule_of,
    settle_precision,
)
from ssmgen.training.saver import Saver
from ssmgen.training.settings import TrainSettings
from ssmgen.training.step import Batch, TrainState, batches_from, origin_of, prepare, training_step
from ssmgen.training.watchdog import Watchdog, watched


@dataclass
class TrainResult:
    """The end of a training.

    Attributes:
        step: the step reached.
        seconds: duration of training, over the whole run.
        ema: the averaged weights; of a sharded run, in one piece in the main process only.
        interrupted: it was asked to stop.
        signal: number of the signal that asked for it, the same in all processes: the largest, if they got different
            ones. 0 without one.
        skipped: steps of the whole run that changed no weight because the loss or the gradient was not finite.
        spikes: steps of the whole run whose loss was far above its running mean, see `ssmgen.training.health`.
    """

    step: int
    seconds: float
    ema: nn.Module
    interrupted: bool
    skipped: int = 0
    spikes: int = 0
    signal: int = 0


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
    run: Path | str,
    *,
    record: dict[str, Any] | None = None,
    resume: Path | str | None = None,
    on_step: Callable[[int, nn.Module], Path | None] | None = None,
) -> TrainResult:
    """Train ``model`` and write log and checkpoints into the folder ``run``.

    On a CPU the process keeps the memory it frees from now on, see `ssmgen.training.launch.keep_freed_memory`.

    Args:
        model: what is trained; with ``settings.shard`` its weights are divided among the processes, in place.
        objective: has ``loss(model, data, **others)``, see `ssmgen.objectives`.
        data: the examples. ``data[index, draw]`` is a mapping ``{"data": x, NAME: condition, ...}`` with the names of
            the model's conditions and optional ``weight`` and ``contrasts`` of the error; ``draw`` counts the epochs
            and seeds augmentation. A batch of them goes to the loss as keyword arguments. If ``data`` has a method
            ``bucket_of(index)``, a batch has examples of one bucket, see `ssmgen.training.StepOrder`.
        settings: how to train.
        run: gets ``log.jsonl`` and ``checkpoints/``, and ``lock.json`` while training lasts.
        record: what a checkpoint must agree on to be resumed, besides the precision; JSON. An ``lr_decay_steps`` in it
            may grow or become 0.
        resume: ``"auto"`` for the newest checkpoint of ``run`` that verifies, or step 0 if there is none at all; a
            checkpoint's folder; or None to start afresh.
        on_step: called by the main process as ``on_step(step, ema_model)`` after each step and at the start. It may
            return the file of a picture of samples, which goes to the tracker. If it has a method ``due(step)``, it is
            called only where that returns True, which must be so in all processes: a sharded model is gathered then.
            An OSError that it raises, such as that of a full disk, is reported on stderr, and training goes on.

    Raises:
        ValueError: ``settings.steps`` is 0, or the batch does not divide into processes and parts.
        RunLockError: another training owns the folder, see `ssmgen.training.run_lock`.
        CheckpointError: none of the checkpoints to resume from can be used, or it belongs to another configuration.
        FloatingPointError: the loss or its gradient was not finite ten steps in a row, or in every step of the run.
        FileExistsError: the folder holds checkpoints of a run that is not to be resumed.
        OSError: the last checkpoint cannot be written; the older ones are intact. An earlier one that cannot be
            written is reported on stderr, and the next checkpoint tries again.
        RankError: another rank failed, or a single process made no progress; see `ssmgen.training.watchdog`.
    """
    if settings.steps < 1:
        raise ValueError(f"steps={settings.steps} leaves the number of steps undecided: set TrainSettings.steps")
    run = Path(run)
    set_product_precision(settings.matmul_precision)
    with watched() as watchdog:  # all of it: a rank may fail while the others wait for it
        accelerator = make_accelerator(settings)
        with run_lock(run) if accelerator.is_main_process else nullcontext() as lock:
            return _train(model, objective, data, settings, run, record, resume, on_step, accelerator, lock, watchdog)


def _train(
    model: nn.Module,
    objective: Any,
    data: Dataset[Batch],
    settings: TrainSettings,
    run: Path,
    record: dict[str, Any] | None,
    resume: Path | str | None,
    on_step: Callable[[int, nn.Module], Path | None] | None,
    accelerator: Any,
    lock: RunLock | None,
    watchdog: Watchdog,
) -> TrainResult:
    """`train` in a folder that the main process owns."""
    settings = settle_precision(settings, run, resume, accelerator)
    record = (record or {}) | {"precision": settings.precision}
    state = prepare(model, settings, accelerator)
    progress = _resumed(state, settings, run, resume, record)
    signal = 0
    if progress.step < settings.steps:
        signal = _steps(state, objective, data, settings, progress, run, on_step, lock, watchdog)
        signal = int(accelerator.gather(torch.tensor([signal], device=accelerator.device)).max())  # alike in all ranks
    else:
        progress.check_trained()
        if accelerator.is_main_process:  # a kill after the last save may have left what was being deleted
            remove_leftovers(run / "checkpoints", idle=True)
    interrupted = progress.step < settings.steps or signal > 0
    health = progress.health
    with state.averaged() as ema:
        return TrainResult(progress.step, progress.seconds(), ema, interrupted, health.skipped, health.spikes, signal)


def _resumed(
    state: TrainState, settings: TrainSettings, run: Path, resume: Path | str | None, record: dict[str, Any]
) -> _Progress:
    """Load the checkpoint to resume from, if any; the main process finds it for all."""
    accelerator = state.accelerator
    if accelerator.is_main_process:
        check_free(run, resume)
    chosen = [find_checkpoint(run, resume, record) if accelerator.is_main_process else None]
    if accelerator.is_main_process and chosen == [None] and resume == "auto":
        check_lost(run, settings.checkpoint_every)
    if accelerator.num_processes > 1:
        require("accelerate", extra="train").utils.broadcast_object_list(chosen, from_process=0)
    (found,) = chosen
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
    lock: RunLock | None,
    watchdog: Watchdog,
) -> int:
    """Train until the last step or a request to stop; returns its signal. The main process logs, samples and saves.

    Where the host reads late, a step is judged and logged after the next one was launched, and a request to stop takes
    effect at the end of the step that is launched with it, or one step later if processes must agree on it. What is
    logged, counted and saved is the same as if every step was read at once.
    """
    loader, log = batches_from(progress.step, data, settings, state.accelerator), None
    saver = Saver(run / "checkpoints", settings.keep_checkpoints)
    if state.accelerator.is_main_process:
        keep_earlier_log(run, progress.step)
        saver.check_space(sum(p.numel() * p.element_size() for p in state.model.parameters()))
        log = RunLog(run, progress.step, settings, progress.record, progress.pending)
        _warn_of_the_rate(settings, progress)
    due = _due(on_step)
    if due(progress.step):
        _sample(state, on_step, progress.step)
    progress.started = time.monotonic()
    unread, alone = Unread(progress.step, state.late), state.accelerator.num_processes == 1
    with log or nullcontext(), stop_requests() as stop, watchdog.batches(loader, progress.step) as batches:
        for batch in batches:
            unread.add(training_step(state, objective, batch, settings, progress.step, bool(stop)))
            progress.step += 1
            step = progress.step
            ending, saving = step >= settings.steps, step % settings.checkpoint_every == 0
            # A checkpoint never holds a step that was not judged. One process needs nobody's consent to stop.
            read = unread.read(ending or saving or due(step) or (alone and bool(stop)))
            watchdog.computed()
            for number, result in read:
                _report(number, result, progress, log, settings, data)
                ending |= result.stop
            if step >= settings.steps:
                progress.check_trained()
            if ending or saving:
                if lock is not None:
                    lock.check()
                tensors = collect(**state.saved, keep=log is not None)
                if log is not None:
                    saver.save(step, tensors, progress.for_checkpoint(log.pending), last=ending)
            if due(step):
                _sample(state, on_step, step, log, stop)
            if ending:
                break
    return stop.number


def _report(
    step: int,
    result: StepResult,
    progress: _Progress,
    log: RunLog | None,
    settings: TrainSettings,
    data: Dataset[Batch],
) -> None:
    """Judge a step, counted from 1, and log it in the main process.

    Raises:
        FloatingPointError: too many steps in a row were skipped.
    """
    event = progress.health.count(result.loss, result.norm)
    if log is not None and event is not None:
        log.event(step, event, result.loss, result.norm, origin_of(step, data, settings))
    progress.health.check(step)
    if log is not None:
        log.step(step, result.loss, result.norm, settings.lr_at(step - 1), progress.health, result.known)


def _due(on_step: Any) -> Callable[[int], bool]:
    """Whether ``on_step`` is called after a step."""
    return getattr(on_step, "due", lambda step: on_step is not None)


def _sample(
    state: TrainState, on_step: Any, step: int, log: RunLog | None = None, stop: StopRequests | None = None
) -> None:
    """Call ``on_step`` in the main process, unless it is to stop.

    All processes take part in gathering a sharded model for it.
    """
    with state.averaged() as model:
        picture = None
        if state.accelerator.is_main_process:
            try:
                picture = stop.unless_stopped(on_step, step, model) if stop is not None else on_step(step, model)
            except OSError as error:
                say(f"{error}\nthe samples of step {step} are missing; training goes on")
    if log is not None:
        log.samples(step, picture)
    state.wrapped.train()


def _warn_of_the_rate(settings: TrainSettings, progress: _Progress) -> None:
    """Report a warm-up that outlasts training, and a schedule that changes here."""
    if settings.warmup >= settings.steps:
        late = f"warmup={settings.warmup} is not over when steps={settings.steps} are done"
        say(f"{late}: the learning rate never reaches lr={settings.lr:g}")
    if progress.history[-1]["step"] == progress.step > 0:
        say(schedule_changes(progress.history)[-1])
