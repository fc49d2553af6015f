"""Processes of this machine: which one this is, where it is, and the end of those that hang."""

import ctypes
import os
import platform
import signal
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ssmgen.extras import require
from ssmgen.training.lock import _machine, _start_of

_PACKAGES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
# Where a process waits for the others: the gradients' mean in backward, and the step's own exchange of loss and norm,
# on CUDA until these are known.
_WAITING = tuple(str(Path(torch.__file__).parent / name) for name in ("distributed", "autograd", "cuda/streams.py"))
_TRAINING = str(Path(__file__).parent)
_PR_SET_PDEATHSIG = 1  # sys/prctl.h of Linux


def identity() -> dict[str, Any]:
    """What tells this process from every other one: its machine with the machine's name, its number and its start."""
    here = {"host": platform.node(), "machine": _machine()}
    return here | {"pid": os.getpid(), "born": _start(_psutil().Process())}


def is_here(process: Mapping[str, Any]) -> bool:
    """Whether a process, given by its `identity`, can be seen from this one: same system, same container."""
    return bool(process["machine"] == _machine())


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


def stopped_of(pids: Iterable[int]) -> list[int]:
    """Those of these processes that are stopped."""
    psutil = _psutil()
    found: list[int] = []
    for pid in pids:
        with suppress(psutil.Error):
            if is_stopped(psutil.Process(pid)):
                found.append(pid)
    return found


def wait_for_storage(pids: Iterable[int]) -> bool:
    """Whether one of these processes waits for a disk or a network file system (state D of Linux)."""
    psutil = _psutil()
    for pid in pids:
        with suppress(psutil.Error):
            if psutil.Process(pid).status() == psutil.STATUS_DISK_SLEEP:
                return True
    return False


def is_stopped(process: Any) -> bool:
    """Whether a process is stopped, by SIGSTOP or a debugger."""
    psutil = _psutil()
    with suppress(psutil.Error):
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return False


def find(pid: int, born: str) -> Any:
    """A process of this machine by its number and start, see `identity`, or None if it has ended."""
    psutil = _psutil()
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if _start(process) == born and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def kill_children() -> None:
    """Kill all processes below this one."""
    for each in _below(_psutil().Process()):
        with suppress(_psutil().Error):
            each.kill()


def kill_tree(process: Any) -> None:
    """Kill a process that `find` found, and all below it."""
    for each in [*_below(process), process]:
        with suppress(_psutil().Error):
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


def _below(process: Any) -> list[Any]:
    with suppress(_psutil().Error):
        return list(process.children(recursive=True))
    return []


def _start(process: Any) -> str:
    """When a process started: on Linux in ticks since the boot, which do not change when the clock is set."""
    if Path("/proc/self/stat").exists():
        return _start_of(process.pid)
    return str(process.create_time())


def _psutil() -> Any:
    return require("psutil", extra="train")
