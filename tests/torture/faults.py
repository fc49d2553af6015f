"""Saves that are killed or fail at every system call, and trainings that are killed at random times."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from ssmgen.training import checkpoints
from torture.campaign import Campaign, Case, Failed, named, status_name, without_traceback
from torture.process import end, fork, wait_for
from torture.trainings import log_lines, no_leftovers, resumable, same_end, step_of, trained, verified, verifies

#: Steps 3 and 6 are saved beforehand. The save of step 9 is the one that fails, with the prune of step 3 after it.
_BEFORE, _PAUSE, _SAVED, _END = 6, 8, 9, 12
_OPTIONS = {"steps": _END, "checkpoint_every": 3, "log_every": 1}
_ERRORS = ("ENOSPC", "EIO", "EACCES")
_CHANGING = {
    *("write", "writev", "pwrite64", "ftruncate", "fallocate", "fsync", "fdatasync", "rename", "renameat", "renameat2"),
    *("unlink", "unlinkat", "rmdir", "mkdir", "mkdirat", "link", "linkat", "symlink", "symlinkat"),
    *("chmod", "fchmod", "fchmodat", "utimensat"),
}
#: Calls without an effect on the disk; those that cannot fail for a cause outside the process are left out.
_READING = {
    "read",
    "pread64",
    "getdents64",
    "stat",
    "lstat",
    "fstat",
    "newfstatat",
    "statx",
    "mmap",
    "statfs",
    "fstatfs",
}
_LOOKING = {"openat", "stat", "lstat", "newfstatat", "statx", "statfs"}
_CALL = re.compile(r"^(\w+)\((.*)\)\s+= ")


def strace_missing() -> str:
    """Why system calls cannot be made to fail here, or an empty string."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"strace is not permitted: {tried.stderr.strip()[-200:]}"


def prepare(shared: Path) -> None:
    """An uncut run, one that was killed after two saves, and the system calls of the third save and its prune."""
    _ended(fork(lambda: trained(shared / "whole", **_OPTIONS), shared / "whole.txt"), 0)
    kill = partial(_at_step, _BEFORE, lambda: os.kill(os.getpid(), signal.SIGKILL))
    _ended(fork(lambda: trained(shared / "start", **_OPTIONS, on_step=kill), shared / "start.txt"), -signal.SIGKILL)
    assert [step_of(path) for path in verified(shared / "start")] == [3, 6]
    run, trace = shutil.copytree(shared / "start", shared / "traced"), shared / "trace.txt"
    _ended(_traced(run, shared / "traced.txt", ["-e", "trace=all", "-y", "-o", str(trace)], last=_SAVED), 0)
    (shared / "faults.json").write_text(json.dumps(_faults(trace.read_text(), str(run))))


def _ended(process: int, expected: int) -> None:
    status = end(process, 60)
    assert status == expected, f"ended with {status_name(status)}"


def _at_step(step: int, call: Any, done: int, model: torch.nn.Module) -> None:
    if done == step:
        call()


def _faults(trace: str, folder: str) -> list[dict[str, Any]]:
    """Every fault to try: the name of a call, how many calls of this name came before, and the error or the kill."""
    seen: dict[str, int] = {}
    faults: list[dict[str, Any]] = []
    for line in trace.splitlines():
        found = _CALL.match(line)
        if not found:
            continue
        name = found[1]
        seen[name] = seen.get(name, 0) + 1
        if folder not in line:
            continue
        place = {"call": name, "when": seen[name], "line": line[:300]}
        creates = name == "openat" and "O_CREAT" in line
        if name in _CHANGING or creates:
            faults += [place | {"fault": fault} for fault in ("SIGKILL", *_ERRORS)]
        elif name in _READING or name == "openat":
            by_path = name in _LOOKING and "AT_EMPTY_PATH" not in line  # permission is asked for where a name is given
            faults += [place | {"fault": fault} for fault in ("EIO", "EACCES")[: 1 + by_path]]
    return faults


@lru_cache
def _listed(shared: Path) -> list[dict[str, Any]]:
    return json.loads((shared / "faults.json").read_text())


def _traced(run: Path, output: Path, options: list[str], last: int = _END) -> int:
    """Train on in a process that strace watches from the step before the save; returns its id."""
    ready, go = os.pipe(), os.pipe()

    def pause() -> None:
        os.write(ready[1], b".")
        os.read(go[0], 1)

    def on_step(done: int, model: torch.nn.Module) -> None:
        _at_step(_PAUSE, pause, done, model)
        if done == last < _END:
            os._exit(0)

    def work() -> None:
        try:
            trained(run, **_OPTIONS, on_step=on_step)
        except OSError as error:
            print(f"error: {error}", flush=True)
            raise SystemExit(2) from None

    process = fork(work, output)
    os.close(ready[1])
    if not os.read(ready[0], 1):
        raise Failed(f"training ended before the save: {output.read_text()[-2000:]}")
    said = output.with_suffix(".strace")
    with said.open("w") as stream:
        subprocess.Popen(["strace", "-p", str(process), *options], stdout=stream, stderr=stream)
    attached = wait_for(lambda: "attached" in said.read_text(), 20)
    os.write(go[1], b".")
    for descriptor in (ready[0], *go):
        os.close(descriptor)
    if not attached:
        raise Failed(f"strace did not attach: {said.read_text()}")
    return process


def failing_call(case: Case) -> str:
    """Let one system call of a save or prune fail, or kill the process before it, and look at what is left."""
    fault = _listed(case.shared)[case.number]
    run, output = shutil.copytree(case.shared / "start", case.folder / "run"), case.folder / "output.txt"
    what = f"signal={fault['fault']}" if fault["fault"] == "SIGKILL" else f"error={fault['fault']}"
    inject = f"inject={fault['call']}:{what}:when={fault['when']}"
    trace = case.folder / "trace.txt"
    status = end(_traced(run, output, ["-e", f"trace={fault['call']}", "-e", inject, "-o", str(trace)]), 60)
    text = output.read_text()
    try:
        kind = _look_at(run, fault, status, text)
        # A line that could not be written is said to be missing.
        lost = "log.jsonl" in fault["line"] and fault["fault"] != "SIGKILL"
        _ended_well(case, run, output, log=not (lost and "log.jsonl" in text))
    except AssertionError as error:
        raise Failed(f"{fault['fault']} at {fault['line']}: {error}") from error
    return f"{fault['fault']}, {kind}"


def _look_at(run: Path, fault: dict[str, Any], status: int | None, text: str) -> str:
    """The state right after the fault."""
    without_traceback(text)
    if fault["fault"] == "SIGKILL":
        if status != -signal.SIGKILL:
            raise Failed(f"was not killed: {status_name(status)}, {text[-500:]}")
    elif status not in (0, 2):
        raise Failed(f"ended with {status_name(status)}: {text[-1000:]}")
    if status == 2:
        named(text, str(run))
    broken = [path.name for path in checkpoints(run / "checkpoints") if not verifies(path)]
    if broken:
        raise Failed(f"{', '.join(broken)} count as checkpoints and do not verify")
    resumable(run, _BEFORE)
    return {0: "went on", 2: "ended with a sentence"}.get(status or 0, "") if status != -9 else "resumed"


def _ended_well(case: Case, run: Path, output: Path, log: bool) -> None:
    """Resuming needs no hand-work, and ends as if nothing had happened."""
    status = end(fork(lambda: trained(run, **_OPTIONS), output), 60)
    if status != 0:
        raise Failed(f"resuming ended with {status_name(status)}: {output.read_text()[-2000:]}")
    same_end(case.shared / "whole", run, log=log)
    no_leftovers(run)


def _count(shared: Path) -> int:
    return len(_listed(shared))


def _calls(shared: Path) -> dict[str, Any]:
    """How many system calls there are, by name."""
    places = {(fault["call"], fault["when"]) for fault in _listed(shared)}
    names = sorted({name for name, _ in places})
    return {"system calls": len(places), **{name: sum(call == name for call, _ in places) for name in names}}


_KILLS = 5  # of one run
_LONG = {"steps": 30, "checkpoint_every": 2, "log_every": 1}


def prepare_kills(shared: Path) -> None:
    """An uncut run, and the time it takes."""
    started = time.monotonic()
    _ended(fork(lambda: trained(shared / "whole", **_LONG), shared / "whole.txt"), 0)
    (shared / "seconds").write_text(str(time.monotonic() - started))


def killed(case: Case) -> str:
    """Kill a run at random times, resume it each time, and compare its end with an uncut run."""
    seconds, output = float((case.shared / "seconds").read_text()), case.folder / "output.txt"
    run, kills, newest = case.folder / "run", 0, 0
    while kills < _KILLS:
        process = fork(lambda: trained(run, **_LONG), output)
        time.sleep(case.random.uniform(0, seconds / 2))
        os.kill(process, signal.SIGKILL)
        status = end(process, 10)
        if status not in (-signal.SIGKILL, 0):
            raise Failed(f"ended with {status_name(status)}: {output.read_text()[-2000:]}")
        if status == 0:  # it was faster
            shutil.rmtree(run)
            newest = 0
            continue
        kills += 1
        newest = _nothing_lost(run, newest)
    if (status := end(fork(lambda: trained(run, **_LONG), output), 60)) != 0:
        raise Failed(f"ended with {status_name(status)}: {output.read_text()[-2000:]}")
    same_end(case.shared / "whole", run)
    no_leftovers(run)
    return f"run killed {_KILLS} times"


def _nothing_lost(run: Path, before: int) -> int:
    """Require a verified checkpoint not older than the last interval; returns its step, 0 before the first save."""
    every, logged = _LONG["checkpoint_every"], max((line["step"] for line in log_lines(run)), default=0)
    least = max(before, (logged - 1) // every * every)
    return step_of(resumable(run, least)) if least else 0


CALLS = Campaign(
    "calls",
    "Every system call of a save and a prune fails (ENOSPC, EIO, EACCES) or is the last one (SIGKILL): a verified "
    "checkpoint is on disk, at most one interval is lost, and resuming ends with the bits of an uncut run",
    failing_call,
    _count,
    prepare,
    missing=strace_missing,
    figures=_calls,
)
KILLS = Campaign(
    "kills",
    f"A run killed {_KILLS} times at random moments (SIGKILL) resumes each time, loses at most one interval, and ends "
    "with the bits of an uncut run",
    killed,
    100,
    prepare_kills,
    limit=120,
)
