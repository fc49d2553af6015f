"""A progress bar for where it is shown: drawn in place on a terminal or in a notebook, lines in a log or pipe."""

from __future__ import annotations

import sys
import time
from typing import Any

from ssmgen.extras import require

#: Seconds between two lines where nobody watches.
_PAUSE = 20.0
_LINE = "{desc}{n_fmt}/{total_fmt} ({percentage:.0f} %), {elapsed} gone, {remaining} to go, {rate_fmt}{postfix}"
#: Seconds a thing may take without a bar.
_AT_ONCE = 1.0


def progress_bar(total: int, unit: str, *, what: str = "", initial: int = 0, quiet: bool = False) -> Any:
    """A bar on stderr, for ``with`` and ``update(n)``; none for what is done within a second.

    In a notebook it is a widget where ipywidgets is installed; where stderr is no terminal, a plain line every 20 s and
    one at the end, without carriage returns.

    Args:
        total: how many there are.
        unit: of what, e.g. ``"step"``.
        what: is being done to them, in front of the bar.
        initial: how many are done before.
        quiet: show nothing.
    """
    auto = require("tqdm.auto", extra="train")
    notebook = auto.notebook_tqdm is not auto.std_tqdm
    if not notebook and not sys.stderr.isatty():
        return _Lines(total, unit, what, initial, quiet)
    return auto.tqdm(
        total=total,
        unit=unit,
        desc=what or None,
        initial=initial,
        disable=quiet,
        delay=_AT_ONCE,
        mininterval=0.5,
        smoothing=0.05,
        dynamic_ncols=True,
    )


class _Lines:
    """What the recipe uses of tqdm's bar, as lines."""

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

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _show(self) -> None:
        self._shown = time.monotonic()
        if self._quiet:
            return
        line = require("tqdm", extra="train").tqdm.format_meter(
            self._done,
            self._total,
            self._shown - self._started,
            initial=self._initial,
            unit=self._unit,
            prefix=self._what,
            postfix=self._postfix,
            bar_format=_LINE,
        )
        print(line, file=sys.stderr, flush=True)
