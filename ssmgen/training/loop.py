"""The training loop: accelerate for devices, precision and launchers; ours for order, randomness and checkpoints.

Step k's examples, noise and times derive from (seed, k): a resumed run is the uninterrupted one, to the bit on a CPU.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ssmgen.training.checkpoint import (
    CheckpointError,
    checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from ssmgen.training.ema import moving_average
from ssmgen.training.launch import make_accelerator
from ssmgen.training.log import RunLog
from ssmgen.training.memory import keep_freed_memory
from ssmgen.training.optimizers import make_optimizer
from ssmgen.training.schedule import History, continued, may_follow, schedule_changes, schedule_of
from ssmgen.training.settings import TrainSettings
from ssmgen.training.settle import settle_precision
from ssmgen.training.step import batches_from, set_lr, training_step

# Consecutive steps with a non-finite loss or gradient after which training gives up.
_MAX_SKIPPED = 10


@dataclass
class TrainResult:
    """What training ended with.

    Attributes:
        step: the step reached.
        seconds: of training, of the whole run.
        ema: the averaged weights.
        interrupted: it was asked to stop.
        skipped: steps of the whole run that changed no weight, since loss or gradient were not finite.
    """

    step: int
    seconds: float
    ema: nn.Module
    interrupted: bool
    skipped: int = 0


def train(
    model: nn.Module,
    objective: Any,
    data: Dataset[tuple[Tensor, Tensor]],
    settings: TrainSettings,
    run: Path,
    *,
    record: dict[str, Any] | None = None,
    resume: Path | str | None = None,
    on_step: Callable[[int, nn.Module], Path | None] | None = None,
) -> TrainResult:
    """Train ``model`` on pairs (x, mask) and write log and checkpoints into the folder ``run``.

    ``data[index, draw]`` gives one pair: ``draw`` counts the epochs and seeds augmentation. On a CPU the process keeps
    the memory it frees from now on, see `ssmgen.training.memory`.

    Args:
        model: a mask-conditioned model.
        objective: has ``loss(model, x, mask=...)``.
        data: the examples.
        settings: how to train.
        run: gets ``log.jsonl`` and ``checkpoints/``.
        record: what a checkpoint must agree on to be resumed, besides the precision; JSON. An ``lr_decay_steps`` in it
            may grow or become 0.
        resume: ``"auto"`` for the newest usable checkpoint of ``run``, a checkpoint's folder, or None to start afresh.
        on_step: called by the main process as ``on_step(step, ema_model)`` after each step and at the start. It may
            return a picture of samples, which goes to the tracker.

    Raises:
        CheckpointError: nothing usable to resume from, or it belongs to another configuration.
        FloatingPointError: the loss or its gradient was not finite ten steps in a row, or in every step of the run.
        OSError: a checkpoint cannot be written; the older ones are intact.
    """
    torch.set_float32_matmul_precision(settings.matmul_precision)
    accelerator = make_accelerator(settings)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    world = accelerator.num_processes
    parts = settings.accumulate
    if settings.batch_size % (world * parts):
        raise ValueError(
            f"batch_size={settings.batch_size} must be a multiple of processes x accumulate = {world * parts}"
        )
    settings = settle_precision(settings, run, resume, accelerator)
    record = (record or {}) | {"precision": settings.precision}
    optimizer = make_optimizer(
        model, settings.optimizer, settings.lr, settings.weight_decay, precision=settings.precision
    )
    ema = moving_average(model, settings.ema_decay).to(accelerator.device)
    trained, optimizer = accelerator.prepare(model, optimizer)
    model = accelerator.unwrap_model(trained)
    inner_optimizer = getattr(optimizer, "optimizer", optimizer)

    found = find_checkpoint(run, resume, record)
    state = load_checkpoint(found, model=model, ema=ema, optimizer=inner_optimizer) if found else {}
    first, seconds, skipped = (state.get(key, 0) for key in ("step", "seconds", "skipped"))
    if first >= settings.steps:
        _check_trained(skipped, first)
        return TrainResult(first, seconds, ema.module, False, skipped)
    history = continued(schedule_of(state, settings.lr_decay_steps), first, settings.lr_decay_steps)
    loader = batches_from(first, data, settings, accelerator)
    main = accelerator.is_main_process
    log = _open_log(run, first, settings, record, state.get("pending", [])) if main else None
    if main:
        _say_of_the_rate(settings, first, history)
    if main and on_step is not None:
        on_step(first, ema.module)

    started, step, in_a_row = time.monotonic() - seconds, first, 0
    trained.train()
    with log or nullcontext(), _stop_requests() as stop:
        for x, mask in loader:
            set_lr(optimizer, settings.lr_at(step))
            loss, norm, asked = training_step(
                accelerator, trained, objective, optimizer, x, mask, settings, step, bool(stop)
            )
            if math.isfinite(loss) and math.isfinite(norm):
                ema.update_parameters(model)
                in_a_row = 0
            else:
                skipped, in_a_row = skipped + 1, in_a_row + 1
                _give_up_after(in_a_row, step, loss, norm)
            step += 1
            if log is not None:
                log.step(step, loss, norm, settings.lr_at(step - 1))
            if step >= settings.steps:
                _check_trained(skipped, step)
            ending = step >= settings.steps or asked
            if log is not None and (ending or step % settings.checkpoint_every == 0):
                state = {"seconds": time.monotonic() - started, "pending": log.pending, "schedule": history}
                state |= {"record": record, "skipped": skipped}
                save_checkpoint(run / "checkpoints", step, model=model, ema=ema, optimizer=inner_optimizer, state=state)
                prune_checkpoints(run / "checkpoints", settings.keep_checkpoints)
            if log is not None and on_step is not None:
                log.samples(step, on_step(step, ema.module))
                trained.train()
            if ending:
                break
    accelerator.wait_for_everyone()
    return TrainResult(step, time.monotonic() - started, ema.module, step < settings.steps, skipped)


def _open_log(
    run: Path, first: int, settings: TrainSettings, record: dict[str, Any], pending: Sequence[float | None]
) -> RunLog:
    named = {name: getattr(settings, name) for name in ("steps", "batch_size", "log_every", "tracker")}
    return RunLog(run, first, config=asdict(settings) | record, pending=pending, **named)


def _say_of_the_rate(settings: TrainSettings, first: int, history: History) -> None:
    """What nobody may have meant: a warm-up that training ends in, and a schedule that changes here."""
    if settings.warmup >= settings.steps:
        print(
            f"warmup={settings.warmup} is not over when steps={settings.steps} are done: the learning rate never "
            f"reaches lr={settings.lr:g}",
            file=sys.stderr,
        )
    if history[-1]["step"] == first > 0:
        print(schedule_changes(history)[-1], file=sys.stderr)


def _give_up_after(skipped: int, step: int, loss: float, norm: float) -> None:
    print(f"step {step}: loss {loss}, gradient norm {norm}: not finite, the step is skipped", file=sys.stderr)
    if skipped >= _MAX_SKIPPED:
        raise FloatingPointError(
            f"{skipped} steps in a row were not finite, the last at step {step}: lower lr or look at the data. "
            "The checkpoints before are intact."
        )


def _check_trained(skipped: int, step: int) -> None:
    if skipped == step:
        raise FloatingPointError(
            f"none of the {step} steps had a finite loss and gradient, so nothing was trained: lower lr, or look at "
            "the data and the autoencoder"
        )


def find_checkpoint(run: Path, resume: Path | str | None, record: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from, verified; None to start afresh.

    Args:
        run: the run's folder.
        resume: as in `train`.
        record: what the checkpoint must have been made with.

    Raises:
        CheckpointError: it is damaged (for ``"auto"``: all of them are), or belongs to another configuration.
    """
    if resume is None:
        return None
    candidates = checkpoints(run / "checkpoints") if resume == "auto" else [Path(resume)]
    for path in reversed(candidates):
        try:
            state = verify_checkpoint(path)
        except CheckpointError as error:
            if path == candidates[0]:
                raise
            print(f"{error}\nfalling back to the checkpoint before it", file=sys.stderr)
            continue
        _check_record(path, state.get("record", {}), record)
        newer = [other.name for other in checkpoints(run / "checkpoints") if other.name > path.name]
        if newer and resume != "auto":
            raise CheckpointError(
                f"{path}: the run has newer checkpoints ({', '.join(newer)}), which going on from here would mix with "
                "its own: delete them, or resume into a new run folder"
            )
        return path
    return None


def _check_record(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    current = json.loads(json.dumps(current))
    differences = [
        f"{key}: {saved.get(key)!r} there, {current.get(key)!r} now"
        + (", which may only grow or become 0" if key == "lr_decay_steps" else "")
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
        and not (key == "lr_decay_steps" and may_follow(saved.get(key) or 0, current.get(key) or 0))
        and (key != "precision" or key in saved.keys() & current.keys())
    ]
    if differences:
        raise CheckpointError(
            f"{path}: belongs to another configuration ({'; '.join(differences)}). Resume with the same settings, or "
            "start a new run in another folder."
        )


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """SIGINT and SIGTERM only leave a note: the loop finishes its step, saves, and returns."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt  # asked twice: stop at once
        received.append(number)
        print("stopping after this step; a checkpoint will be written", file=sys.stderr)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals cannot be handled
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
