"""What the ranks of a job report to each other through the store of torch.distributed, and what follows from it."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, TCPStore

from ssmgen.training.processes import find, identity, is_stopped, kill_tree


@dataclass(frozen=True)
class Verdict:
    """The fault that ends a job.

    Attributes:
        rank, text: whose it is, and what: "stalled at step 4, ...".
        host, pid, born: the process; ``born`` is its start, because numbers are used again.
        kind: "raised": an exception ends the process; "stalled": its watchdog does; "silent": somebody else must.
    """

    rank: int
    text: str
    host: str
    pid: int
    born: float
    kind: str

    def sentence(self, ranks: int) -> str:
        """The fault with its process."""
        process = f"process {self.pid} on {self.host}" if self.host else ""
        if ranks == 1:
            return f"the training {self.text}"
        return f"rank {self.rank} of {ranks}{f' ({process})' if process else ''} {self.text}"

    def kill(self) -> None:
        """Kill the process with its loader processes, if it runs on this machine."""
        if self.host == platform.node():
            kill_tree(find(self.pid, self.born))


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
        """Report that this process ends, its part done."""
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
            return Verdict(self._rank, text, host="", pid=0, born=0.0, kind="silent") if silent else None
        fault = fault_of(self._rank, report)
        if silent:
            text = "stalled: it does not report any more, and its machine may be down"
            return fault or Verdict(self._rank, text, report["host"], report["pid"], report["born"], "silent")
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
            return _verdict(self.rank, own, own["stall"])
        if not all(report["stall"] for report in found.values()):
            return None  # the others wait for it, and it may take its time
        if left:
            rank, report = next(iter(left.items()))
            return _verdict(rank, report, "has ended, and the others wait for it")
        rank = next((rank for rank, report in behind.items() if not report["waiting"]), min(behind))
        alike = len(behind) == self.ranks and all(report["waiting"] for report in behind.values())
        return _verdict(rank, found[rank], found[rank]["stall"] + ("; so did all others" if alike else ""))

    def _read(self, key: str) -> dict[str, Any] | None:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None


def fault_of(rank: int, report: dict[str, Any]) -> Verdict | None:
    """The death or stop of a rank, if it runs on this machine."""
    if report["host"] != platform.node():
        return None
    process = find(report["pid"], report["born"])
    if process is None:
        text = "died: its process is gone. The system kills processes when memory runs out; see its log"
    elif is_stopped(process):
        text = "is stopped (SIGSTOP)"
    else:
        return None
    return Verdict(rank, text, report["host"], report["pid"], report["born"], "silent")


def _verdict(rank: int, report: dict[str, Any], text: str) -> Verdict:
    return Verdict(rank, text, report["host"], report["pid"], report["born"], "stalled")
