"""Signals that reach a command while it starts, which takes seconds: it imports torch.

Imports the standard library only.
"""

import os
import signal
from typing import Any


def end_on_signals() -> None:
    """End the process on SIGINT, SIGTERM and SIGUSR1 with one sentence and the status of `ssmgen.signals`."""

    def end(number: int, frame: Any) -> None:
        os.write(2, f"stopped by {signal.Signals(number).name}; no half-written file is left\n".encode())
        os._exit(128 + number)

    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), end)
