"""One owner of a run folder."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("accelerate", reason="training needs ssmgen[train]")

import toy_training
from recipe_runs import words

from recipes.sisma import train
from ssmgen import cli
from ssmgen.signals import Stopped, stopping
from ssmgen.training import RunLockError, checkpoints, lock, run_lock

ROOT = Path(__file__).parents[1]


def holder(folder: Path, **changes: str) -> dict[str, str]:
    """Write a lock as another process would."""
    content = lock._this_process() | {"id": "another"} | changes
    (folder / "lock.json").write_text(json.dumps(content))
    return content


@pytest.fixture
def other(folder):
    """Another process of this machine that holds a folder's lock, as long as the test needs it."""
    code = (  # the module alone: torch would take seconds
        "import importlib.util, pathlib, sys, types\n"
        "sys.modules['ssmgen'] = package = types.ModuleType('ssmgen')\n"
        "package.__path__ = ['ssmgen']\n"
        "spec = importlib.util.spec_from_file_location('lock', 'ssmgen/training/lock.py')\n"
        "spec.loader.exec_module(lock := importlib.util.module_from_spec(spec))\n"
        "with lock.run_lock(pathlib.Path(sys.argv[1])):\n"
        "    print('owned', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "owned\n"
        yield process
        process.stdin.close()


def test_a_second_training_is_refused_and_the_first_one_s_end_frees_the_folder(folder, other):
    for _ in range(2):
        with pytest.raises(
            RunLockError, match=rf"belongs to process {other.pid} on .* is still running.*kill {other.pid}"
        ):
            toy_training.run(folder)
    assert [file.name for file in folder.iterdir()] == ["lock.json"]
    other.stdin.close()
    other.wait()
    assert not list(folder.iterdir())
    toy_training.run(folder, steps=1)
    assert {file.name for file in folder.iterdir()} == {"checkpoints", "log.jsonl"}


def test_the_command_is_refused_before_it_looks_at_the_run(tmp_path, folder, other):
    with pytest.raises(RunLockError, match="is still running"):
        train.main(words(tmp_path, "steps=2"))
    assert [file.name for file in folder.iterdir()] == ["lock.json"] and not (tmp_path / "cache").exists()


def test_the_lock_of_a_killed_process_is_taken_over_and_said(folder, other, capsys):
    other.send_signal(signal.SIGSTOP)
    with pytest.raises(RunLockError, match="is still running"):
        toy_training.run(folder)
    other.kill()
    deadline = time.monotonic() + 10
    while lock._start_of(other.pid):  # it stays as a zombie, which is no owner
        assert time.monotonic() < deadline
        time.sleep(0.01)
    toy_training.run(folder, steps=1)
    assert f"process {other.pid} on " in (said := capsys.readouterr().err)
    assert "has ended without removing lock.json; taking over" in said
    assert checkpoints(folder / "checkpoints") and not (folder / "lock.json").exists()


def test_the_id_of_a_process_alone_is_no_owner(folder, capsys):
    holder(folder, pid=str(os.getppid()), started="12")
    with run_lock(folder):
        assert "has ended without removing" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["", "{", "[]", "[" * 5000, '{"pid": 3}', "\x00\xff", None])
def test_a_lock_of_another_machine_or_a_damaged_one_counts_by_its_signs_of_life(folder, capsys, monkeypatch, damage):
    file = folder / "lock.json"
    content = holder(folder, host="far", machine="other boot", pid="7", since="a day")
    if damage is not None:
        file.write_bytes(damage.encode("latin-1"))
    owner = "process 7 on far, training in it since a day," if damage is None else "an unknown process"
    os.utime(file, (time.time() - 100, time.time() - 100))
    refusal = rf"belongs to {owner}.* has given a sign of life while this process waited"
    with pytest.raises(RunLockError, match=refusal), touched_soon(file, monkeypatch) as looks:
        toy_training.run(folder)
    assert looks == [lock._LOOK] * 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(rf"waiting up to (20[01]|19\d) s for a sign of life of {owner}", said)
    assert os.listdir(folder) == ["lock.json"] and (damage is not None or json.loads(file.read_text()) == content)
    os.utime(file, (time.time() - 301, time.time() - 301))
    with run_lock(folder):
        assert (said := capsys.readouterr().err).count("\n") == 1
        assert "has given no sign of life for 301 s; taking over" in said
    assert not list(folder.iterdir())


@contextmanager
def touched_soon(file: Path, monkeypatch):
    """The lock's owner touches it, after the third look for that."""
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        assert len(looks) < 10
        if len(looks) == 3:
            os.utime(file)

    with monkeypatch.context() as patch:
        patch.setattr(lock.time, "sleep", sleep)
        yield looks


def test_a_restart_waits_until_the_lock_of_another_machine_is_stale(folder, monkeypatch, capsys):
    monkeypatch.setattr(lock, "_SILENCE", 0.3)
    monkeypatch.setattr(lock, "_LOOK", 0.02)
    holder(folder, host="far", machine="other boot", pid="7")
    started = time.monotonic()
    toy_training.run(folder, steps=1)
    assert time.monotonic() - started > 0.2 and checkpoints(folder / "checkpoints")
    said = capsys.readouterr().err
    assert said.count("waiting up to") == said.count("taking over") == 1
    assert said.index("waiting up to 1 s for a sign of life of process 7 on far") < said.index("taking over")


def test_a_lock_that_is_released_meanwhile_ends_the_waiting(folder, monkeypatch):
    holder(folder, host="far", machine="other boot", pid="7")
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: (folder / "lock.json").unlink())
    with run_lock(folder):
        pass


def test_a_signal_ends_the_waiting(folder, capsys):
    content = holder(folder, host="far", machine="other boot")
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    started = time.monotonic()
    with pytest.raises(Stopped), stopping(), run_lock(folder):
        pass
    assert time.monotonic() - started < 1.5 and "waiting up to" in capsys.readouterr().err
    assert os.listdir(folder) == ["lock.json"] and json.loads((folder / "lock.json").read_text()) == content


def test_where_processes_cannot_be_asked_the_age_of_the_lock_decides(folder, monkeypatch):
    """On Windows, os.kill(pid, 0) would end the process."""
    holder(folder, pid=str(os.getpid()))
    with monkeypatch.context() as patch:
        patch.setattr(lock, "os", SimpleNamespace(**vars(os) | {"name": "nt", "kill": None}))
        with (
            pytest.raises(RunLockError, match="while this process waited"),
            touched_soon(folder / "lock.json", monkeypatch),
            run_lock(folder),
        ):
            pass


def test_of_many_that_take_over_at_once_one_wins(folder, monkeypatch):
    """Threads, each of which believes to be another process, and is slow at the last moment."""
    replace = os.replace
    monkeypatch.setattr(lock.os, "replace", lambda *files: (time.sleep(0.02), replace(*files)))
    for _ in range(5):
        holder(folder, pid="1", started="gone")
        barrier, won, refused = threading.Barrier(8), [], []

        def start(barrier=barrier, won=won, refused=refused):
            barrier.wait()
            try:
                won.append(lock.RunLock(folder))
            except RunLockError:
                refused.append(1)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(refused)) == (1, 7)
        won[0].check()
        won[0].release()
        assert not list(folder.iterdir())


def test_an_owner_that_was_taken_over_stops_before_it_saves(folder, monkeypatch):
    def suspended(step, model):
        if step == 2:
            holder(folder, host="far", pid="7")

    with pytest.raises(RunLockError, match="process 7 on far has taken over this run.*writes nothing more"):
        toy_training.run(folder, steps=6, checkpoint_every=3, on_step=suspended)
    assert not checkpoints(folder / "checkpoints")
    assert json.loads((folder / "lock.json").read_text())["host"] == "far", "the new owner keeps its lock"


def test_a_lock_deleted_by_hand_is_written_again(folder):
    with run_lock(folder) as mine:
        (folder / "lock.json").unlink()
        mine.check()
        assert json.loads((folder / "lock.json").read_text())["id"] == mine._owner["id"]


def test_the_owner_gives_signs_of_life(folder, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.02)
    with run_lock(folder):
        os.utime(folder / "lock.json", (1, 1))
        deadline = time.monotonic() + 10
        while (folder / "lock.json").stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_one_thread_may_nest_and_another_may_not(folder):
    found = []

    def elsewhere():
        with pytest.raises(RunLockError, match="another thread of this process"), run_lock(folder):
            pass
        found.append(True)

    with run_lock(folder), run_lock(folder / "." / "..") as parent, run_lock(folder) as inner:
        assert parent is not inner
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert found and not list(folder.iterdir())


def test_a_run_without_a_checkpoint_says_with_which_settings_it_begins_again(tmp_path, monkeypatch, capsys):
    common = words(tmp_path, "evaluate=false", "precision=no")
    nothing = "run: no run there yet, training begins at step 0\n"

    def killed(*_, **__):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", killed)
        for resume in ("resume=auto", "resume=no"):
            with pytest.raises(SystemExit):
                train.main([*common, "steps=2", resume])
    said = capsys.readouterr().err
    assert said.count(nothing) == 1 and said.index(nothing) < said.index("run: has no checkpoint")
    assert "run: has no checkpoint, so training begins at step 0 with the same settings\n" in said
    train.main([*common, "steps=3", "seed=4", "resume=auto"])
    assert "begins at step 0 with other settings (seed: 0 before, 4 now)\n" in capsys.readouterr().err
    assert len(checkpoints(tmp_path / "run/checkpoints")) == 1


def test_a_run_in_training_is_not_mended(folder, other, capsys):
    assert cli.main(["fsck", str(folder), "--mend"]) == 2
    assert f"belongs to process {other.pid}" in capsys.readouterr().err
