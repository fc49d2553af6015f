"""What the ranks of a job report to each other through the store of torch.distributed, and what follows from it."""

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, TCPStore

from ssmgen.signals import Stopped, status_of
from ssmgen.training.processes import find, identity, is_here, is_stopped, kill_tree

#: Exit status of a command that ended because a process of its job died or stalled: EX_TEMPFAIL, worth another try.
STALLED = 75
# After an error.
_RAISED = 2


@dataclass(frozen=True)
class Verdict:
    """The fault that ends a job.

    Attributes:
        rank, text: whose it is, and what: "stalled at step 4, ...".
        process: its `identity`; empty if it never reported.
        kind: "raised": an exception ends the process; "stopped": a signal or an exit does; "stalled": its watchdog
            does; "silent": somebody else must.
        status: the exit status of all ranks.
    """

    rank: int
    text: str
    process: dict[str, Any]
    kind: str
    status: int = STALLED

    def sentence(self, ranks: int) -> str:
        """The fault with its process."""
        process = "process {pid} on {host}".format(**self.process) if self.process else ""
        if ranks == 1:
            return f"the training {self.text}"
        return f"rank {self.rank} of {ranks}{f' ({process})' if process else ''} {self.text}"

    def kill(self) -> None:
        """Kill the process with its loader processes, if it runs on this machine."""
        if self.process and is_here(self.process) and (process := find(self.process["pid"], self.process["born"])):
            kill_tree(process)


class Reports:
    """The reports of all ranks.

    Args:
        rank, ranks: which of how many processes this one is.
        seconds: how long to wait for the store at MASTER_ADDR and MASTER_PORT.

    Raises:
        RuntimeError: the store does not answer, here and in all methods that use it.
    """

    def __init__(self, rank: int, ranks: int, seconds: float) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: a thread that waits for an answer blocks the others that use the same one.
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=seconds))
        self._store = PrefixStore(f"ssmgen/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self.rank, self.ranks = rank, ranks
        self._report: dict[str, Any] = {"count": 0, "left": False, **identity()}
        self._neighbour: dict[str, Any] | None = None
        #: The report of rank 0 if that serves the store, to tell later why it does not answer.
        self.server: dict[str, Any] | None = None

    def publish(self, position: tuple[int, int], stall: str, waiting: bool) -> None:
        """Report where this process is, how it stalls if it does, and whether it seems to wait for the others."""
        news = {"count": self._report["count"] + 1, "position": position, "stall": stall, "waiting": waiting}
        self._report |= news
        if self.server is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            self.server = self._read("rank0")
        self._store.set(f"rank{self.rank}", json.dumps(self._report))

    def leave(self) -> None:
        """Report that this process ends with its part done."""
        self._report |= {"left": True}
        self._store.set(f"rank{self.rank}", json.dumps(self._report))
        self._read("verdict")  # an answer: the line above has arrived

    def verdict(self, proposed: Verdict | None) -> Verdict | None:
        """The verdict of the job, which is the first proposed by any rank."""
        if proposed is not None:
            self._store.compare_set("verdict", "", json.dumps(asdict(proposed)))
        found = self._read("verdict")
        return Verdict(**found) if found else None

    def neighbour_moved(self) -> bool:
        """Read the report of the next rank that has not left; returns whether it is a new one."""
        for distance in range(1, self.ranks):
            found = self._read(f"rank{(self.rank + distance) % self.ranks}")
            if found is None or not found["left"]:
                before, self._neighbour = self._neighbour, found
                self._rank = (self.rank + distance) % self.ranks
                return found != before
        self._neighbour, self._rank = None, self.rank
        return True

    def neighbour_known(self) -> bool:
        """Whether the next rank has ever reported."""
        return self._neighbour is not None

    def neighbour_fault(self, silent: bool) -> Verdict | None:
        """The death of the next rank, and its silence if that has lasted too long."""
        report = self._neighbour
        if report is None:
            text = "did not start: it never reported"
            return Verdict(self._rank, text, {}, "silent") if silent else None
        fault = fault_of(self._rank, report)
        if silent:
            text = "stalled: it does not report any more, and its machine may be down"
            return fault or verdict_on(self._rank, text, report, "silent")
        if fault is None or find(report["pid"], report["born"]):
            return None  # it may be continued soon
        again = self._read(f"rank{self._rank}")
        return None if again and again["left"] else fault

    def stalled(self) -> Verdict | None:
        """The rank for which the others wait, if it takes too long; asked by a rank that takes too long itself."""
        found = {rank: self._read(f"rank{rank}") or {"left": False, "stall": "", "position": [-1, 0]}
                 for rank in range(self.ranks)}  # fmt: skip
        left = {rank: report for rank, report in found.items() if report["left"]}
        found = {rank: report for rank, report in found.items() if not report["left"]}
        last = min(report["position"] for report in found.values())
        behind = {rank: report for rank, report in found.items() if report["position"] == last}
        own = behind.get(self.rank)
        if own and not own["waiting"]:
            return verdict_on(self.rank, own["stall"], own)
        if not all(report["stall"] for report in found.values()):
            return None  # the others wait for it, and it may take its time
        if left:
            rank, report = next(iter(left.items()))
            return verdict_on(rank, "has ended, and the others wait for it", report)
        rank = next((rank for rank, report in behind.items() if not report["waiting"]), min(behind))
        alike = len(behind) == self.ranks and all(report["waiting"] for report in behind.values())
        return verdict_on(rank, found[rank]["stall"] + ("; so did all others" if alike else ""), found[rank])

    def _read(self, key: str) -> dict[str, Any] | None:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None


def fault_of(rank: int, report: dict[str, Any]) -> Verdict | None:
    """The death or stop of a rank, if it runs on this machine."""
    if not is_here(report):
        return None
    process = find(report["pid"], report["born"])
    if process is None:
        text = "died: its process is gone. The system kills processes when memory runs out; see its log"
    elif is_stopped(process):
        text = "is stopped (SIGSTOP)"
    else:
        return None
    return verdict_on(rank, text, report, "silent")


def verdict_on(
    rank: int, text: str, report: Mapping[str, Any], kind: str = "stalled", status: int = STALLED
) -> Verdict:
    """A verdict on the process of a report, or of an `identity`."""
    process = {key: report[key] for key in ("host", "machine", "pid", "born")}
    return Verdict(rank, text, process, kind, status)


def verdict_of(rank: int, error: BaseException) -> Verdict:
    """The verdict on this process when an error or a request to stop ends it."""
    if isinstance(error, KeyboardInterrupt):
        name = signal.Signals(error.number if isinstance(error, Stopped) else signal.SIGINT).name
        return verdict_on(rank, f"was stopped by {name}", identity(), "stopped", status_of(error))
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
        return verdict_on(rank, f"has ended with status {status}", identity(), "stopped", status)
    # What happened to another rank may not happen again; an error of this one would.
    status = STALLED if is_a_peers(error) else _RAISED
    return verdict_on(rank, f"failed: {_text(error)}", identity(), "raised", status)


def is_a_peers(error: BaseException) -> bool:
    """Whether an error says that another process has gone."""
    from torch.distributed import DistError

    said = str(error)
    return isinstance(error, RuntimeError) and (
        isinstance(error, DistError) or "gloo/transport" in said or "by peer" in said or "NCCL" in said
    )


def _text(error: BaseException) -> str:
    """The error on one line, without the traceback that torch puts before that of a loader process."""
    name, text = type(error).__name__, str(error)
    own = text.rpartition(f"{name}: ")[2] if text.startswith("Caught ") else text
    return f"{name}: {own.strip()}" if own.strip() else name
