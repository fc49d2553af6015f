"""Curves of runs as coordinates, for the report of an evaluation and the page that watches training."""

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Side of the square that points lie in; the page stretches it to the plot.
SIDE = 1000
_MOST_POINTS, _LOG_RATIO = 600, 30

Points = list[tuple[float, float]]


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of ``log.jsonl`` without those of single events, empty without a log.

    A line truncated by a kill is left out.
    """
    file, lines = run / "log.jsonl", []
    for text in file.read_text().splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    found = [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
    return [line for line in found if "event" not in line]


def points_of(log: list[dict[str, Any]], key: str) -> Points:
    """(step, value) of one quantity wherever it is a finite number."""
    values = [(line["step"], line.get(key)) for line in log]
    return [(step, value) for step, value in values if isinstance(value, int | float) and math.isfinite(value)]


def smoothed(points: Points, weight: float) -> Points:
    """An exponential moving average with ``weight`` in [0, 1), corrected for its start as in Adam."""
    mean, total, out = 0.0, 0.0, []
    for step, value in points:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        out.append((step, mean / total))
    return out


def chart(
    title: str, curves: Sequence[Points], smoothing: float = 0.0, *, linear: bool = False
) -> dict[str, Any] | None:
    """Curves on common axes as ``curves.html.j2`` draws them, one for each run; None if no curve has two points.

    ``smoothing`` is the weight of `smoothed`, 0 for none; ``linear`` keeps the axis linear even over decades.
    """
    shown = [(run, points) for run, points in enumerate(curves) if len(points) > 1]
    if not shown:
        return None
    values = [value for points in curves for _, value in points]
    logarithmic = not linear and _spans_decades(values)
    across, up = _Axis([step for points in curves for step, _ in points]), _Axis(values, logarithmic)

    def place(points: Points) -> str:
        return " ".join(f"{across.at(step):.1f},{SIDE - up.at(value):.1f}" for step, value in _thinned(points))

    return {
        "title": title,
        "logarithmic": logarithmic,
        "bounds": {"x": [across.low, across.high], "y": [up.low, up.high]},
        "x": [(f"{tick:g}", across.at(tick) * 100 / SIDE) for tick in across.ticks(5)],
        "y": [(f"{tick:.3g}", up.at(tick) * 100 / SIDE) for tick in up.ticks(4)],
        "lines": [
            {"run": run, "raw": place(points), "smooth": place(smoothed(points, smoothing)) if smoothing else ""}
            for run, points in shown
        ],
    }


def _spans_decades(values: list[float]) -> bool:
    """Whether the middle 90 % of the values span so many decades that they need a logarithmic axis."""
    ranked = sorted(values)
    low, high = ranked[len(ranked) // 20], ranked[-1 - len(ranked) // 20]
    return ranked[0] > 0 and high / low > _LOG_RATIO


class _Axis:
    """Maps values to [0, SIDE]."""

    def __init__(self, values: list[float], logarithmic: bool = False) -> None:
        self._logarithmic = logarithmic
        self.low, self.high = self._scale(min(values)), self._scale(max(values))
        if self.low == self.high:  # constant: draw it in the middle
            self.low, self.high = self.low - (abs(self.low) / 2 or 1), self.high + (abs(self.high) / 2 or 1)

    def at(self, value: float) -> float:
        return (self._scale(value) - self.low) / (self.high - self.low) * SIDE

    def ticks(self, count: int) -> list[float]:
        """About ``count`` round values."""
        if self._logarithmic:
            powers = range(math.ceil(self.low), math.floor(self.high) + 1)
            multiples = (1, 3) if len(powers) < 3 else (1,)
            return [float(f"{m}e{p}") for p in powers for m in multiples if math.log10(m) + p <= self.high]
        rough = (self.high - self.low) / count
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [i * step for i in range(first, last + 1)]

    def _scale(self, value: float) -> float:
        return math.log10(value) if self._logarithmic else value


def _thinned(points: Points) -> Points:
    """At most as many points as a screen can show, each the mean of a group of neighbours."""
    group = -(-len(points) // _MOST_POINTS)
    parts = [points[start : start + group] for start in range(0, len(points), group)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts] if group > 1 else points
