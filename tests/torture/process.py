"""Forked processes: torch is imported once, every case starts at once from there, and nothing outlives the campaign."""

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
#: Descriptors that a forked process must not keep open: the other end waits for them to be closed.
own_descriptors: list[int] = []


def fork(call: Callable[[], object], output: Path | None) -> int:
    """Run ``call`` in a process of its own session and return its id; it dies with its parent.

    The status is 0, that of a SystemExit, or 1 after an exception, whose traceback is written.

    Args:
        call: what to run.
        output: file that gets stdout and stderr; None keeps the parent's.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        while own_descriptors:
            os.close(own_descriptors.pop())
        if output is not None:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        call()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def end(process: int, seconds: float) -> int | None:
    """Wait for a process of `fork`: its exit status, minus the signal that killed it, or None if it was killed here.

    Processes that it started and left are killed.
    """
    until = time.monotonic() + seconds
    pause = 0.001
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            end_session(process)
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            end_session(process)
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return None
        time.sleep(pause)
        pause = min(0.02, pause * 1.5)


def end_session(process: int) -> None:
    """Kill what is left of a process of `fork` and of those it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    """Wait until a condition holds; whether it did."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.002)
    return True


def threads() -> int:
    """Threads of this process, where the system tells."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 1
