"""Trackers show a run's curves and sample grids: TensorBoard, trackio or wandb.

A tracker is constructed as ``Tracker(run, first, last, config)``: the run's folder, the step after which it continues,
the last step logged so far, and the run's configuration. If a run was killed after its last checkpoint, ``last`` is
greater than ``first``: the steps in between are repeated, and each tracker shows them once.
"""

import os
import secrets
import time
from pathlib import Path
from typing import Any, Protocol

from ssmgen.extras import require
from ssmgen.registry import closest

_PROJECT = "ssmgen"


class Tracker(Protocol):
    """What the log asks of a tracker. ``extra`` is the installation extra that contains ``package``."""

    package: str
    extra: str

    def __init__(self, run: Path, first: int, last: int, config: dict[str, Any]) -> None: ...

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def image(self, step: int, name: str, file: Path) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in ``RUN/tensorboard``; ``tensorboard --logdir RUN`` shows them."""

    package, extra = "tensorboard", "train"

    def __init__(self, run: Path, first: int, last: int, config: dict[str, Any]) -> None:
        require(self.package, self.extra)
        from torch.utils.tensorboard import SummaryWriter

        folder = run / "tensorboard"
        _await_a_later_name(folder)
        # Hides what an earlier part of the run wrote about repeated steps.
        self._writer: Any = SummaryWriter(str(folder), purge_step=first + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def image(self, step: int, name: str, file: Path) -> None:
        import numpy
        from PIL import Image

        with Image.open(file) as picture:
            self._writer.add_image(name, numpy.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _await_a_later_name(folder: Path, patience: float = 2.0) -> None:
    """Wait until an event file created now sorts after those that are there: TensorBoard reads them by name.

    A name begins with the whole second; within one second, hosts, processes and counters follow in no order of time.
    A clock that is behind by more than ``patience`` seconds is not waited for.
    """
    seconds = [int(file.name.split(".")[3]) for file in folder.glob("events.out.tfevents.[0-9]*")]
    newest = max(seconds, default=0)
    if newest < time.time() + patience:
        time.sleep(max(0.0, newest + 1 - time.time()))


class _Service:
    """What trackio and wandb share. They cannot delete: steps that were logged before are not sent again."""

    _module: Any
    _run: Any
    _last: int

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if step > self._last:
            self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, file: Path) -> None:
        if step > self._last:
            self._run.log({name: self._module.Image(str(file))}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio(_Service):
    """A run of the project ``ssmgen`` in trackio's local database; ``trackio show --project ssmgen`` shows it.

    trackio sends it elsewhere only if ``TRACKIO_SPACE_ID`` or ``TRACKIO_SERVER_URL`` is set.
    """

    package, extra = "trackio", "trackers"

    def __init__(self, run: Path, first: int, last: int, config: dict[str, Any]) -> None:
        self._module, self._last = require(self.package, self.extra), last
        # trackio identifies a run by its name, and many folders share one.
        name = f"{run.resolve().name}-{_identity(run, first)}"
        self._run = self._module.init(_PROJECT, name, config=config, resume="allow", embed=False)


class Wandb(_Service):
    """A run of the project ``ssmgen`` (or ``WANDB_PROJECT``), written to ``RUN/wandb``.

    Offline, for ``wandb sync`` to upload later, unless wandb is logged in or ``WANDB_MODE`` says otherwise.
    """

    package, extra = "wandb", "trackers"

    def __init__(self, run: Path, first: int, last: int, config: dict[str, Any]) -> None:
        mode = os.environ.get("WANDB_MODE")
        if mode in (None, "offline"):
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read on import; would reach for the network
        self._module, self._last = require(self.package, self.extra), last
        if mode is None:
            mode = "online" if self._module.login(prompt=False, verify=False) else "offline"
        try:
            self._run = self._module.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=run.resolve().name,
                id=_identity(run, first),
                resume="allow",
                dir=run,
                mode=mode,
                config=config,
            )
        except self._module.errors.Error as error:
            raise RuntimeError(f"tracker=wandb: {error}") from error


#: A new tracker needs its class and a line here.
TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}


def check_tracker(name: str) -> None:
    """Check before training that a tracker can be used.

    Raises:
        ValueError: an unknown tracker.
        ImportError: its package is not installed; the message names the extra that contains it.
    """
    if name == "none":
        return
    if name not in TRACKERS:
        known = (*TRACKERS, "none")
        raise ValueError(f"unknown tracker {name!r}{closest(name, known)} The trackers are {', '.join(known)}.")
    try:
        require(TRACKERS[name].package, TRACKERS[name].extra)
    except ImportError as error:
        raise ImportError(f"tracker={name}: {error}, or use tracker=none") from None


def _identity(run: Path, first: int) -> str:
    """The name by which trackers recognise a run: created at its start, kept in its folder."""
    file = run / "tracker-id"
    if first == 0 or not file.is_file():
        file.write_text(secrets.token_hex(4) + "\n")
    return file.read_text().strip()
