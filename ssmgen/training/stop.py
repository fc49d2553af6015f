"""Requests to stop: a signal lets the loop finish its step, save, and return."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the list that ``with`` yields, instead of being ended by them.

    A second signal raises KeyboardInterrupt. Outside the main thread, signals keep their handlers.
    """
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
