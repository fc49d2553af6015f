"""Trackers get what the log gets, each step once, and none of them goes to the network by itself."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs ssmgen[train]")

from toy_training import digests, run

from ssmgen.data.images import write_png
from ssmgen.training import TrainSettings, checkpoints, progress, trackers
from ssmgen.training.health import Health
from ssmgen.training.log import RunLog

ROOT = Path(__file__).parents[1]


class Noted:
    """A tracker that keeps what it is given."""

    package, extra = "torch", "train"

    def __init__(self, run, first, last, config):
        self.first, self.last, self.config, self.seen, self.closed = first, last, config, [], False
        made.append(self)

    def scalars(self, step, values):
        self.seen.append((step, values))

    def image(self, step, name, file):
        self.seen.append((step, file.name))

    def close(self):
        self.closed = True


made: list[Noted] = []


@pytest.fixture
def noted(monkeypatch):
    made.clear()
    monkeypatch.setitem(trackers.TRACKERS, "noted", Noted)
    return made


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_new_tracker_is_a_class_and_a_line(noted, tmp_path):
    def grid(step, model):
        if step % 3:
            return None
        write_png(tmp_path / f"grid-{step}.png", torch.zeros(4, 4, dtype=torch.uint8))
        return tmp_path / f"grid-{step}.png"

    run(tmp_path, steps=6, tracker="noted", on_step=grid, record={"of": "mine"})
    (tracker,) = noted
    lines = [(line.pop("step"), line) for line in log_lines(tmp_path)]
    assert [seen for seen in tracker.seen if isinstance(seen[1], dict)] == lines and len(lines) == 6
    assert [seen for seen in tracker.seen if isinstance(seen[1], str)] == [(3, "grid-3.png"), (6, "grid-6.png")]
    assert (tracker.first, tracker.last, tracker.closed) == (0, 0, True)
    assert tracker.config["of"] == "mine" and tracker.config["lr"] == 1e-3
    assert set(lines[0][1]) == {"loss", "grad_norm", "lr", "images_per_second", "skipped", "spikes"}


def test_it_is_closed_when_training_fails_and_told_where_it_goes_on(noted, tmp_path):
    def fail(step, model):
        if step == 5:
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        run(tmp_path, steps=9, tracker="noted", on_step=fail)
    assert noted[0].closed
    run(tmp_path, steps=9, tracker="noted", resume="auto")
    assert (noted[1].first, noted[1].last) == (3, 5), "the checkpoint, and the last line of the log"
    assert [line["step"] for line in log_lines(tmp_path)] == list(range(1, 10))


@pytest.mark.parametrize("tracker", ["none", "tensorboard"])
def test_a_tracker_changes_no_bit(tmp_path, tracker):
    pytest.importorskip("tensorboard")
    run(tmp_path / "plain", steps=4)
    run(tmp_path / "tracked", steps=2, tracker=tracker)
    run(tmp_path / "tracked", steps=4, tracker=tracker, resume="auto")
    plain, tracked = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("plain", "tracked"))
    assert digests(plain) == digests(tracked)


@pytest.mark.parametrize("counter", [0, 9])
def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path, monkeypatch, counter):
    writers = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    monkeypatch.setattr(writers, "_global_uid", writers.AtomicCounter(counter))  # file 10 sorts before file 9
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    grid = tmp_path / "grid.png"
    write_png(grid, torch.full((6, 8), 3, dtype=torch.uint8))

    def show(step, model):
        if step == 5 and not grid.with_name("killed").exists():
            grid.with_name("killed").touch()
            raise KeyboardInterrupt
        return grid if step in (2, 4) else None

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", steps=8, tracker="tensorboard", on_step=show)
    run(tmp_path / "run", steps=8, tracker="tensorboard", on_step=show, resume="auto")
    seen = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    lines = log_lines(tmp_path / "run")
    for name in ("loss", "grad_norm", "lr", "images_per_second"):
        points = [(event.step, event.value) for event in seen.Scalars(name)]
        assert points == [(line["step"], pytest.approx(line[name])) for line in lines] and len(points) == 8
    assert [(event.step, event.width, event.height) for event in seen.Images("samples")] == [(2, 8, 6), (4, 8, 6)]


ALONE = """
import sys
from pathlib import Path
import torch
from ssmgen.data.images import write_png
from ssmgen.training import TrainSettings
from ssmgen.training.health import Health
from ssmgen.training.log import RunLog

run, tracker, refused = Path(sys.argv[1]), sys.argv[2], []

def refuse(event, given):
    asked = {"socket.connect": lambda: given[1], "socket.getaddrinfo": lambda: given[:1]}.get(event, lambda: None)()
    if isinstance(asked, tuple) and asked[0] not in ("127.0.0.1", "localhost", "::1", None):
        refused.append(asked)
        raise PermissionError(asked)

sys.addaudithook(refuse)
write_png(run.parent / "grid.png", torch.zeros(4, 4, dtype=torch.uint8))
settings = TrainSettings(steps=7, batch_size=2, log_every=1, tracker=tracker, lr=0.1)
for first, steps in ((0, 5), (3, 7)):
    with RunLog(run, first, settings, {}) as log:
        for step in range(first + 1, steps + 1):
            log.step(step, 1.0 / step, float("nan") if step == 2 else 0.5, 0.1, Health())
            log.samples(step, run.parent / "grid.png" if step == 4 else None)
assert not refused, refused
"""


def track_alone(tmp_path, tracker):
    """A run that is killed after step 5 and goes on after step 3, in a process whose sockets stay on this machine."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "TRACKIO"))}
    environment |= {"HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio"), "NETRC": str(tmp_path / "netrc")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "run"), tracker],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return environment


def test_trackio_keeps_each_step_once_on_this_machine(tmp_path):
    pytest.importorskip("trackio")
    environment = track_alone(tmp_path, "trackio")
    read = (
        "import json, trackio\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "(run,) = trackio.Api().runs('ssmgen')\n"
        "print(json.dumps([run.name, SQLiteStorage.get_logs('ssmgen', run.name)], default=str))\n"
    )
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    name, history = json.loads(done.stdout.splitlines()[-1])
    assert name == f"run-{(tmp_path / 'run' / 'tracker-id').read_text().strip()}"
    losses = [(line["step"], line["loss"]) for line in history if "loss" in line]
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 8)]
    assert [line["step"] for line in history if "samples" in line] == [4]


def test_wandb_stays_offline_and_keeps_each_step_once(tmp_path):
    pytest.importorskip("wandb")
    track_alone(tmp_path, "wandb")
    wandb = tmp_path / "run" / "wandb"
    assert not list(wandb.glob("run-*")), "a run that was meant for the network"
    files = sorted(wandb.glob("offline-run-*/*.wandb"))
    assert {file.stem for file in files} == {f"run-{(tmp_path / 'run' / 'tracker-id').read_text().strip()}"}
    rows = [row for file in files for row in wandb_history(file)]
    losses = [(int(row["_step"]), float(row["loss"])) for row in rows]
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 8)]
    assert [int(row["_step"]) for row in rows if "samples" in row] == [4] and "grad_norm" not in rows[1]


def wandb_history(file):
    """The rows of an offline run: records in the layout of LevelDB's log, each a protocol buffer."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            items = Record.FromString(record).history.item
            record = b""
            if items:
                yield {item.key or item.nested_key[0]: item.value_json for item in items}


@pytest.mark.parametrize(
    ("tracker", "error", "message"),
    [
        ("tensorbord", ValueError, "unknown tracker 'tensorbord'. Did you mean 'tensorboard'"),
        (
            "absent",
            ImportError,
            r"tracker=absent: this needs not_there, .*'ssmgen\[trackers\]', or use tracker=none",
        ),
    ],
)
def test_a_tracker_that_cannot_be_is_told_before_training(tracker, error, message, monkeypatch):
    absent = type("Absent", (Noted,), {"package": "not_there", "extra": "trackers"})
    monkeypatch.setitem(trackers.TRACKERS, "absent", absent)
    with pytest.raises(error, match=message):
        TrainSettings(steps=1, batch_size=1, tracker=tracker)


def test_what_is_not_finite_is_null_in_the_log_and_not_tracked(noted, tmp_path):
    with RunLog(tmp_path, 0, TrainSettings(steps=2, batch_size=1, log_every=1, tracker="noted"), {}) as log:
        log.step(1, float("nan"), float("inf"), 0.1, Health())
    assert log_lines(tmp_path)[0]["loss"] is None and log_lines(tmp_path)[0]["grad_norm"] is None
    assert set(noted[0].seen[0][1]) == {"lr", "images_per_second", "skipped", "spikes"}


def test_a_bar_in_a_pipe_is_whole_lines_now_and_then(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.progress_bar(100, "step", initial=10) as bar:
        for _ in range(90):
            clock[0] += 1
            bar.set_postfix(loss="0.5")
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 90 // 20 + 1 and not any("\r" in line for line in lines)
    assert lines[0] == "30/100 (30 %), 00:20 gone, 01:10 to go,  1.00step/s, loss 0.5"
    assert lines[-1].startswith("100/100 (100 %), 01:30 gone")


def test_what_is_done_at_once_or_quietly_has_no_line(capsys, monkeypatch):
    with progress.progress_bar(2, "img", what="features") as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    for quiet in (True, False):
        with progress.progress_bar(2, "img", what="features", quiet=quiet) as bar:
            clock[0] += 30
            bar.update(2)
    assert [line[:13] for line in capsys.readouterr().err.splitlines()] == ["features: 2/2"] * 2


def test_a_bar_on_a_terminal_is_tqdms(monkeypatch):
    from tqdm import std

    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with progress.progress_bar(3, "step") as bar:
        assert isinstance(bar, std.tqdm)


def test_a_bar_in_a_notebook_is_a_widget(monkeypatch):
    from tqdm import auto

    class Widget:
        def __init__(self, **settings):
            self.settings = settings

    monkeypatch.setattr(auto, "notebook_tqdm", Widget)
    monkeypatch.setattr(auto, "tqdm", Widget)
    assert progress.progress_bar(3, "step").settings["total"] == 3
