"""One owner of a run folder: ``lock.json`` names the process that trains in it, and a second training is refused.

The owner touches the file every 30 s. The lock of a process of this machine is stale once that process has ended. The
processes of another machine, container or boot cannot be seen: a new training waits until their lock has not been
touched for 5 minutes, and is refused as soon as it is touched. The age of the last touch is measured against the time
of a new file in the same folder, so that the clocks of the machines do not matter.
"""

import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ssmgen.machine import machine as _machine
from ssmgen.machine import start_of as _start_of
from ssmgen.signals import say

_LOCK = "lock.json"
_BEAT = 30.0
_SILENCE = 300.0  # seconds without a touch after which an owner that cannot be seen is taken for dead
_LOOK = 2.0  # seconds between two looks for a touch
_KEYS = ("host", "machine", "pid", "started", "since", "id")
_LARGEST = 10_000  # bytes of a lock that are read

_held: dict[Path, "RunLock"] = {}  # by this process


class RunLockError(RuntimeError):
    """A run folder belongs to another training; the message names its process and says what to do."""


class RunLock:
    """The lock of a run folder, held by this process: see `run_lock`."""

    def __init__(self, run: Path) -> None:
        self.file = run / _LOCK
        self.process, self.thread = os.getpid(), threading.get_ident()
        self._owner = _this_process()
        self._ended = threading.Event()
        self._await_silence()
        self._acquire()
        threading.Thread(target=self._beat, daemon=True, name=f"lock of {run}").start()

    def check(self) -> None:
        """Make sure that this process still owns the folder; called before a checkpoint is written.

        Raises:
            RunLockError: another process has taken it over, because this one gave no sign of life for long.
        """
        holder = None
        with suppress(OSError):  # on a broken disk, the checkpoint itself reports it
            holder = _read(self.file)
            if holder is None:  # deleted by hand
                self._acquire()
        if holder is not None and holder.get("id") != self._owner["id"]:
            raise RunLockError(
                f"{self.file.parent}: {_name(holder)} has taken over this run while this process was suspended or cut "
                "off. Training stops here and writes nothing more."
            )

    def release(self) -> None:
        """Delete the lock, unless it belongs to another process by now."""
        self._ended.set()
        with suppress(OSError):  # on a broken disk it stays, and is stale when this process has ended
            if (_read(self.file) or {}).get("id") == self._owner["id"]:
                self.file.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            with suppress(OSError):
                if (_read(self.file) or {}).get("id") == self._owner["id"]:
                    os.utime(self.file)

    def _await_silence(self) -> None:
        """Wait until the lock of an owner that cannot be seen is gone or stale.

        Raises:
            RunLockError: it has given a sign of life meanwhile.
        """
        seen = None
        while (holder := _read(self.file)) is not None and not _visible(holder):
            with self._written() as mine, suppress(FileNotFoundError):  # it is released in between
                touched = self.file.stat().st_mtime_ns
                silent = max(0.0, (mine.stat().st_mtime_ns - touched) / 1e9)
                if seen not in (None, touched):
                    raise RunLockError(
                        f"{self.file.parent}: belongs to {_owner(holder)} which is still running: it has given a sign "
                        "of life while this process waited. Wait until it ends, or choose another folder."
                    )
                if silent > _SILENCE:
                    return
                if seen is None:
                    say(
                        f"{self.file.parent}: waiting up to {_SILENCE - silent + 1:.0f} s for a sign of life of "
                        f"{_owner(holder)} which cannot be seen from here. If it is dead, delete {self.file}."
                    )
                seen = touched
            time.sleep(_LOOK)

    def _acquire(self) -> None:
        """Create the lock, or take over a stale one.

        Raises:
            RunLockError: another process holds it.
            OSError: the folder cannot be written.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(self.file.parent), self._written() as mine:
            _remove_leftovers(mine)
            if _linked(mine, self.file):
                return
            holder = _read(self.file)
            if holder is not None:
                say(f"{self.file.parent}: {_stale(holder, self.file, mine)}; taking over")
            if _read(self.file) != holder:
                raise RunLockError(f"{self.file.parent}: another training has just started here; try again")
            os.replace(mine, self.file)

    @contextmanager
    def _written(self) -> Iterator[Path]:
        """A complete lock file under another name."""
        descriptor, name = tempfile.mkstemp(prefix=f"{_LOCK}.", dir=self.file.parent)
        try:
            with os.fdopen(descriptor, "w") as stream:
                json.dump(self._owner, stream)
            os.chmod(name, 0o644)  # other users may read whose lock it is
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)


@contextmanager
def run_lock(run: Path) -> Iterator[RunLock]:
    """Own a run folder, which is created if necessary; within one thread this may be nested.

    A stale lock is reported on stderr and taken over. That of a process that cannot be seen, on another machine, is
    waited for: at most 5 minutes, until it is stale, or half a minute, until it has given a sign of life.

    Raises:
        RunLockError: another process, or another thread of this one, trains in the folder.
        OSError: the folder cannot be written.
    """
    key = Path(run).resolve()
    outer = _held.get(key)
    if outer is not None and outer.process == os.getpid():
        if outer.thread != threading.get_ident():
            raise RunLockError(f"{run}: another thread of this process trains in it; choose another folder")
        yield outer
        return
    lock = _held[key] = RunLock(run)
    try:
        yield lock
    finally:
        del _held[key]
        lock.release()


def _stale(holder: dict[str, Any], file: Path, new: Path) -> str:
    """Why a lock is stale, as part of a sentence.

    Raises:
        RunLockError: it is not.
    """
    owner = _owner(holder)
    if _visible(holder):
        if _start_of(holder.get("pid")) != holder.get("started"):
            return f"{owner} has ended without removing {file.name}"
        raise RunLockError(
            f"{file.parent}: belongs to {owner} which is still running. Wait until it ends, stop it with "
            f"kill {holder['pid']}, or choose another folder."
        )
    silent = max(0.0, new.stat().st_mtime - file.stat().st_mtime)
    if silent > _SILENCE:
        return f"{owner} has given no sign of life for {silent:.0f} s"
    raise RunLockError(
        f"{file.parent}: belongs to {owner} whose last sign of life is {silent:.0f} s old. Wait until it ends, or "
        f"choose another folder. If it is dead, try again in {_SILENCE - silent + 1:.0f} s, or delete {file}."
    )


def _visible(holder: dict[str, Any]) -> bool:
    """Whether it can be seen if the owner still runs."""
    # os.kill, by which other systems than Linux are asked, would end the process on Windows.
    return os.name == "posix" and holder.get("machine") == _machine()


def _owner(holder: dict[str, Any]) -> str:
    return f"{_name(holder)}, training in it since {holder.get('since', 'an unknown time')},"


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}" if "pid" in holder else "an unknown process"


def _read(file: Path) -> dict[str, Any] | None:
    """The content of a lock: None without one, empty for a damaged one."""
    try:
        with file.open("rb") as stream:
            content = json.loads(stream.read(_LARGEST))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and all(isinstance(content.get(key), str) for key in _KEYS) else {}


def _linked(source: Path, target: Path) -> bool:
    """Give a file a second name unless that exists; whether it did."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return False
        os.replace(source, target)
    return True


def _remove_leftovers(new: Path) -> None:
    """Delete files like ``new`` that a killed process has left."""
    for file in new.parent.glob(f"{_LOCK}.*"):
        with suppress(OSError):
            if new.stat().st_mtime - file.stat().st_mtime > _SILENCE:
                file.unlink()


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Exclude other processes of this machine; between machines, `os.link` and `RunLock.check` decide."""
    descriptor = None
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except (ImportError, OSError):  # Windows, or a network file system
        pass
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _this_process() -> dict[str, str]:
    pid = str(os.getpid())
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    known = {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "started": _start_of(pid)}
    return {**known, "since": since, "id": uuid.uuid4().hex}
