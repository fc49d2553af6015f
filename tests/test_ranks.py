"""A rank or loader process that dies, raises or stalls ends the job and is named; ranks share the work of sampling."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("accelerate", reason="training needs accelerate")

from ssmgen.training import checkpoints, verify_checkpoint
from ssmgen.training.watchdog import STALLED

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "GRACE": "6"}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


class Job:
    """Processes that a test started, with what they print."""

    def __init__(self, folder: Path, *command: str, ranks: int = 0):
        self.folder, self.command = folder, command
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        own = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)] or [{}]
        self.processes = [self._start(rank, environment) for rank, environment in enumerate(own)]

    def _start(self, rank: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        # Into a file: a process that is left would keep a pipe open.
        with self._output(rank).open("wb") as stream:
            return subprocess.Popen(
                [sys.executable, *self.command], cwd=ROOT, env=ENVIRONMENT | environment, stdout=stream, stderr=stream
            )

    def _output(self, rank: int) -> Path:
        return self.folder / f"output-{rank}.txt"

    def end(self) -> tuple[list[int], list[str]]:
        """Wait for the end; status and output of each process. No process of the job may be left."""
        try:
            statuses = [process.wait(120) for process in self.processes]
            until = time.monotonic() + 2
            while left := self._left():
                assert time.monotonic() < until, f"left: {left}"
                time.sleep(0.1)
        finally:
            for process in self._left():
                process.kill()
        return statuses, [self._output(rank).read_text() for rank in range(len(self.processes))]

    def _left(self) -> list[psutil.Process]:
        found = [p for p in psutil.process_iter(["cmdline", "status"]) if str(self.folder) in str(p.info["cmdline"])]
        return [p for p in found if p.info["status"] != psutil.STATUS_ZOMBIE]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """All at the same time, as most of their time goes into starting."""
    started = {}
    for fault, launcher, ranks in (("stop", TORCHRUN, 0), ("kill", (), 2), ("raise", (), 2), ("loader-stop", (), 0)):
        folder = tmp_path_factory.mktemp(fault)
        started[fault] = Job(folder, *launcher, "tests/ranks_script.py", str(folder / "run"), fault, "4", ranks=ranks)
    return started


def last_error(output: str) -> str:
    return [line for line in output.splitlines() if line.startswith("error: ")][-1]


def check_checkpoints(job: Job) -> None:
    saved = checkpoints(job.folder / "run" / "checkpoints")
    assert saved and [verify_checkpoint(path)["step"] for path in saved] == [2, 4][: len(saved)]


def test_a_stopped_rank_ends_the_job_and_is_named_last(jobs):
    (status,), (output,) = jobs["stop"].end()
    assert status == 1, "torchrun's own"
    assert "rank 1 of 2" in last_error(output) and last_error(output).endswith("is stopped (SIGSTOP)")
    summary = output.rpartition("Root Cause")[2]
    assert f"exitcode  : {STALLED}" in summary and "is stopped (SIGSTOP)" in summary
    check_checkpoints(jobs["stop"])


def test_a_killed_rank_ends_the_job_and_is_named_last(jobs):
    statuses, outputs = jobs["kill"].end()
    assert statuses == [STALLED, -signal.SIGKILL]
    assert "rank 1 of 2" in last_error(outputs[0]) and "died: its process is gone" in last_error(outputs[0])
    check_checkpoints(jobs["kill"])


def test_a_raising_rank_ends_the_job_and_is_named_last(jobs):
    statuses, outputs = jobs["raise"].end()
    assert statuses == [STALLED, 2]
    for output in outputs:
        assert "rank 1 of 2" in last_error(output)
        assert last_error(output).endswith("failed: ValueError: a fault on purpose")
    check_checkpoints(jobs["raise"])


def test_a_stalled_loader_process_ends_a_training_of_one_process(jobs):
    (status,), (output,) = jobs["loader-stop"].end()
    assert status == STALLED
    assert "the training stalled at step" in last_error(output) and "reading its batch" in last_error(output)
    assert last_error(output).endswith("is stopped") and "its loader process" in last_error(output)
    check_checkpoints(jobs["loader-stop"])
