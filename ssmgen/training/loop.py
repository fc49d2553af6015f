"""The training loop: accelerate for devices, precision and launchers; ours for order, randomness and checkpoints.

Step k's examples, noise and times derive from (seed, k): a resumed run is the uninterrupted one, to the bit on a CPU.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ssmgen.extras import require
from ssmgen.training.checkpoint import (
    CheckpointError,
    checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from ssmgen.training.ema import moving_average
from ssmgen.training.order import StepOrder, derived_seed

# Consecutive steps with a non-finite loss or gradient after which training gives up.
_MAX_SKIPPED = 10


@dataclass
class TrainSettings:
    """How to train.

    Attributes:
        steps: optimiser steps in all.
        batch_size: examples of one optimiser step, over all processes and accumulated parts.
        accumulate: parts each batch is cut into, to save memory.
        lr: learning rate after the warm-up.
        warmup: steps of linear warm-up.
        lr_decay_steps: step at which a cosine from ``lr`` reaches zero; 0 keeps ``lr``. It does not follow ``steps``,
            so that a run may be prolonged.
        weight_decay: AdamW's, on matrices only (never on A_log, D, norms and biases).
        clip: largest gradient norm; 0 does not clip.
        ema_decay: of the moving average of the weights.
        precision: ``"no"`` (float32) or ``"bf16"`` autocast.
        matmul_precision: how products of float32 matrices are rounded, torch's ``"highest"`` (float32), ``"high"``
            (TensorFloat32 on a GPU) or ``"medium"`` (bfloat16, also on a CPU that has it; sums stay float32).
        seed: of everything random.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep_checkpoints: how many stay.
        log_every: steps between lines of the log.
        num_workers: loader processes.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    lr: float = 1e-4
    warmup: int = 0
    lr_decay_steps: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    ema_decay: float = 0.9999
    precision: str = "no"
    matmul_precision: str = "highest"
    seed: int = 0
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 10
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "lr", "checkpoint_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup", "lr_decay_steps", "weight_decay", "clip", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.precision not in ("no", "bf16"):
            raise ValueError(f"precision must be 'no' (float32) or 'bf16', got {self.precision!r}")
        if self.matmul_precision not in ("highest", "high", "medium"):
            raise ValueError(f"matmul_precision must be 'highest', 'high' or 'medium', got {self.matmul_precision!r}")
        if 0 < self.lr_decay_steps < self.steps:
            raise ValueError(
                f"lr_decay_steps={self.lr_decay_steps} ends before steps={self.steps}: the rest would train at a "
                f"learning rate of zero. Set lr_decay_steps={self.steps}, or 0 for a constant rate."
            )
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} must divide batch_size={self.batch_size}")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        lr = self.lr * min(1.0, (step + 1) / (self.warmup + 1))
        if self.lr_decay_steps:
            lr *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.lr_decay_steps)))
        return lr


@dataclass
class TrainResult:
    """What training ended with: the step reached, the run's seconds of training, and the averaged weights."""

    step: int
    seconds: float
    ema: nn.Module
    interrupted: bool


def train(
    model: nn.Module,
    objective: Any,
    data: Dataset[tuple[Tensor, Tensor]],
    settings: TrainSettings,
    run: Path,
    *,
    record: dict[str, Any] | None = None,
    resume: Path | str | None = None,
    on_step: Callable[[int, nn.Module], None] | None = None,
) -> TrainResult:
    """Train ``model`` on pairs (x, mask) and write log and checkpoints into the folder ``run``.

    ``data[index, draw]`` gives one pair: ``draw`` counts the epochs and seeds augmentation.

    Args:
        model: a mask-conditioned model.
        objective: has ``loss(model, x, mask=...)``.
        data: the examples.
        settings: how to train.
        run: gets ``log.jsonl`` and ``checkpoints/``.
        record: what a checkpoint must agree on to be resumed; JSON.
        resume: ``"auto"`` for the newest usable checkpoint of ``run``, a checkpoint's folder, or None to start afresh.
        on_step: called by the main process as ``on_step(step, ema_model)`` after each step and at the start.

    Raises:
        CheckpointError: nothing usable to resume from, or it belongs to another configuration.
        FloatingPointError: the loss or its gradient was not finite ten steps in a row.
        OSError: a checkpoint cannot be written; the older ones are intact.
    """
    torch.set_float32_matmul_precision(settings.matmul_precision)
    accelerator = _accelerator()
    world, rank = accelerator.num_processes, accelerator.process_index
    parts = settings.accumulate
    if settings.batch_size % (world * parts):
        raise ValueError(
            f"batch_size={settings.batch_size} must be a multiple of processes x accumulate = {world * parts}"
        )
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=settings.lr, fused=True)
    ema = moving_average(model, settings.ema_decay).to(accelerator.device)
    trained, optimizer = accelerator.prepare(model, optimizer)
    model = accelerator.unwrap_model(trained)
    inner_optimizer = getattr(optimizer, "optimizer", optimizer)

    found = find_checkpoint(run, resume, record or {})
    state = load_checkpoint(found, model=model, ema=ema, optimizer=inner_optimizer) if found else {}
    first, seconds = int(state.get("step", 0)), float(state.get("seconds", 0.0))
    if first >= settings.steps:
        return TrainResult(first, seconds, ema.module, False)
    order = StepOrder(len(data), settings.batch_size, settings.seed, first, rank, world)  # type: ignore[arg-type]
    loader = DataLoader(data, batch_sampler=order, num_workers=settings.num_workers, generator=torch.Generator())
    main = accelerator.is_main_process
    log = _Log(run / "log.jsonl", first, settings) if main else None
    if main and on_step is not None:
        on_step(first, ema.module)

    started, step, skipped = time.monotonic() - seconds, first, 0
    trained.train()
    with _stop_requests() as stop:
        for x, mask in loader:
            _set_lr(optimizer, settings.lr_at(step))
            loss, norm, asked = _step(accelerator, trained, objective, optimizer, x, mask, settings, step, bool(stop))
            if math.isfinite(loss) and math.isfinite(norm):
                ema.update_parameters(model)
                skipped = 0
            else:
                skipped += 1
                _give_up_after(skipped, step, loss, norm)
            step += 1
            if log is not None:
                log.step(step, loss, norm, settings.lr_at(step - 1))
            ending = step >= settings.steps or asked
            if main and (ending or step % settings.checkpoint_every == 0):
                state = {"record": record or {}, "seconds": time.monotonic() - started}
                save_checkpoint(run / "checkpoints", step, model=model, ema=ema, optimizer=inner_optimizer, state=state)
                prune_checkpoints(run / "checkpoints", settings.keep_checkpoints)
            if main and on_step is not None:
                on_step(step, ema.module)
                trained.train()
            if ending:
                break
    if log is not None:
        log.close()
    accelerator.wait_for_everyone()
    return TrainResult(step, time.monotonic() - started, ema.module, step < settings.steps)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; vectors, and whatever is marked ``no_weight_decay`` (A_log and D), without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    exempt = [p for p in parameters if p.dim() < 2 or getattr(p, "no_weight_decay", False)]
    held = {id(p) for p in exempt}
    return [
        {"params": [p for p in parameters if id(p) not in held], "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]


def _accelerator() -> Any:
    accelerate = require("accelerate", extra="train")
    cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    # Autocast is entered in _step: Accelerate's own setting cannot change within a process, so a second run with
    # another precision in one notebook would fail.
    return accelerate.Accelerator(mixed_precision="no", cpu=cpu)


def _step(
    accelerator: Any,
    model: nn.Module,
    objective: Any,
    optimizer: Any,
    x: Tensor,
    mask: Tensor,
    settings: TrainSettings,
    step: int,
    stop: bool,
) -> tuple[float, float, bool]:
    """One optimiser step; returns the mean loss, the gradient norm, and whether any process was asked to stop.

    A loss or norm that is not finite changes no weight. All processes get the same answers, so they decide alike.
    """
    parts = settings.accumulate
    total = torch.zeros((), device=accelerator.device)
    pieces = list(zip(x.chunk(parts), mask.chunk(parts), strict=True))
    for part, (x_part, mask_part) in enumerate(pieces):
        torch.manual_seed(derived_seed(settings.seed, "step", step, part, accelerator.process_index))
        x_part, mask_part = x_part.to(accelerator.device), mask_part.to(accelerator.device)
        with _sync_only_if(part == parts - 1, accelerator, model):
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = objective.loss(model, x_part, mask=mask_part) / parts
            accelerator.backward(loss)
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), settings.clip or math.inf)
    shared = accelerator.reduce(torch.stack([total, torch.full_like(total, stop)]), reduction="mean").tolist()
    loss_value, norm_value, asked = shared[0], float(norm), shared[1] > 0
    if math.isfinite(loss_value) and math.isfinite(norm_value):
        optimizer.step()
    optimizer.zero_grad()
    return loss_value, norm_value, asked


@contextmanager
def _sync_only_if(last: bool, accelerator: Any, model: nn.Module) -> Iterator[None]:
    if last:
        yield
    else:
        with accelerator.no_sync(model):
            yield


def _give_up_after(skipped: int, step: int, loss: float, norm: float) -> None:
    print(f"step {step}: loss {loss}, gradient norm {norm}: not finite, the step is skipped", file=sys.stderr)
    if skipped >= _MAX_SKIPPED:
        raise FloatingPointError(
            f"{skipped} steps in a row were not finite, the last at step {step}: lower lr or look at the data. "
            "The checkpoints before are intact."
        )


def _set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


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
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
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


class _Log:
    """``log.jsonl`` and the progress bar."""

    def __init__(self, file: Path, first: int, settings: TrainSettings) -> None:
        from tqdm import tqdm

        _forget_after(file, first)
        self._stream = file.open("a")
        self._settings = settings
        self._last = time.monotonic()
        self._losses: list[float] = []
        interactive = sys.stderr.isatty()
        self._bar = tqdm(
            total=settings.steps,
            initial=first,
            unit="step",
            dynamic_ncols=interactive,
            mininterval=0.5 if interactive else 20,
            smoothing=0.05,
        )

    def step(self, step: int, loss: float, norm: float, lr: float) -> None:
        self._losses.append(loss)
        self._bar.update()
        if step % self._settings.log_every and step != self._settings.steps:
            return
        now = time.monotonic()
        speed = len(self._losses) * self._settings.batch_size / (now - self._last)
        mean = sum(self._losses) / len(self._losses)
        values = {"loss": mean, "grad_norm": norm}
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}  # NaN is no JSON
        line = {"step": step, **finite, "lr": lr, "images_per_second": round(speed, 2)}
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()
        self._bar.set_postfix(loss=f"{mean:.4f}", img_s=f"{speed:.0f}", refresh=False)
        self._last, self._losses = now, []

    def close(self) -> None:
        self._bar.close()
        self._stream.close()


def _forget_after(file: Path, step: int) -> None:
    """Drop log lines of steps that a resumed run will do again."""
    if not file.exists():
        return
    lines = [line for line in file.read_text().splitlines() if _logged_step(line) <= step]
    temporary = file.with_suffix(f".tmp-{os.getpid()}")
    temporary.write_text("".join(line + "\n" for line in lines))
    temporary.rename(file)


def _logged_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # a line cut off by a kill
