"""A campaign: many independent cases of one promise, drawn from a seed and run in forked, watched processes."""

import contextlib
import importlib
import json
import os
import random
import re
import selectors
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torture.process import end, fork, own_descriptors, threads


class Failed(AssertionError):
    """A promise that does not hold in one case; the message says what was found."""


@dataclass(frozen=True)
class Case:
    """What a case is given.

    Attributes:
        number: of the case; with the seed it decides everything drawn.
        random: the case's own generator.
        folder: an empty folder, kept if the case fails.
        shared: the folder that the campaign's ``prepare`` filled; not to be changed.
    """

    number: int
    random: random.Random
    folder: Path
    shared: Path


@dataclass(frozen=True)
class Campaign:
    """What is done, how often, and for how long at most.

    Attributes:
        name: by which the command line selects it.
        promise: what is shown if no case fails; a line of the table in docs/reliability.md.
        run: one case; returns its kind, by which cases are counted, or raises `Failed`.
        count: cases at share 1; a function of the shared folder if ``prepare`` finds it out.
        prepare: fills the shared folder once, in a process of its own.
        limit: seconds after which a case is a hang.
        jobs: cases at the same time; None for one per core.
        missing: why it cannot run here, or an empty string.
        figures: more figures, from what the cases wrote into the shared folder.
    """

    name: str
    promise: str
    run: Callable[[Case], str]
    count: int | Callable[[Path], int]
    prepare: Callable[[Path], None] = lambda shared: None
    limit: float = 60.0
    jobs: int | None = None
    missing: Callable[[], str] = lambda: ""
    figures: Callable[[Path], dict[str, Any]] = lambda shared: {}


@dataclass
class Report:
    """What a campaign found."""

    name: str
    promise: str
    cases: int = 0
    of: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0
    slowest: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


def run_campaign(
    campaign: Campaign,
    folder: Path,
    *,
    share: float = 1.0,
    seed: int = 0,
    jobs: int | None = None,
    only: list[int] | None = None,
) -> Report:
    """Run a share of a campaign's cases, or the cases ``only``, below ``folder``; passed cases leave nothing there."""
    report = Report(campaign.name, campaign.promise)
    started = time.monotonic()
    report.skipped = campaign.missing()
    if report.skipped:
        return report
    shared = folder / campaign.name / "shared"
    shutil.rmtree(shared.parent, ignore_errors=True)
    shared.mkdir(parents=True)
    status = end(fork(lambda: campaign.prepare(shared), shared.parent / "prepare.txt"), 300)
    if status != 0:
        text = shared.parent.joinpath("prepare.txt").read_text()
        report.failures.append(_failure(campaign, seed, -1, shared, f"preparing ended with {status}: {text[-2000:]}"))
        return report
    import_listed(shared / "modules.json")
    report.of = campaign.count if isinstance(campaign.count, int) else campaign.count(shared)
    numbers = only if only is not None else _drawn(report.of, share, seed)

    def work(number: int) -> str:
        own = shared.parent / f"case-{number:05d}"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        kind = campaign.run(Case(number, random.Random(f"{seed}:{campaign.name}:{number}"), own, shared))
        shutil.rmtree(own)
        return kind

    for number, kind, failure, seconds in _watched(numbers, work, jobs or campaign.jobs or _cores(), campaign.limit):
        report.cases += 1
        report.slowest = max(report.slowest, seconds)
        if failure:
            own = shared.parent / f"case-{number:05d}"
            report.failures.append(_failure(campaign, seed, number, own, failure))
            print(f"{campaign.name}: case {number} failed: {failure.splitlines()[-1][:300]}", flush=True)
        else:
            report.kinds[kind] = report.kinds.get(kind, 0) + 1
        _progress(report, len(numbers), started)
    report.figures = campaign.figures(shared)
    report.seconds = round(time.monotonic() - started, 1)
    return report


def list_modules(file: Path) -> None:
    """Add what this process has imported to a list, for `import_listed`."""
    before = json.loads(file.read_text()) if file.exists() else []
    file.write_text(json.dumps(sorted({*before, *sys.modules})))


def import_listed(file: Path) -> None:
    """Import what earlier processes listed, so that forked ones need not: most of a short command's time."""
    for name in json.loads(file.read_text()) if file.exists() else []:
        if name not in sys.modules and name.split(".")[0] != "__main__":
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    assert threads() == 1, "a process with threads cannot be forked safely"


def _drawn(count: int, share: float, seed: int) -> list[int]:
    """A share of the numbers of all cases, at least one; all of them for a share of 1."""
    wanted = max(1, min(count, round(count * share)))
    return sorted(random.Random(seed).sample(range(count), wanted))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _failure(campaign: Campaign, seed: int, number: int, folder: Path, what: str) -> dict[str, Any]:
    again = f"PYTHONPATH=tests python -m torture {campaign.name} --seed {seed} --case {number}"
    return {"case": number, "what": what, "folder": str(folder), "reproduce": again}


def _progress(report: Report, wanted: int, started: float) -> None:
    if report.cases == wanted or report.cases % max(1, wanted // 10) == 0:
        failed = f", {len(report.failures)} FAILED" if report.failures else ""
        print(f"{report.name}: {report.cases}/{wanted}{failed}, {time.monotonic() - started:.0f} s", flush=True)


class _Worker:
    """A process that runs cases one after the other and says when each begins and ends."""

    def __init__(self, numbers: list[int], work: Callable[[int], str]) -> None:
        self.left = numbers
        self.current: int | None = None
        self.since = time.monotonic()
        self.buffer = b""
        self.reading, writing = os.pipe()
        self.process = fork(lambda: self._run(writing, work), None)
        os.close(writing)

    def _run(self, writing: int, work: Callable[[int], str]) -> None:
        own_descriptors.append(writing)
        for number in self.left:
            _say(writing, {"begins": number})
            try:
                kind, failure = work(number), ""
            except Failed as error:
                kind, failure = "", str(error)
            except BaseException:
                kind, failure = "", traceback.format_exc()
            _say(writing, {"ends": number, "kind": kind, "failure": failure[-4000:]})

    def messages(self) -> list[dict[str, Any]] | None:
        """What the worker said since the last call; None once it has ended."""
        read = os.read(self.reading, 65536)
        if not read:
            return None
        *lines, self.buffer = (self.buffer + read).split(b"\n")
        return [json.loads(line) for line in lines]


def _say(writing: int, content: dict[str, Any]) -> None:
    line = (json.dumps(content) + "\n").encode()
    while line:
        line = line[os.write(writing, line) :]


def _watched(
    numbers: list[int], work: Callable[[int], str], jobs: int, limit: float
) -> Iterator[tuple[int, str, str, float]]:
    """Run the cases; yields number, kind, failure and seconds. A worker that dies or hangs is a failure of its case."""
    selector = selectors.DefaultSelector()

    def start(left: list[int]) -> None:
        if left:
            worker = _Worker(left, work)
            selector.register(worker.reading, selectors.EVENT_READ, worker)

    def stop(worker: _Worker, seconds: float) -> int | None:
        selector.unregister(worker.reading)
        os.close(worker.reading)
        return end(worker.process, seconds)

    for job in range(jobs):
        start(numbers[job::jobs])
    while selector.get_map():
        for key, _ in selector.select(0.2):
            worker: _Worker = key.data
            messages = worker.messages()
            for message in messages or []:
                if "begins" in message:
                    worker.current, worker.since = message["begins"], time.monotonic()
                else:
                    worker.left = worker.left[1:]
                    worker.current = None
                    took = time.monotonic() - worker.since
                    yield message["ends"], message["kind"], message["failure"], took
            if messages is None:
                status = stop(worker, 5)
                if worker.current is not None:
                    yield worker.current, "", f"the process died: {status_name(status)}", 0.0
                    start(worker.left[1:])
        for key in list(selector.get_map().values()):
            worker = key.data
            if worker.current is not None and time.monotonic() - worker.since > limit:
                stop(worker, 0)
                yield worker.current, "", f"hangs: not done after {limit:.0f} s", limit
                start(worker.left[1:])


def status_name(status: int | None) -> str:
    """An exit status in words: ``status 2``, ``signal 9``, or that it had to be killed."""
    if status is None:
        return "hung and was killed"
    return f"status {status}" if status >= 0 else f"signal {-status}"


def named(message: str, *names: str) -> None:
    """Require that a message names one of the files."""
    if not any(name in message for name in names):
        raise Failed(f"the message names none of {', '.join(names)}: {message[:500]}")


def without_traceback(text: str) -> None:
    """Require that what a process printed has no traceback."""
    if re.search(r"^Traceback \(most recent call last\)", text, re.MULTILINE):
        raise Failed(f"a traceback: {text[-3000:]}")
