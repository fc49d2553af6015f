"""Signals that reach a command while it starts, which takes seconds: it imports torch.

Imports the standard library only.
"""

import os
import signal
from contextlib import suppress
from typing import Any


def end_on_signals() -> None:
    """End the process on a request to stop with one sentence and the status of `ssmgen.signals`.

    A signal that is ignored, as SIGHUP under ``nohup``, stays ignored.
    """

    def end(number: int, frame: Any) -> None:
        with suppress(OSError):  # the terminal is closed
            os.write(2, f"stopped by {signal.Signals(number).name}; no half-written file is left\n".encode())
        os._exit(128 + number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)  # Windows has neither SIGHUP nor SIGUSR1
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)
