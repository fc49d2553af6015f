"""A progress bar for where it is shown: drawn in place on a terminal or in a notebook, lines in a log or pipe."""

from __future__ import annotations

import sys
import time
from typing import Any

from ssmgen.extras import require

#: Seconds between two lines where nobody watches.
_PAUSE = 20.0
_LINE = "{n_fmt}/{total_fmt} {unit}s, {percentage:.0f} %, {elapsed} gone, {remaining} to go{postfix}"


def progress_bar(total: int, unit: str, *, initial: int = 0) -> Any:
    """A bar over ``total`` things of a kind, for ``with`` and ``update(n)``, on stderr.

    In a notebook it is a widget where ipywidgets is installed; where stderr is no terminal, a plain line every 20 s and
    one at the end, without carriage returns.
    """
    auto = require("tqdm.auto", extra="train")
    notebook = auto.notebook_tqdm is not auto.std_tqdm
    if not notebook and not sys.stderr.isatty():
        return _Lines(total, unit, initial)
    return auto.tqdm(total=total, unit=unit, initial=initial, mininterval=0.5, smoothing=0.05, dynamic_ncols=True)


class _Lines:
    """What the recipe uses of tqdm's bar, as lines."""

    def __init__(self, total: int, unit: str, initial: int) -> None:
        self._total, self._unit, self._initial, self._done = total, unit, initial, initial
        self._started = self._shown = time.monotonic()
        self._postfix = ""

    def update(self, count: int = 1) -> None:
        self._done += count
        if time.monotonic() - self._shown >= _PAUSE:
            self._show()

    def set_postfix(self, *, refresh: bool = False, **values: str) -> None:
        self._postfix = ", ".join(f"{name} {value}" for name, value in values.items())

    def close(self) -> None:
        self._show()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _show(self) -> None:
        self._shown = time.monotonic()
        line = require("tqdm", extra="train").tqdm.format_meter(
            self._done,
            self._total,
            self._shown - self._started,
            initial=self._initial,
            unit=self._unit,
            postfix=self._postfix,
            bar_format=_LINE,
        )
        print(line, file=sys.stderr, flush=True)
