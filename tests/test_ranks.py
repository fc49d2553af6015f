"""A rank or loader process that dies, raises or stalls ends the job and is named; ranks share the work of sampling."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from torch.utils.data import DataLoader

pytest.importorskip("accelerate", reason="training needs accelerate")

from ssmgen.data.drawn_faces import draw_face
from ssmgen.data.images import write_png
from ssmgen.signals import Stopped
from ssmgen.training import checkpoints, processes, rank_reports, verify_checkpoint, watchdog
from ssmgen.training.processes import identity
from ssmgen.training.rank_reports import STALLED, Reports, Verdict, fault_of, verdict_of, verdict_on
from ssmgen.training.watchdog import RankError, watched

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "GRACE": "10"}
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
    for fault, launcher, ranks in (
        *(("stop", TORCHRUN, 0), ("kill", (), 2), ("raise", (), 2), ("loader-stop", (), 0)),
        *(("lock", (), 2), ("interrupt", (), 2), ("warn", (), 2)),
    ):
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
    summary = output.rpartition("FAILED")[2]
    assert f"exitcode  : {STALLED}" in summary and "is stopped (SIGSTOP)" in summary
    check_checkpoints(jobs["stop"])


def test_a_killed_rank_ends_the_job_and_is_named_last(jobs):
    statuses, outputs = jobs["kill"].end()
    assert statuses == [STALLED, -signal.SIGKILL]
    assert "rank 1 of 2" in last_error(outputs[0]) and "died: its process is gone" in last_error(outputs[0])
    check_checkpoints(jobs["kill"])


def test_a_raising_rank_ends_the_job_and_is_named_last(jobs):
    statuses, outputs = jobs["raise"].end()
    assert statuses == [2, 2], "it would be raised again"
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


def test_a_loader_whose_processes_the_watchdog_killed_does_not_hide_the_stall():
    """The error that is raised in the main thread may be lost, for instance in a destructor."""
    with (
        pytest.raises(RankError, match="the training stalled") as caught,
        watched() as own,
        own.batches(DataLoader(range(3)), 0),
    ):
        own._verdict = verdict_on(0, "stalled at step 3, reading its batch for 21 s", identity(), "raised")
        raise RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed.")
    assert caught.value.status == STALLED


def test_an_error_before_the_first_step_ends_the_other_ranks(jobs):
    """The lock of the run's folder, which rank 0 alone takes, while rank 1 waits for it."""
    statuses, outputs = jobs["lock"].end()
    assert statuses == [2, 2]
    for output in outputs:
        assert "rank 0 of 2" in last_error(output) and "failed: RunLockError: " in last_error(output)


def test_a_rank_that_is_stopped_outside_the_loop_ends_the_others(jobs):
    """They wait for it, and did not get the signal."""
    statuses, outputs = jobs["interrupt"].end()
    assert statuses == [128 + signal.SIGTERM] * 2
    assert "rank 1 of 2" in last_error(outputs[0]) and last_error(outputs[0]).endswith("was stopped by SIGTERM")
    assert "stopped by SIGTERM; no half-written file is left" in outputs[1]


def test_all_ranks_know_the_signal_that_one_of_them_got(jobs):
    statuses, outputs = jobs["warn"].end()
    assert statuses == [128 + signal.SIGUSR1] * 2, outputs
    ends = [output.splitlines()[-1] for output in outputs]
    assert ends == ["done 6"] * 2, "after the step in which the signal came, and the next one, which tells the others"


def test_two_requests_to_stop_end_a_training_whose_loader_hangs(tmp_path):
    """Faster than the watchdog, which first waits for the batch; and the loader process is gone."""
    code = (
        "import os, signal, sys, threading, time; from pathlib import Path; import ranks_script, toy_training as toy\n"
        "from ssmgen.training import loop\n"
        "def ask():\n"
        "    for _ in range(2): time.sleep(2); os.kill(os.getpid(), signal.SIGTERM)\n"
        "begin = lambda step, ema: threading.Thread(target=ask).start() if step == 4 else None\n"
        "data = ranks_script.Faulty('loader-loop', 4)\n"
        "toy.run(Path(sys.argv[1]), steps=12, checkpoint_every=2, num_workers=1, data=data, on_step=begin)\n"
    )
    job = Job(tmp_path, "-c", code, str(tmp_path / "run"))
    (status,), (output,) = job.end()
    assert status not in (0, STALLED) and "stalled" not in output, output
    check_checkpoints(job)


class Reported:
    """Reports of ranks as `Reports.stalled` reads them, without a store."""

    def __init__(self, rank, *positions, waiting=(), late=None, left=()):
        late = range(len(positions)) if late is None else late
        self.rank, self.ranks = rank, len(positions)
        self.found = {
            f"rank{i}": {
                **{"position": list(position), "stall": f"stalled, {i}" if i in late else "", "waiting": i in waiting},
                **{"left": i in left, "host": "node", "machine": "a", "pid": 1, "born": "0"},
            }
            for i, position in enumerate(positions)
        }

    def _read(self, key):
        return self.found.get(key)

    def verdict(self):
        found = Reports.stalled(self)
        return found and (found.rank, found.text)


def test_the_rank_is_named_for_which_the_others_wait():
    reading, computing, saving = 0, 1, 2
    behind = ((4, computing), (4, reading), (4, computing))
    assert Reported(1, *behind, waiting=(0, 2)).verdict() == (1, "stalled, 1")
    assert Reported(0, *behind, waiting=(0, 2)).verdict() == (1, "stalled, 1"), "all are late"
    assert Reported(0, *behind, waiting=(0, 2), late=(0, 2)).verdict() is None, "it may still be in time"
    busy = ((4, computing),) * 3
    assert Reported(2, *busy, waiting=(0, 1)).verdict() == (2, "stalled, 2")
    assert Reported(0, *busy, waiting=(0, 1)).verdict() == (2, "stalled, 2")
    assert Reported(0, *busy, waiting=(0, 1, 2)).verdict() == (0, "stalled, 0; so did all others")
    long_save = ((3, saving), (4, computing))
    assert Reported(1, *long_save, waiting=(1,), late=(1,)).verdict() is None, "a checkpoint may take its time"
    assert Reported(1, (3, saving), (4, computing), waiting=(1,), left=(0,)).verdict() == (
        0,
        "has ended, and the others wait for it",
    )


def test_time_in_which_the_process_is_stopped_does_not_count(monkeypatch):
    """Ctrl-Z and fg, or a laptop that sleeps."""
    clock, ticks = iter((0.0, 1.0, 3601.0, 3602.0)), iter((False, False, False, True))
    dog = object.__new__(watchdog.Watchdog)
    dog._spent = dog._stored = dog._since_contact = dog._since_neighbour = dog._since_verdict = 0.0
    dog._verdict, dog._limit, dog.ranks, dog._position = None, 20.0, 1, (0, watchdog._COMPUTING)
    dog._ended = type("Ended", (), {"wait": lambda self, seconds: next(ticks)})()
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(clock))
    dog._count_time()
    assert dog._spent == 4.0


def test_a_stalled_step_is_an_error_with_the_line_where_it_is(monkeypatch):
    """In a single process, such as a notebook, which must survive."""
    monkeypatch.setattr(watchdog, "GRACE", 0.2)
    monkeypatch.setattr(watchdog, "TICK", 0.05)
    with (
        pytest.raises(RankError, match=r"the training stalled at step 7, computing it for .* in hang at test_ranks.py"),
        watched() as dog,
        dog.batches(range(100), 5) as batches,
    ):
        for number in batches:
            if number == 1:
                hang()
    assert not dog._threads[0].is_alive() or dog._threads[0].join(1) is None


def test_a_clock_that_is_set_kills_no_process(monkeypatch):
    """The system derives a process's time of birth from the clock, anew at every question."""
    me, create_time = processes.identity(), psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: create_time(self) + 3600)
    assert processes.find(me["pid"], me["born"]).pid == os.getpid()
    assert processes.find(me["pid"], me["born"] + "0") is None, "another process with this number"


def test_nothing_is_known_of_a_process_in_another_container():
    """Two containers of one machine may have one name, and their processes the same numbers."""
    gone = processes.identity() | {"pid": 2**22 + 1}
    assert "died: its process is gone" in fault_of(1, gone).text
    assert fault_of(1, gone | {"machine": "another"}) is None


def test_a_process_that_has_gone_takes_no_other_with_it(monkeypatch):
    killed = []
    monkeypatch.setattr(rank_reports, "kill_tree", killed.append)
    for changed in ({"pid": 2**22 + 1}, {"machine": "another"}):
        Verdict(1, "is silent", processes.identity() | changed, "silent").kill()
    Verdict(1, "did not start", {}, "silent").kill()
    assert killed == []
    Verdict(1, "is silent", processes.identity(), "silent").kill()
    assert [process.pid for process in killed] == [os.getpid()]


def test_every_rank_ends_with_the_status_of_the_first_fault():
    """An error would be raised again; what died or stalled is worth another try."""
    stopped = verdict_of(0, Stopped(signal.SIGUSR1))
    assert (stopped.text, stopped.status) == ("was stopped by SIGUSR1", 138)
    assert verdict_of(0, SystemExit(3)).status == 3
    assert verdict_of(0, ValueError("a fault")).status == 2
    assert verdict_of(0, RuntimeError("Connection closed by peer")).status == STALLED


@pytest.mark.parametrize(("seconds", "late"), [(90, False), (400, True)])
def test_time_in_which_a_loader_process_waits_for_storage_counts_apart(monkeypatch, capsys, seconds, late):
    """A network file system that changes servers takes more than the usual 20 s; one that hangs ends the training."""
    dog = object.__new__(watchdog.Watchdog)
    dog._spent = dog._stored = 0.0
    dog._limit, dog._position = 20.0, (4, watchdog._READING)
    dog._workers = {type("Worker", (), {"pid": 4711})}
    status = "disk-sleep"
    process = lambda pid: type("Process", (), {"status": lambda self: status})()  # noqa: E731
    monkeypatch.setattr(psutil, "Process", process)
    for _ in range(seconds):
        dog._count_step(1.0)
    assert dog._late() == late
    assert capsys.readouterr().err.count("warning: step 5 has waited for storage for 21 s") == 1
    status = "running"  # in an endless loop, or "sleeping" in a lock
    for _ in range(21):
        dog._count_step(1.0)
    assert dog._late()


def test_an_uncaught_exception_of_a_program_of_your_own_is_no_end_with_its_part_done(monkeypatch):
    told, printed = [], []
    fake = type("Fake", (), {"first_fault": lambda self, error: told.append(error), "close": lambda self: None})
    monkeypatch.setattr(watchdog, "Watchdog", fake)
    monkeypatch.setattr(watchdog, "_ranks", lambda: 2)
    monkeypatch.setattr(watchdog, "_watchdog", None)
    monkeypatch.setattr(watchdog, "_ends_process", False)
    monkeypatch.setattr(sys, "excepthook", lambda *error: printed.append(error[1]))
    watchdog.watch_ranks()
    error = KeyError("after the training")
    sys.excepthook(KeyError, error, None)
    assert told == printed == [error]


@pytest.mark.parametrize("command", [False, True])
def test_a_main_thread_that_does_not_react_ends_a_command_but_no_notebook(monkeypatch, capsys, command):
    ended, killed = [], []
    monkeypatch.setattr(watchdog.os, "_exit", ended.append)
    monkeypatch.setattr(watchdog, "kill_children", lambda: pytest.fail("others' processes"))
    monkeypatch.setattr(watchdog, "kill_workers", killed.extend)
    monkeypatch.setattr(watchdog, "_ends_process", command)
    dog = object.__new__(watchdog.Watchdog)
    dog.rank, dog.ranks, dog._workers, dog._ended = 0, 1, {"its worker"}, threading.Event()
    dog._since_verdict = watchdog._UNWINDING - 1
    verdict = Verdict(0, "stalled", processes.identity(), "raised")
    dog._end(verdict)
    assert not killed and not ended
    dog._since_verdict = watchdog._UNWINDING + 1
    dog._end(verdict)
    assert killed == ["its worker"] and ended == [STALLED] * command
    assert "error: the training stalled" in capsys.readouterr().err


def hang():
    until = time.monotonic() + 20
    while time.monotonic() < until:
        time.sleep(0.01)


def test_two_processes_sample_the_images_of_one(tmp_path, trained):
    """To the bit, from masks and seeds divided among them; every name is printed once."""
    for index in range(3):
        (tmp_path / "masks").mkdir(exist_ok=True)
        write_png(tmp_path / "masks" / f"m{index}.png", draw_face(index, size=96)[1])
    from recipes.sisma import sample

    words = [f"run={trained}", f"mask={tmp_path / 'masks'}", "steps=1", "solver=euler", "num_images=17"]
    job = Job(tmp_path, *TORCHRUN, "-m", "recipes.sisma.sample", *words, f"out={tmp_path / 'two'}")
    sample.main([*words, f"out={tmp_path / 'one'}"])
    (status,), (output,) = job.end()
    assert status == 0, output
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert len(one) == 3 * 17 and one == two
    assert all(output.count(f"/two/{name}\n") == 1 for name in one)


def job_script():
    page = (ROOT / "docs" / "scaling.md").read_text()
    (script,) = (block for block in page.split("```sh\n")[1:] if block.startswith("#!/bin/bash"))
    return script.partition("```")[0]


def test_the_job_script_of_the_docs_is_a_shell_script():
    """And one that a linter of shell scripts accepts, where it is installed."""
    for command in (["bash", "-n"], *([["shellcheck", "-"]] if shutil.which("shellcheck") else [])):
        checked = subprocess.run(command, input=job_script(), text=True, capture_output=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "--signal=USR1@" in job_script() and "--kill-on-bad-exit=0" in job_script()


@pytest.mark.parametrize(
    ("status", "saves", "again"),
    [
        *((STALLED, True, True), (STALLED, False, False), (138, True, True), (138, False, False), (137, True, True)),
        *((137, False, False), (0, True, False), (2, True, False), (143, True, False), (130, True, False)),
    ],
)
def test_the_job_script_starts_again_only_what_made_progress(tmp_path, status, saves, again):
    """With a ``srun`` that ends with a status, after a checkpoint or without one."""
    for name, body in (
        ("srun", f'echo "$*" > srun.txt; {"mkdir runs/stable/checkpoints/step-00000200;" * saves} exit {status}'),
        ("scontrol", 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$*" > requeued.txt; fi'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "runs/stable/checkpoints/step-00000100").mkdir(parents=True)
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "8"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", job_script()], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, "")
    requeued = tmp_path / "requeued.txt"
    assert requeued.exists() == again and (not again or requeued.read_text() == "requeue 4711\n")
    assert "--cpus-per-task=8" in (tmp_path / "srun.txt").read_text()
