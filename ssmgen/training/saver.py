"""The checkpoints of a run in training: a failed save is reported and tried again at the next interval."""

import time
from pathlib import Path
from typing import Any

from ssmgen.atomic import disk_error, free_space, megabytes
from ssmgen.signals import say
from ssmgen.training.checkpoint import Collected, checkpoints, prune_checkpoints, write_checkpoint
from ssmgen.training.manifest import size_of

# Weights, their average, and at most two moments of the optimiser.
_COPIES = 4
_AGAIN = "Training continues and tries again at the next checkpoint."


class Saver:
    """Writes the checkpoints of one training and deletes old ones, once the new one was read back.

    Args:
        folder: the folder of all checkpoints, e.g. ``RUN/checkpoints``.
        keep: number of checkpoints kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._verified: set[str] = set()
        self._told = False

    def check_space(self, parameters: int) -> None:
        """Warn on stderr if the disk has no room for one checkpoint of a model with so many bytes of parameters."""
        needed, free = _COPIES * parameters, free_space(self._folder)
        if free is not None and free < needed:
            say(
                f"{self._folder}: a checkpoint takes about {megabytes(needed)}, but only {megabytes(free)} are free on "
                "its disk: saves will fail until there is more"
            )

    def save(self, step: int, tensors: Collected, state: dict[str, Any], *, last: bool) -> None:
        """Write a checkpoint; the first one prints its size and how long it took.

        Args:
            step, tensors, state: as in `write_checkpoint`.
            last: training ends here. Then a failed save is an error; otherwise it is reported, and training goes on.

        Raises:
            OSError: the last checkpoint cannot be written; names the newest one there is.
        """
        started = time.monotonic()
        try:
            path = write_checkpoint(self._folder, step, tensors, state)
        except OSError as error:
            kept = self._newest()
            if last:
                raise disk_error(f"{error}\n{kept}; the steps since then are lost", error.errno) from error
            say(f"{error}\nstep {step} was not saved; {kept}. {_AGAIN}")
            return
        self._verified.add(path.name)
        if not self._told:
            self._told = True
            seconds = time.monotonic() - started
            say(f"{path.name}: saved {megabytes(size_of(path))} in {seconds:.2f} s and read it back")
        try:
            prune_checkpoints(self._folder, self._keep, self._verified)
        except OSError as error:
            say(f"{error}\nan older checkpoint was not deleted. {_AGAIN}")

    def _newest(self) -> str:
        try:
            found = checkpoints(self._folder)
        except OSError:
            return "the older checkpoints cannot be listed now"
        return f"the newest checkpoint is {found[-1].name}" if found else "there is no checkpoint yet"
