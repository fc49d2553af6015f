"""Fair timing: everything in one process, in turn, after a warm-up; medians, and the spread beside them."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recipes.sisma.provenance import provenance

RESULTS = Path(__file__).parent / "results"


def measure(calls: dict[str, Callable[[], object]], rounds: int, *, warm: bool = True) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, taken in turn after one warm-up of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-1 if warm else 0, rounds):
        for name, call in calls.items():
            _wait()
            started = time.perf_counter()
            call()
            _wait()
            if number >= 0:
                times[name].append((time.perf_counter() - started) * 1e3)
    return times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Median of each call."""
    return {name: statistics.median(values) for name, values in times.items()}


def show(title: str, times: dict[str, list[float]], against: str) -> None:
    """Print medians, spreads and ratios to the call ``against``."""
    print(f"\n{title}")
    base = medians(times)[against]
    for name, values in times.items():
        median = statistics.median(values)
        spread = f"{min(values):.2f} .. {max(values):.2f}"
        print(f"  {name:<34}{median:>10.2f} ms   ({spread})   {median / base:.2f}x")


def arguments(description: str | None, rounds: int, *, rows: bool = False) -> argparse.Namespace:
    """``--rounds`` and ``--json``, which all benchmarks take, and ``--only``, for those that measure row by row."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds (default {rounds})")
    parser.add_argument("--json", type=Path, help="write the figures there")
    if rows:
        text = "measure the rows of these names (* matches anything) and keep the others of the file"
        parser.add_argument("--only", nargs="+", metavar="NAME", help=text)
    return parser.parse_args()


def write(file: Path | None, module: str, content: dict[str, Any]) -> None:
    """Write figures with command, commit, versions and hardware, if a file was asked for."""
    if file is None:
        return
    origin = provenance(f"python -m benchmarks.{module}", 0)
    if origin["commit"] is None:
        print("the commit is not known here: set SSMGEN_COMMIT, for the results to tell it", file=sys.stderr)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")  # a run that is cut off here leaves the rows before it
    partial.write_text(json.dumps(content | origin, indent=2) + "\n")
    partial.replace(file)
