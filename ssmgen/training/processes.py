"""Processes of this machine: which one this is, where it is, and the end of those that hang."""

import ctypes
import os
import platform
import signal
import sys
import sysconfig
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ssmgen.extras import require

_PACKAGES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
# Where a process waits for the others: the gradients' mean in backward, and the step's own exchange of loss and norm.
_WAITING = tuple(str(Path(torch.__file__).parent / name) for name in ("distributed", "autograd"))
_TRAINING = str(Path(__file__).parent)
_PR_SET_PDEATHSIG = 1  # sys/prctl.h of Linux


def identity() -> dict[str, Any]:
    """Host, number and start of this process."""
    return {"host": platform.node(), "pid": os.getpid(), "born": _psutil().Process().create_time()}


def place(thread: int) -> tuple[str, bool]:
    """The line that a thread executes, without those of libraries, and whether it seems to wait for other ranks."""
    frame: FrameType | None = sys._current_frames().get(thread)
    if frame is None:
        return "after its last line", False
    file = frame.f_code.co_filename
    waiting = file.startswith(_WAITING) or file.startswith(_TRAINING) or "accelerate" in Path(file).parts
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*_PACKAGES, _TRAINING)):
        frame = frame.f_back
    code = frame.f_code
    return f"in {code.co_name} at {Path(code.co_filename).name}:{frame.f_lineno}", waiting


def children(stopped: bool = False) -> list[int]:
    """Processes below this one; only those that are stopped if ``stopped``."""
    psutil = _psutil()
    found: list[int] = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if not stopped or is_stopped(child):
                found.append(child.pid)
    return found


def is_stopped(process: Any) -> bool:
    """Whether a process is stopped, by SIGSTOP or a debugger."""
    psutil = _psutil()
    with suppress(psutil.Error):
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return False


def find(pid: int, born: float) -> Any:
    """A process of this machine by its number and start, or None if it has ended."""
    psutil = _psutil()
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if abs(process.create_time() - born) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def kill_tree(process: Any = None) -> None:
    """Kill a process that `find` found and all below it; by default all below this process, but not itself."""
    psutil = _psutil()
    with suppress(psutil.Error):
        above = process or psutil.Process()
        for each in [*above.children(recursive=True), *([process] if process else [])]:
            with suppress(psutil.Error):
                each.kill()


def kill_workers(workers: Iterable[Any]) -> None:
    """Kill loader processes without the error by which torch reports that one was killed."""
    before, number = None, getattr(signal, "SIGCHLD", None)  # Windows has none
    with suppress(ValueError):  # not in the main thread, where torch reports nothing
        before = number and signal.signal(number, signal.SIG_DFL)
    try:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(5)
    finally:
        if number and before is not None:
            signal.signal(number, before)


def without_traceback(error: BaseException) -> str:
    """The message of an error, without the traceback that torch puts before that of a loader process."""
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2].strip() if text.startswith("Caught ") else text


def end_with_parent() -> None:
    """Let the system kill this process when the thread that started it ends, even if it is stopped; needs Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _psutil() -> Any:
    return require("psutil", extra="train")
