"""Reports of a running training: ``log.jsonl``, the progress bar, and a tracker."""

import json
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssmgen.atomic import write_text
from ssmgen.signals import say
from ssmgen.training.health import Event, Health
from ssmgen.training.progress import progress_bar
from ssmgen.training.settings import TrainSettings
from ssmgen.training.trackers import TRACKERS, Tracker

#: None for a loss that is not finite, because JSON has no NaN.
Losses = Sequence[float | None]


class RunLog(AbstractContextManager["RunLog"]):
    """The loop reports its steps here.

    Args:
        run: the run's folder, for ``log.jsonl`` and the tracker's files.
        first: the step after which the run continues, 0 at its start. Log lines beyond it are dropped.
        settings, record: as in `train`; a tracker shows both next to the curves.
        pending: the value of `pending` when the run stopped: a line is a mean over all its steps.
    """

    def __init__(
        self, run: Path, first: int, settings: TrainSettings, record: dict[str, Any], pending: Losses = ()
    ) -> None:
        run.mkdir(parents=True, exist_ok=True)
        last = _forget_after(run / "log.jsonl", first)
        if first:
            repeated = f"; {last - first:,} logged steps are repeated" if last > first else ""
            say(f"continuing after step {first:,} of {settings.steps:,}{repeated}")
        self._tracker: Tracker | None = None
        if settings.tracker != "none":
            self._tracker = TRACKERS[settings.tracker](run, first, last, asdict(settings) | record)
        self._stream = (run / "log.jsonl").open("ab", buffering=0)
        self._torn = self._told = self._untracked = False
        self._settings = settings
        self._bar = progress_bar(settings.steps, "step", initial=first)
        self._since = time.monotonic()
        self._fresh = 0
        self._losses = [math.nan if loss is None else loss for loss in pending]

    def event(self, step: int, event: Event, loss: float, norm: float, origin: dict[str, Any]) -> None:
        """Report a step that was skipped, or whose loss was a spike, with the ``origin`` of its batch."""
        what = f"loss {loss:.4g}, gradient norm {norm:.4g}"
        said = {"skipped": f"{what}: not finite, the step is skipped", "spike": f"{what}: a spike of the loss"}
        say(f"step {step}: {said[event]}; log.jsonl names its examples")
        values = {"loss": loss, "grad_norm": norm}
        self._write({"step": step, "event": event} | _finite(values) | origin)

    def step(self, step: int, loss: float, norm: float, lr: float, health: Health, known: float | None = None) -> None:
        """Report a finished step; every ``log_every`` of them make a line.

        ``known`` is when its values were read, in seconds of `time.monotonic`; now where None.
        The line's loss is the mean over its steps with a finite loss, its norm that of the last one.
        """
        self._losses.append(loss)
        self._fresh += 1
        self._bar.update()
        if step % self._settings.log_every and step != self._settings.steps:
            return
        now = time.monotonic() if known is None else known
        speed = self._fresh * self._settings.batch_size / (now - self._since)
        finite = [loss for loss in self._losses if math.isfinite(loss)]
        mean = sum(finite) / len(finite) if finite else math.nan
        values = {"loss": mean, "grad_norm": norm, "lr": lr, "images_per_second": round(speed, 2)}
        counts = {"skipped": health.skipped, "spikes": health.spikes}
        self._write({"step": step} | _finite(values) | counts)
        self._track("scalars", step, {name: x for name, x in (values | counts).items() if math.isfinite(x)})
        self._bar.set_postfix(loss=f"{mean:.4f}", img_s=f"{speed:.0f}", refresh=False)
        self._since, self._fresh = now, 0
        if step % self._settings.log_every == 0:  # otherwise a prolonged run includes them in its next line
            self._losses = []

    @property
    def pending(self) -> list[float | None]:
        """Losses of the steps since the last line, for a checkpoint."""
        return [loss if math.isfinite(loss) else None for loss in self._losses]

    def samples(self, step: int, grid: Path | None) -> None:
        """Report a picture of samples, if any."""
        if grid is not None:
            self._track("image", step, "samples", grid)

    def _write(self, line: dict[str, Any]) -> None:
        """Append a line. A full disk does not end training: it is reported once, and lines are missing."""
        content = b"\n" * self._torn + json.dumps(line).encode() + b"\n"
        try:
            written = self._stream.write(content)
            self._torn = written < len(content)  # then the next line must not continue this one
            reason = f"{written} of {len(content)} bytes" if self._torn else ""
        except OSError as error:
            reason = str(error)
        if reason and not self._told:
            self._told = True
            say(f"{self._stream.name}: a line could not be written ({reason}); training goes on")

    def _track(self, call: str, *arguments: Any) -> None:
        """Call the tracker, if any. A full disk does not end training: it is reported once."""
        try:
            if self._tracker is not None:
                getattr(self._tracker, call)(*arguments)
        except OSError as error:
            if not self._untracked:
                self._untracked = True
                say(f"tracker={self._settings.tracker}: not everything could be written ({error}); training goes on")

    def __exit__(self, *error: Any) -> None:
        self._bar.close()
        with suppress(OSError):
            self._stream.close()
        self._track("close")


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """Values for JSON, which has no NaN: None for what is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _forget_after(file: Path, step: int) -> int:
    """Drop log lines of steps that a resumed run will repeat; returns the last logged step."""
    if not file.exists():
        return 0
    lines = _lines(file)
    write_text(file, "".join(line + "\n" for logged, line in lines if logged <= step))
    return max((logged for logged, _ in lines), default=0)


def last_logged(run: Path) -> int:
    """The last step in the log of a run; 0 without one."""
    file = run / "log.jsonl"
    return max((logged for logged, _ in _lines(file)), default=0) if file.is_file() else 0


def _lines(file: Path) -> list[tuple[int, str]]:
    """The step and the text of each line that can be read."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return [(logged, line) for line in text.splitlines() if (logged := _logged_step(line)) is not None]


def _logged_step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None  # a line cut off by a kill, or damaged
