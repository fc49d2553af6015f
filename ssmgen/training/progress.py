"""A progress bar: drawn in place on a terminal or in a notebook, written as lines to a log or pipe."""

import sys
import time
from contextlib import AbstractContextManager
from typing import Any

from ssmgen.extras import require
from ssmgen.signals import say

#: Seconds between two lines in a log or pipe.
_PAUSE = 20.0
_LINE = "{desc}{n_fmt}/{total_fmt} ({percentage:.0f} %), {elapsed} gone, {remaining} to go, {rate_fmt}{postfix}"
#: Work that takes fewer seconds shows no bar.
_AT_ONCE = 1.0


def progress_bar(total: int, unit: str, *, what: str = "", initial: int = 0, quiet: bool = False) -> Any:
    """A bar on stderr, for ``with`` and ``update(n)``; it is not shown for work that takes less than a second.

    In a notebook it is a widget if ipywidgets is installed; if stderr is no terminal, a plain line every 20 s and one
    at the end, without carriage returns.

    Args:
        total, unit: number and name of the units, e.g. ``"step"``.
        what: label in front of the bar.
        initial: units done before.
        quiet: show nothing.
    """
    auto = require("tqdm.auto", extra="train")
    notebook = auto.notebook_tqdm is not auto.std_tqdm
    if not notebook and not sys.stderr.isatty():
        return _Lines(total, unit, what, initial, quiet)
    pace = {"delay": _AT_ONCE, "mininterval": 0.5, "smoothing": 0.05, "dynamic_ncols": True}
    return auto.tqdm(total=total, unit=unit, desc=what or None, initial=initial, disable=quiet, **pace)


class _Lines(AbstractContextManager["_Lines"]):
    """The part of tqdm's bar that is used here, as lines."""

    def __init__(self, total: int, unit: str, what: str, initial: int, quiet: bool) -> None:
        self._total, self._unit, self._initial, self._done = total, unit, initial, initial
        self._what, self._quiet = f"{what}: " if what else "", quiet
        self._started = self._shown = time.monotonic()
        self._postfix = ""

    def update(self, count: int = 1) -> None:
        self._done += count
        if time.monotonic() - self._shown >= _PAUSE:
            self._show()

    def set_postfix(self, *, refresh: bool = False, **values: str) -> None:
        self._postfix = ", ".join(f"{name} {value}" for name, value in values.items())

    def close(self) -> None:
        if time.monotonic() - self._started >= _AT_ONCE:
            self._show()

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _show(self) -> None:
        self._shown = time.monotonic()
        if self._quiet:
            return
        style = {"unit": self._unit, "prefix": self._what, "postfix": self._postfix, "bar_format": _LINE}
        meter = require("tqdm", extra="train").tqdm.format_meter
        line = meter(self._done, self._total, self._shown - self._started, initial=self._initial, **style)
        say(line)
