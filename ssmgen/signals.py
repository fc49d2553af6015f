"""Requests to stop: SIGINT (Ctrl-C), SIGTERM, SIGHUP of a closed terminal, and SIGUSR1, a scheduler's warning.

A command runs under `stopping`, where a request raises `Stopped`, so that half-written files are removed on the way
out. The training loop runs under `stop_requests`, where it only sets a flag: the step ends and a checkpoint is written.
A signal that is ignored stays ignored: SIGHUP under ``nohup``, SIGINT in the background jobs of a shell's script.
The exit status is 128 plus the signal number, as in shells: 130, 143, 129 and 138.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

Result = TypeVar("Result")

#: Signals that ask the program to stop; Windows has neither SIGHUP nor SIGUSR1.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
# A launcher passes a signal on to processes that may have received it already: so soon, it is the same request.
_SAME_REQUEST = 1.0
# A request during this time after `Stopped` would interrupt the removal of half-written files.
_CLEANING_UP = 10.0


def say(text: str) -> None:
    """Print a message on stderr; a full disk behind it or a closed terminal is no error."""
    with suppress(OSError, ValueError):  # ValueError: the stream is closed
        print(text, file=sys.stderr, flush=True)


class Stopped(KeyboardInterrupt):
    """A signal asked the program to stop.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def exit_status(number: int) -> int:
    """The exit status of a program that a signal stopped."""
    return 128 + number


def status_of(stopped: KeyboardInterrupt) -> int:
    """The exit status after `Stopped`, or after the KeyboardInterrupt of Python's own handler."""
    return exit_status(getattr(stopped, "number", signal.SIGINT))


@contextmanager
def stopping() -> Iterator[list[Stopped]]:
    """Raise `Stopped` in the main thread on a request to stop; outside the main thread, do nothing.

    Python discards exceptions that are raised in a destructor. There, `Stopped` is raised again soon after. Libraries
    may turn it into an error of their own: what was raised is in the list that ``with`` yields.
    """
    process, last = os.getpid(), -_CLEANING_UP
    raised: list[Stopped] = []

    def stop(number: int, frame: Any) -> None:
        nonlocal last
        if os.getpid() != process or time.monotonic() - last < _CLEANING_UP:
            return  # a forked loader process, or a repeated request
        last = time.monotonic()
        raised.append(Stopped(number))
        raise raised[-1]

    def discarded(unraisable: Any) -> None:
        nonlocal last
        if not isinstance(unraisable.exc_value, Stopped):
            hook(unraisable)
            return
        last = -_CLEANING_UP
        again = threading.Timer(0.05, os.kill, (process, unraisable.exc_value.number))
        again.daemon = True
        again.start()

    with _handling(stop):
        hook, sys.unraisablehook = sys.unraisablehook, discarded
        try:
            yield raised
        finally:
            sys.unraisablehook = hook


class StopRequests:
    """Collects requests to stop; it is true once there is one.

    Attributes:
        number: of the first signal; 0 without a request.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._process = os.getpid()
        self._interruptible = False

    def __bool__(self) -> bool:
        return self.number > 0

    def __call__(self, number: int, frame: Any) -> None:
        """The signal handler: note the first request; a second one stops at once."""
        if os.getpid() != self._process:
            return  # a forked loader process; the step in progress needs its batches
        now = time.monotonic()
        if self.number:
            if now - self._since < _SAME_REQUEST:
                return
            self._since = now + _CLEANING_UP
            raise Stopped(number)
        self.number, self._since = number, now
        with suppress(RuntimeError):  # the signal came in the middle of another message
            say(f"{signal.Signals(number).name}: stopping after this step; a checkpoint will be written")
        if self._interruptible:
            raise Stopped(number)

    def unless_stopped(self, function: Callable[..., Result], *arguments: Any) -> Result | None:
        """Call a function that a request makes unnecessary: None if there is one before, or comes during the call."""
        if self:
            return None
        try:
            self._interruptible = True
            try:
                return function(*arguments)
            finally:
                self._interruptible = False
        except Stopped:
            return None


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Collect requests to stop instead of being ended by them; a second request raises `Stopped`.

    Outside the main thread, signals keep their handlers.
    """
    requests = StopRequests()
    with _handling(requests):
        yield requests


def ignore_stop_requests(worker: int = 0) -> None:
    """Ignore requests to stop from now on: in a loader process, and in a command that is done.

    Ctrl-C and schedulers send them to every process of a job. The step in progress still needs the batches of a loader
    process, which ends with the loop. A command that is done would end with another status than its own.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Let ``handler`` handle the requests to stop, but not those that are ignored.

    In other threads than the main one, nothing changes.
    """
    before: dict[int, Any] = {}
    try:
        for number in STOPPING if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
