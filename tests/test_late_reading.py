"""Training that reads its values later than it launches its steps, as on a GPU: here on a CPU, by request."""

import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from test_training import Loud, Poisoned
from torch.utils._python_dispatch import TorchDispatchMode
from toy_training import Toy, digests, run

from ssmgen import build
from ssmgen.conditions.label_map import LabelMap
from ssmgen.training import TrainSettings, checkpoints, processes, results, seconds_per_step, step, verify_checkpoint
from ssmgen.training.health import Health
from ssmgen.training.launch import make_accelerator
from ssmgen.training.log import RunLog

pytest.importorskip("accelerate", reason="training needs accelerate")


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(step, "reads_late", lambda device: True)


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def saved(folder):
    states = [verify_checkpoint(path) | {"seconds": 0} for path in checkpoints(folder / "checkpoints")]
    return [digests(path) for path in checkpoints(folder / "checkpoints")], states


class Unlucky(Loud):
    """A spike in epoch 24, and no numbers in epochs 1, 26 and 27."""

    def __getitem__(self, key):
        example = super().__getitem__(key)
        return example | {"data": example["data"] * (math.nan if key[1] in (1, 26, 27) else 1.0)}


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon", "weight_decay": 0.1}, {"accumulate": 2}])
def test_reading_late_changes_no_bit_no_line_and_no_count(tmp_path, monkeypatch, capsys, options):
    options = {"batch_size": 10, "steps": 31, "log_every": 4, "checkpoint_every": 9, "keep_checkpoints": 9} | options
    said = []
    for name in ("at-once", "late"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(step, "reads_late", lambda device, late=name == "late": late)
        _, result = run(tmp_path / name, data=Unlucky(), **options)
        assert (result.step, result.skipped, result.spikes) == (31, 3, 1)
        said.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")])
    assert log_of(tmp_path / "late") == log_of(tmp_path / "at-once") and said[0] == said[1]
    assert saved(tmp_path / "late") == saved(tmp_path / "at-once") and len(saved(tmp_path / "late")[0]) == 4
    events = [line for line in log_of(tmp_path / "late") if "event" in line]
    assert [(line["step"], line["event"]) for line in events] == [
        *((2, "skipped"), (25, "spike"), (27, "skipped"), (28, "skipped"))
    ]
    assert [{draw for _, draw in line["examples"]} for line in events] == [{1}, {24}, {26}, {27}]


def test_a_first_step_that_is_skipped_leaves_the_weights_as_they_were(folder, late):
    model, result = run(folder, data=Poisoned(0, 1), steps=2, batch_size=10, checkpoint_every=1)
    assert result.skipped == 1 and all(torch.isfinite(p).all() for p in [*model.parameters(), *result.ema.parameters()])
    first, second = checkpoints(folder / "checkpoints")
    assert [verify_checkpoint(path)["averaged"] for path in (first, second)] == [0, 1]
    for each in map(digests, (first, second)):
        assert each["model.safetensors"] == each["ema.safetensors"]
    assert digests(first)["ema.safetensors"] != digests(second)["ema.safetensors"]


def test_a_late_run_resumes_to_the_bit(tmp_path, late):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    options = {"data": Poisoned(1, 2), "batch_size": 5, "log_every": 5, "optimizer": "muon"}
    run(tmp_path / "whole", steps=8, **options)
    run(tmp_path / "cut", steps=3, **options)
    run(tmp_path / "cut", steps=8, resume="auto", **options)
    whole, cut = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "cut"))
    assert digests(whole) == digests(cut) and len(digests(whole)) == 3


def test_ten_skipped_steps_end_a_late_training_at_the_same_step_and_save_nothing_more(folder, late):
    with pytest.raises(FloatingPointError, match="10 steps in a row were not finite, the last is step 12"):
        run(folder, data=Poisoned(1), steps=50, batch_size=5, checkpoint_every=2, keep_checkpoints=9, log_every=50)
    kept = checkpoints(folder / "checkpoints")
    assert [path.name[-2:] for path in kept] == ["02", "04", "06", "08", "10"]
    assert verify_checkpoint(kept[-1])["health"]["skipped_in_a_row"] == 8
    assert len({digests(path)["model.safetensors"] for path in kept}) == 1
    assert [line["step"] for line in log_of(folder)] == list(range(3, 13))


class At:
    """Called after one step."""

    def __init__(self, step, call):
        self.step, self.call = step, call

    def due(self, step):
        return step == self.step

    def __call__(self, step, model):
        self.call()


def test_a_request_ends_a_late_training_with_the_step_that_was_launched_with_it(folder, late):
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        stop = At(4, lambda: signal.raise_signal(signal.SIGUSR1))
        _, result = run(folder, steps=50, checkpoint_every=50, on_step=stop, log_every=50)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (result.step, result.signal, result.interrupted) == (5, signal.SIGUSR1, True)
    state = verify_checkpoint(checkpoints(folder / "checkpoints")[-1])
    assert state["step"] == 5 and len(state["pending"]) == 5


def found(loss=1.0, stop=0.0):
    return results.StepResult(torch.tensor([loss, 1.0, stop]))


def test_processes_read_the_same_steps_and_leave_none_when_one_asks_to_stop():
    unread = results.Unread(first=7, late=True)
    read = []
    for stop in (0, 0, 0, 0.5, 0.5):
        unread.add(found(stop=stop))
        read.append([number for number, _ in unread.read(everything=False)])
    assert read == [[8], [], [9], [10], [11, 12]], "the first at once, the others one step later"
    unread.add(found())
    assert [number for number, _ in unread.read(everything=True)] == [13]
    at_once = results.Unread(first=0, late=False)
    at_once.add(found())
    at_once.read(everything=False)
    at_once.add(found())
    assert [number for number, _ in at_once.read(everything=False)] == [2]


def test_on_a_gpu_values_are_copied_in_the_background_and_waited_for_when_they_are_read(monkeypatch):
    calls = []

    class Event:
        def __init__(self, **options):
            calls.append(options)

        def record(self, stream):
            calls.append(f"recorded on {stream}")

        def synchronize(self):
            calls.append("waited")

    def copied(device, **options):
        calls.append((device, options))
        return torch.tensor([2.0, math.nan, 0.5])

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    result = results.StepResult(SimpleNamespace(is_cuda=True, device="cuda:1", to=copied))
    assert calls == [("cpu", {"non_blocking": True}), {"blocking": True}, "recorded on the stream of cuda:1"]
    assert (result.loss, result.stop, result.finite) == (2.0, True, False) and calls[3:] == ["waited"]


def test_a_process_that_waits_for_a_value_of_a_gpu_is_not_taken_for_stalled():
    """It may wait for the other processes."""
    assert torch.cuda.Event.synchronize.__code__.co_filename.startswith(processes._WAITING)


def test_the_speed_in_the_log_is_of_when_values_were_known_and_not_of_when_they_were_reported(tmp_path, monkeypatch):
    """Before a checkpoint, two steps are reported at the same time."""
    monkeypatch.setattr("time.monotonic", lambda: 10.0)
    with RunLog(tmp_path, 0, TrainSettings(steps=2, batch_size=8, log_every=1), {}) as log:
        for step, known in ((1, 12.0), (2, 16.0)):
            log.step(step, 1.0, 1.0, 0.1, Health(), known)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["images_per_second"] for line in lines] == [4.0, 2.0]


def test_only_cuda_reads_late():
    assert [results.reads_late(torch.device(name)) for name in ("cuda:1", "cpu", "mps")] == [True, False, False]


@pytest.mark.parametrize(("rounding", "expected"), [("high", True), ("highest", False)])
def test_training_and_its_measurement_round_as_the_run_says(folder, monkeypatch, rounding, expected):
    before, module = torch.get_float32_matmul_precision(), build("sisma-debug", dim=24, depth=1)
    settings = TrainSettings(steps=1, batch_size=4, matmul_precision=rounding)
    try:
        for call in (
            lambda: seconds_per_step(module, build("flow-matching"), Toy(), settings, limit=0.0),
            lambda: run(folder, steps=1, matmul_precision=rounding),
        ):
            monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not expected)
            call()
            assert torch.backends.cudnn.allow_tf32 == expected and torch.get_float32_matmul_precision() == rounding
    finally:
        torch.set_float32_matmul_precision(before)


class NothingRead(TorchDispatchMode):
    """Fails where a host would wait for a value, or for the shape that depends on values."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.waiting, f"{name} reads a value"
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not by_mask, "indexing by a mask reads how many are True"
        return func(*args, **(kwargs or {}))


def take_three_steps(monkeypatch, **options):
    settings = TrainSettings(steps=9, batch_size=4, **options)
    accelerator = make_accelerator(settings)
    model = build("sisma-debug", dim=24, depth=1, mask_dropout=0.2, cross={"mask": "cross-mamba"})
    state, objective = step.prepare(model, settings, accelerator), build("flow-matching")
    batches, checked = iter(step.batches_from(0, Toy(), settings, accelerator)), []
    batches = [next(batches) for _ in range(3)]
    with monkeypatch.context() as patched, NothingRead():
        patched.setattr(LabelMap, "check", lambda self, mask: checked.append(mask.device.type))  # it reads on the host
        patched.setattr(torch.Tensor, "tolist", lambda x: pytest.fail("tolist reads values"))  # without a dispatch
        taken = [step.training_step(state, objective, batch, settings, n) for n, batch in enumerate(batches)]
    assert all(result.finite for result in taken) and int(state.ema.n_averaged) == 3
    return checked


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon", "weight_decay": 0.1}, {"accumulate": 2, "clip": 0}])
def test_nothing_in_a_step_reads_a_value(monkeypatch, late, options):
    assert take_three_steps(monkeypatch, **options) == ["cpu"] * 3 * options.get("accumulate", 1)


def test_a_step_that_is_read_at_once_would_be_noticed(monkeypatch):
    with pytest.raises((AssertionError, pytest.fail.Exception), match="read"):
        take_three_steps(monkeypatch)


class Mislabelled(Toy):
    """One label that no class has."""

    def __getitem__(self, key):
        example = super().__getitem__(key)
        example["mask"][1, 2] = 19
        return example


def test_labels_are_checked_before_they_are_copied(folder, late, monkeypatch):
    monkeypatch.setattr("ssmgen.training.step._moved", lambda x, device: pytest.fail("copied before it was checked"))
    with pytest.raises(ValueError, match=r"mask: label 19 is outside 0..18; .* \(row, column\) = \(1, 2\) of item 0"):
        run(folder, data=Mislabelled())


def test_values_are_checked_again_outside_of_a_step(late, folder):
    model, _ = run(folder, steps=1)
    x, t = torch.randn(1, 3, 4, 4), torch.zeros(1)
    mask = torch.full((1, 4, 4), 19)
    with pytest.raises(ValueError, match="label 19 is outside 0..18"):
        model(x, t, mask)
