"""Requests to stop: what they leave behind, and the exit status."""

import errno
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")

import toy_training

from recipes.sisma import evaluate, export, pairs, prepare, sample, train
from recipes.sisma.arguments import run_command
from recipes.sisma.startup import end_on_signals
from ssmgen import signals
from ssmgen.data import DrawnFaces, images
from ssmgen.data.images import write_png
from ssmgen.signals import STOPPING, Stopped, stop_requests, stopping
from ssmgen.training import checkpoints, saver, verify_checkpoint
from ssmgen.training.processes import kill_workers

ROOT = Path(__file__).parents[1]


def status(main, *words: str) -> int:
    """The exit status of a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *words])
        patch.setattr("warnings.formatwarning", None)
        with pytest.raises(SystemExit) as ended:
            run_command(main)
    return ended.value.code


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if ".tmp-" in path.name or path.name == "lock.json"]


def sending(number, function, *, call=1):
    """The function, which sends this process a signal at its ``call``-th call."""
    calls = []

    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return function(*arguments, **options)

    return wrapped


@pytest.fixture(autouse=True)
def none_ignored():
    """As in a terminal: under nohup, SIGHUP is ignored, and in the background of a script, SIGINT."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number in STOPPING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING)
def test_every_signal_has_its_status_and_one_sentence(number, capsys):
    before = [signal.getsignal(each) for each in STOPPING]
    assert status(lambda argv: signal.raise_signal(number)) == 128 + number
    assert capsys.readouterr().err == f"stopped by {signal.Signals(number).name}; no half-written file is left\n"
    assert [signal.getsignal(each) for each in STOPPING] == before


@pytest.mark.parametrize("handled", [stopping, stop_requests, end_on_signals])
def test_an_ignored_signal_stays_ignored(handled):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with handled() or nullcontext() as requests:
        signal.raise_signal(signal.SIGHUP)
        assert not requests and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_command_has_its_status_without_a_terminal(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def failing(argv):
        raise ValueError("wrong")

    monkeypatch.setattr(sys, "stderr", Closed())
    assert status(lambda argv: signal.raise_signal(signal.SIGHUP)) == 129
    assert status(failing) == 2


@pytest.mark.parametrize("told", [True, False])
def test_a_request_that_another_error_replaces_has_its_status(capsys, told):
    """Python 3.11 wraps what is raised while a class is defined; libraries raise errors of their own."""

    def wrapped(argv):
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise RuntimeError("Error calling __set_name__ on an attribute") from error if told else None

    assert status(wrapped) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM; no half-written file is left\n"


def test_a_request_that_a_destructor_swallows_is_repeated(capfd):
    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with stopping(), pytest.raises(Stopped, match="stopped by SIGTERM"):
        Dying()
        time.sleep(5)
    assert capfd.readouterr().err == ""


def test_a_repeated_request_does_not_interrupt_cleaning_up():
    cleaned = []
    with stopping(), pytest.raises(Stopped, match="SIGINT"):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)
    assert cleaned


def test_a_second_request_ends_a_training_at_once_unless_a_launcher_repeats_the_first(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    with stop_requests() as stop:
        assert not stop
        signal.raise_signal(signal.SIGUSR1)
        assert stop and stop.number == signal.SIGUSR1
        clock[0] += 0.5
        signal.raise_signal(signal.SIGTERM)
        clock[0] += 1
        with pytest.raises(Stopped, match="SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGUSR1
    assert capsys.readouterr().err == "SIGUSR1: stopping after this step; a checkpoint will be written\n"


def test_a_forked_process_ignores_requests():
    def child(requests):
        for number in STOPPING:
            signal.raise_signal(number)
        os._exit(1 if requests else 7)

    for handled in (stopping, stop_requests):
        with handled() as requests:
            process = multiprocessing.get_context("fork").Process(target=child, args=(requests,))
            process.start()
            process.join(20)
        assert process.exitcode == 7


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_request_while_samples_are_drawn_abandons_them_and_saves(tmp_path, number):
    drawn = []

    def draw(step, model):
        drawn.append(step)
        if step == 4:
            signal.raise_signal(number)
            raise AssertionError("drawing went on")

    _, result = toy_training.run(tmp_path, steps=100, checkpoint_every=50, on_step=draw)
    assert (result.interrupted, result.signal, result.step) == (True, number, 5) and drawn[-1] == 4
    assert verify_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])["step"] == 5


def test_a_request_during_a_save_lets_it_finish(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "write_checkpoint", sending(signal.SIGTERM, saver.write_checkpoint))
    _, result = toy_training.run(tmp_path, steps=6, checkpoint_every=6)
    assert (result.interrupted, result.signal, result.step) == (True, signal.SIGTERM, 6)
    assert verify_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])["step"] == 6


def test_a_command_does_not_wait_for_stalled_loader_processes(capsys):
    class Stalled(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            if index:
                os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(600)
            return torch.zeros(1)

    def main(argv):
        loader = torch.utils.data.DataLoader(Stalled(), 1, num_workers=1, worker_init_fn=signals.ignore_stop_requests)
        for _ in loader:
            pass

    started = time.monotonic()
    assert status(main) == 143 and time.monotonic() - started < 20
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("where", ["the main thread", "another thread", "Windows"])
def test_loader_processes_are_killed_in_every_thread_and_system(monkeypatch, where):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    worker.start()
    handler = signal.getsignal(signal.SIGCHLD)
    with monkeypatch.context() as patch:
        if where == "Windows":
            patch.delattr(signal, "SIGCHLD")
        if where == "another thread":
            with ThreadPoolExecutor() as pool:
                pool.submit(kill_workers, [worker]).result()
        else:
            kill_workers([worker])
    assert worker.exitcode == -signal.SIGKILL and signal.getsignal(signal.SIGCHLD) == handler


def test_encoding_that_is_stopped_leaves_nothing(tmp_path, monkeypatch, capsys):
    words = [f"run={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}", "image_size=64", "drawn_count=40", "steps=2"]
    monkeypatch.setattr(DrawnFaces, "__getitem__", sending(signal.SIGUSR1, DrawnFaces.__getitem__, call=20))
    monkeypatch.setattr(pairs, "loader_processes", lambda wanted: 0)
    assert status(train.main, *words, "model_args.dim=64", "model_args.depth=1") == 138
    assert not list((tmp_path / "cache").iterdir()) and not leftovers(tmp_path)
    assert "stopped by SIGUSR1; no half-written file is left\n" in capsys.readouterr().err


def test_preparing_that_is_stopped_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("recipes.sisma.prepare.command.write_records", sending(signal.SIGTERM, None))
    assert status(prepare.main, "source=drawn", f"target={tmp_path / 'out'}", "count=3", "size=32") == 143
    assert capsys.readouterr().err == "stopped by SIGTERM; nothing was written\n" and not list(tmp_path.iterdir())


def test_sampling_evaluating_and_exporting_leave_whole_files_only(trained, tmp_path, monkeypatch, capsys):
    write_png(tmp_path / "face.png", DrawnFaces(1, size=64)[0][1])
    monkeypatch.setattr(images, "to_pil", sending(signal.SIGTERM, images.to_pil, call=3))
    words = [f"run={trained}", f"mask={tmp_path / 'face.png'}", f"out={tmp_path / 'out'}", "num_images=4"]
    assert status(sample.main, *words) == 143
    assert len(list((tmp_path / "out").iterdir())) == 2 and not leftovers(tmp_path)

    (trained / "evaluation").rename(tmp_path / "evaluation")
    monkeypatch.setattr("recipes.sisma.evaluation.trained_run.write_png", sending(signal.SIGINT, write_png, call=2))
    assert status(evaluate.main, f"run={trained}", "masks=4") == 130
    assert len(list((trained / "evaluation").rglob("*.png"))) == 1 and not leftovers(trained)

    monkeypatch.setattr("ssmgen.pipeline.folder.write_weights", sending(signal.SIGUSR1, None))
    assert status(export.main, f"run={trained}", f"out={tmp_path / 'exports/one'}") == 138
    assert not list((tmp_path / "exports").iterdir())
    assert capsys.readouterr().err.count("no half-written file is left") == 3


@pytest.mark.parametrize("command, number", [("train", signal.SIGINT), ("prepare", signal.SIGHUP)])
def test_a_signal_while_a_command_starts_has_its_status(tmp_path, command, number):
    (tmp_path / "torch.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\nraise SystemExit(9)\n")
    (tmp_path / "PIL.py").write_text((tmp_path / "torch.py").read_text())
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    words = [sys.executable, "-m", f"recipes.sisma.{command}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 128 + number
    assert done.stderr == f"stopped by {number.name}; no half-written file is left\n"
