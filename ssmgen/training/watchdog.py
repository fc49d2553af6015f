"""A watchdog over the processes of a job: one that dies, raises or stalls ends all of them, and is named.

Every process runs a thread that reports to the store of torch.distributed once a second and reads the report of the
next rank. The first fault found becomes the verdict of the job, in the store; every process reads it there and ends.
A process that is stopped does not report; one that hangs reports for how long. A single process watches itself.
"""

import atexit
import ctypes
import json
import os
import re
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from ssmgen.atomic import write_text
from ssmgen.extras import require
from ssmgen.training.processes import identity, kill_children, kill_workers, place, stopped_of, wait_for_storage
from ssmgen.training.rank_reports import STALLED, Reports, Verdict, fault_of, is_a_peers, verdict_of, verdict_on

# Seconds without a report, or beyond the longest expected time of a step, after which a process has stalled.
GRACE = 20.0
# Seconds for the first batch; for the first step, which may compile, and for a process to report at all.
FIRST_BATCH, START = 300.0, 1800.0
# Seconds of a batch in which its loader processes may wait for storage: a network file system may take two minutes to
# change servers.
STORAGE = 300.0
TICK = 1.0
# A step may take so many times the median of the last ones.
_SLOWER, _MEDIAN_OF = 3.0, 32
# Seconds in which an exception has to end the process.
_UNWINDING = 10.0
_READING, _COMPUTING, _AFTER = range(3)
_DOING = ("reading its batch", "computing it", "logging, saving or sampling after it")
_LOADER_DIED = re.compile(r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\)")


class RankError(RuntimeError):
    """A process of the job died, raised or stalled; the message names its rank and the cause.

    Attributes:
        status: the exit status of a command that ends with it.
        rank: whose fault it is; None in a training of one process.
    """

    status = STALLED
    rank: int | None = None


class Watchdog:
    """Watches this process and, with several, its neighbour; see `watched`.

    One thread counts time. Another talks to the store, which blocks it if the store hangs.
    """

    def __init__(self) -> None:
        require("psutil", extra="train")  # here, not in the thread: a fork during an import would block the child
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), _ranks()
        self._main = threading.get_ident()
        self._position, self._limit, self._spent, self._computed = (-1, _AFTER), 0.0, 0.0, 0.0
        self._stored = 0.0  # seconds that the batch in progress waited for storage
        self._taken: deque[float] = deque(maxlen=_MEDIAN_OF)
        self._workers: set[Any] = set()  # loader processes
        self._verdict: Verdict | None = None
        self._proposed: Verdict | None = None
        self._reports: Reports | None = None
        self._since_contact = self._since_neighbour = self._since_verdict = 0.0
        self._ended, self._wake = threading.Event(), threading.Event()
        threads = [self._count_time] + ([self._exchange] if self.ranks > 1 else [])
        self._threads = [threading.Thread(target=each, daemon=True, name="ssmgen-watchdog") for each in threads]
        for thread in self._threads:
            thread.start()

    @contextmanager
    def batches(self, loader: DataLoader[Any], first: int) -> Iterator[Iterator[Any]]:
        """Iterate over a loader, a batch for every step from ``first`` on, and end its processes with the block.

        Raises:
            RuntimeError: a loader process was killed; names it.
        """
        from multiprocessing import active_children

        self._taken.clear()  # of another training
        before = set(active_children())
        batches = iter(loader)
        workers = self._workers = set(active_children()) - before
        try:
            yield self._steps(batches, first)
        except RuntimeError as error:
            if isinstance(error, RankError):
                raise
            if self.ranks == 1 and self._verdict is not None:  # the loader's error, because `_end` killed its processes
                raise RankError(self._verdict.sentence(1)) from error
            died = _LOADER_DIED.search(str(error))
            if died and self._verdict is None:
                raise RuntimeError(
                    f"the loader process {died[1]} was killed; the system does that when memory runs out. Lower "
                    f"num_workers or batch_size, or see the system's log ({str(error).strip()})"
                ) from None
            raise
        finally:
            kill_workers(workers)  # one that hangs would block the end of this process
            self._workers = set()
            self.done()

    def _steps(self, batches: Iterator[Any], first: int) -> Iterator[Any]:
        step = first
        while True:
            begun = time.monotonic()
            self._enter(step, _READING)
            try:
                batch = next(batches)
            except StopIteration:
                return
            read = time.monotonic() - begun
            begun = time.monotonic()
            self._enter(step, _COMPUTING)
            yield batch
            if self._position == (step, _COMPUTING):
                self.computed()
            self._taken.append(read + self._computed - begun)
            step += 1

    def computed(self) -> None:
        """The step is done. What follows, a checkpoint or samples, may take any time."""
        self._computed = time.monotonic()
        self._enter(self._position[0], _AFTER)

    def done(self) -> None:
        """No step is in progress: only death and silence are faults from here on."""
        self._position, self._limit = (-1, _AFTER), 0.0

    def _enter(self, step: int, stage: int) -> None:
        self._position, self._spent, self._stored = (step, stage), 0.0, 0.0
        first = FIRST_BATCH if stage == _READING else START
        longest = GRACE + _SLOWER * self._expected()
        self._limit = 0.0 if stage == _AFTER else longest if self._taken else first

    def _expected(self) -> float:
        """Seconds of a step: the median of the last ones, or 0 before the first has ended."""
        return statistics.median(self._taken) if self._taken else 0.0

    def first_fault(self, error: BaseException) -> RankError | None:
        """The fault that ended the job, of this process or another, to report instead of an error; None if alone.

        The other ranks learn of the error, or of the request to stop.
        """
        if self.ranks == 1:
            return None
        if isinstance(error, RankError):
            return error
        own = verdict_of(self.rank, error)
        if isinstance(error, KeyboardInterrupt):  # a launcher sends it to the ranks that are left, when one has died
            self._await_verdict(2 * TICK)
        patience = 3 * TICK
        if is_a_peers(error):
            patience += GRACE  # until the silence of the other is noticed
        else:
            self._proposed = own
            self._wake.set()
        self._await_verdict(patience)
        verdict = self._verdict = self._verdict or own
        fault = RankError(verdict.sentence(self.ranks))
        fault.status, fault.rank = verdict.status, verdict.rank
        _tell_launcher(str(fault))
        return fault

    def _await_verdict(self, patience: float) -> None:
        begun = time.monotonic()
        while self._verdict is None and time.monotonic() - begun < patience:
            time.sleep(TICK / 20)

    def close(self) -> None:
        """Tell the others that this process has done its part, unless it ended the job."""
        self._ended.set()
        self._wake.set()
        self._threads[-1].join(2 * TICK)
        if self._verdict is not None:
            time.sleep(self._farewell())

    def _farewell(self) -> float:
        """Seconds to let the others read the verdict: without torchrun, the store ends with the process of rank 0."""
        return 2 * TICK if self.rank == 0 and self.ranks > 1 else 0.0

    def _count_time(self) -> None:
        """Count time while this process runs: none passes while it is stopped, so that it can be continued."""
        last = time.monotonic()
        while not self._ended.wait(TICK):
            now = time.monotonic()
            passed, last = min(now - last, 2 * TICK), now
            self._count_step(passed)
            self._since_neighbour += passed
            self._since_contact += passed
            if self._verdict is not None:
                self._since_verdict += passed
                self._end(self._verdict)
            elif self.ranks == 1 and self._late():
                self._interrupt()
            elif self.ranks > 1 and self._since_contact > (START if self._reports is None else GRACE):
                self._end(self._lost())

    def _count_step(self, passed: float) -> None:
        """Add seconds to the time of the step; those in which a reading process waits for storage count apart."""
        reading = self._limit > 0 and self._position[1] == _READING and self._stored < STORAGE
        if not reading or not wait_for_storage(self._reading()):
            self._spent += passed
            return
        before, self._stored = self._stored, self._stored + passed
        if before <= GRACE < self._stored:
            print(
                f"warning: step {self._position[0] + 1} has waited for storage for {self._stored:.0f} s; the training "
                f"ends after {STORAGE:.0f} s more than usual",
                file=sys.stderr,
                flush=True,
            )

    def _reading(self) -> list[int]:
        """The processes that read examples: those of the loader, or this one."""
        return sorted(worker.pid for worker in self._workers) or [os.getpid()]

    def _late(self) -> bool:
        return 0 < self._limit < self._spent

    def _stall(self) -> str:
        """What this process is doing for too long."""
        (step, stage), spent, expected = self._position, self._spent + self._stored, self._expected()
        expectation = f" ({expected:.1f} s were expected)" if expected else ""
        text = f"stalled at step {step + 1}, {_DOING[stage]} for {spent:.0f} s{expectation}"
        if stage == _READING and self._workers:
            if stopped := stopped_of(self._reading()):
                return f"{text}: its loader process {stopped[0]} is stopped"
            return f"{text}: its loader processes {', '.join(map(str, self._reading()))} do not answer"
        return f"{text}, {place(self._main)[0]}"

    def _exchange(self) -> None:
        """Report to the store and look at the others, once a second."""
        with suppress(RuntimeError):  # the store has gone: `_count_time` ends the process if it does not end itself
            reports = Reports(self.rank, self.ranks, START)
            self._since_contact = self._since_neighbour = 0.0
            self._reports = reports
            while not self._ended.is_set():
                reports.publish(self._position, self._stall() if self._late() else "", place(self._main)[1])
                self._since_contact = 0.0
                if self._verdict is None:
                    self._verdict = reports.verdict(self._found(reports) or self._proposed)
                self._wake.wait(TICK)
                self._wake.clear()
            if self._verdict is None and self._proposed is None:
                reports.leave()

    def _found(self, reports: Reports) -> Verdict | None:
        """A fault of the next rank or of a step that takes too long."""
        if reports.neighbour_moved():
            self._since_neighbour = 0.0
        limit = GRACE if reports.neighbour_known() else START
        fault = reports.neighbour_fault(silent=self._since_neighbour > limit)
        return fault or (reports.stalled() if self._late() else None)

    def _lost(self) -> Verdict:
        """The end of who serves the store: the launcher, or rank 0 without one."""
        where = f"the store at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        text = f"lost contact: {where} has not answered for {self._since_contact:.0f} s, its machine may be down"
        server = self._reports.server if self._reports else None
        if server is None:
            return verdict_on(self.rank, text, identity())
        return fault_of(0, server) or verdict_on(0, text, server, "silent")

    def _interrupt(self) -> None:
        """Raise the error in the main thread; see `_end` for one that does not react."""
        verdict = self._verdict = verdict_on(self.rank, self._stall(), identity(), "raised")
        message = verdict.sentence(self.ranks)
        bound = type("RankError", (RankError,), {"__init__": lambda self: RuntimeError.__init__(self, message)})
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._main), ctypes.py_object(bound))

    def _end(self, verdict: Verdict) -> None:
        """End this process, but not one in which an exception is about to, or a signal that all ranks got."""
        unwinding = verdict.kind == "stopped" or (verdict.kind == "raised" and verdict.rank == self.rank)
        if self._since_verdict < (_UNWINDING if unwinding else self._farewell()):
            return
        sentence = verdict.sentence(self.ranks)
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        if self.ranks == 1:
            self._end_alone()
            return
        _tell_launcher(sentence)
        kill_children()
        if verdict.kind == "silent":
            verdict.kill()  # last: torchrun reports the processes that it finds dead at the same time
        os._exit(verdict.status)

    def _end_alone(self) -> None:
        """End a command whose main thread hangs; a notebook lives on, and gets the error when the thread returns."""
        kill_workers(self._workers)
        if _ends_process:
            os._exit(STALLED)
        self._ended.set()


_watchdog: Watchdog | None = None
_ends_process = False  # a command runs, nothing else of this process would be lost


def watch_ranks() -> Watchdog | None:
    """Watch the processes of a launcher until this one ends; None if there is only one.

    For commands: if this process stalls and its main thread hangs, the process is ended.
    """
    global _ends_process
    _ends_process = True
    return _shared()


def _shared() -> Watchdog | None:
    """The watchdog of this process as one of several ranks."""
    global _watchdog
    if _watchdog is None and _ranks() > 1:
        _watchdog = Watchdog()
        atexit.register(_watchdog.close)
        sys.excepthook = partial(_uncaught, sys.excepthook)
    return _watchdog


def _uncaught(hook: Callable[..., Any], kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Tell the other ranks of an exception that ends this one, after its traceback is printed."""
    hook(kind, error, trace)
    blamed(error)


@contextmanager
def watched() -> Iterator[Watchdog]:
    """Watch a training: the process itself, and all ranks if there are several.

    Raises:
        RankError: another rank failed, or this process stalled.
    """
    shared = _shared()
    watchdog = shared or Watchdog()
    try:
        yield watchdog
    except Exception as error:
        fault = watchdog.first_fault(error)
        if fault is None or fault is error or fault.rank == watchdog.rank:
            raise
        raise fault from error
    except (KeyboardInterrupt, SystemExit) as stopped:
        if not (isinstance(stopped, SystemExit) and stopped.code in (None, 0)):
            watchdog.first_fault(stopped)
        raise
    finally:
        watchdog.done()
        if shared is None:
            watchdog.close()


def blamed(error: BaseException) -> BaseException:
    """What to report of an error: the first fault of all ranks, and the error itself in a single process."""
    return (_watchdog and _watchdog.first_fault(error)) or error


def _ranks() -> int:
    """The number of processes; 1 if there is no store by which they could watch each other."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "MASTER_PORT" in os.environ else 1


def _tell_launcher(sentence: str) -> None:
    """So that torchrun's summary, printed last, has the cause."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            # Complete or absent: torchrun itself fails if it reads half of the file.
            write_text(Path(file), json.dumps({"message": {"message": sentence, "extraInfo": extra}}))
