"""The loop: exact resume, schedules, skipped steps, requests to stop, and errors before anything is lost."""

import errno
import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy_training
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel
from toy_training import Toy, digests, run

from ssmgen import build
from ssmgen.training import (
    CheckpointError,
    StepOrder,
    TrainSettings,
    checkpoints,
    derived_seed,
    loop,
    moving_average,
    pace,
    schedule_changes,
    schedule_of,
    seconds_per_step,
    train,
    verify_checkpoint,
)
from ssmgen.training.health import Health
from ssmgen.training.log import RunLog
from ssmgen.training.step import _moved, batches_from, split
from ssmgen.training.trackers import TRACKERS

pytest.importorskip("accelerate", reason="training needs accelerate")


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2}, {"num_workers": 1}, {"lr_decay_steps": 20}, {"optimizer": "muon"}, {"log_every": 5}],
)
def test_resuming_is_exact_to_the_bit(tmp_path, options):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    run(tmp_path / "whole", steps=7, **options)
    run(tmp_path / "cut", steps=3, **options)
    run(tmp_path / "cut", steps=7, resume="auto", **options)
    whole, cut = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "cut"))
    assert whole.name == "step-00000007" and digests(whole) == digests(cut) and len(digests(whole)) == 3
    logs = [(tmp_path / n / "log.jsonl").read_text().splitlines() for n in ("whole", "cut")]
    whole, cut = ({line["step"]: line["loss"] for line in map(json.loads, lines)} for lines in logs)
    assert {step: loss for step, loss in cut.items() if step in whole} == whole


def as_written_before(checkpoint):
    """A checkpoint as it was when the average was saved with what it is wrapped in, and its count among the weights."""
    weights, state = load_file(checkpoint / "ema.safetensors"), json.loads((checkpoint / "state.json").read_text())
    count = torch.tensor(state.pop("averaged"))
    save_file(
        {f"module.{name}": x for name, x in weights.items()} | {"n_averaged": count}, checkpoint / "ema.safetensors"
    )
    (checkpoint / "state.json").write_text(json.dumps(state))
    files = [file for file in checkpoint.iterdir() if file.name != "MANIFEST.json"]
    manifest = {
        f.name: {"bytes": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in files
    }
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))


def test_a_checkpoint_of_the_first_format_is_resumed_to_the_bit(tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    run(tmp_path / "whole", steps=6)
    run(tmp_path / "cut", steps=3)
    as_written_before(checkpoints(tmp_path / "cut" / "checkpoints")[-1])
    run(tmp_path / "cut", steps=6, resume="auto")
    whole, cut = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "cut"))
    assert digests(whole) == digests(cut)
    assert json.loads((whole / "state.json").read_text())["averaged"] == 6


def test_the_digest_would_notice_a_difference(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        run(tmp_path / name, seed=seed)
    first, second = (digests(checkpoints(tmp_path / n / "checkpoints")[-1]) for n in "ab")
    assert all(first[name] != second[name] for name in first)


def test_loss_falls(folder):
    model, _ = run(folder, steps=60, lr=5e-3)
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def lrs(folder):
    return [json.loads(line)["lr"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_learning_rate_schedule():
    constant = TrainSettings(steps=10, batch_size=1, lr=1.0, warmup=3)
    assert [round(constant.lr_at(i), 3) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = TrainSettings(steps=10, batch_size=1, lr=1.0, lr_decay_steps=10)
    assert cosine.lr_at(0) == 1 and abs(cosine.lr_at(5) - 0.5) < 1e-9 and cosine.lr_at(10) == 0 == cosine.lr_at(99)
    whole = TrainSettings(steps=10, batch_size=1, lr=1.0, lr_decay_steps=None)
    assert [whole.lr_at(i) for i in range(10)] == [cosine.lr_at(i) for i in range(10)] and whole.decay_steps == 10


def test_a_finished_schedule_may_be_prolonged(folder, capsys):
    """The rate follows the new cosine, the state says when it changed, and from then on a resume is exact."""
    short, long = ({"lr_decay_steps": steps, "model": "m"} for steps in (4, 8))
    run(folder, steps=4, lr_decay_steps=4, record=short)
    assert "schedule changed" not in capsys.readouterr().err
    shutil.copytree(folder, folder.with_name("cut"))
    run(folder, steps=8, lr_decay_steps=8, record=long, resume="auto")
    said = "learning-rate schedule changed at step 4: lr_decay_steps=8, 4 until then\n"
    assert capsys.readouterr().err.count(said) == 1
    before, after = (TrainSettings(steps=n, batch_size=4, lr=1e-3, warmup=2, lr_decay_steps=n).lr_at for n in (4, 8))
    assert lrs(folder) == pytest.approx([*map(before, range(4)), *map(after, range(4, 8))]) and lrs(folder)[4] > 4e-4
    newest = checkpoints(folder / "checkpoints")[-1]
    state = verify_checkpoint(newest)
    assert state["schedule"] == [{"step": 0, "lr_decay_steps": 4}, {"step": 4, "lr_decay_steps": 8}]
    assert state["record"] == long | {"precision": "no"} and schedule_changes(schedule_of(state)) == [said.strip()]

    cut = folder.with_name("cut")
    run(cut, steps=6, lr_decay_steps=8, record=long, resume="auto")
    run(cut, steps=8, lr_decay_steps=8, record=long, resume="auto")
    assert capsys.readouterr().err.count(said) == 1, "said when it changes, and not again"
    again = checkpoints(cut / "checkpoints")[-1]
    assert digests(again) == digests(newest) and verify_checkpoint(again)["schedule"] == state["schedule"]


@pytest.mark.parametrize(("before", "after", "accepted"), [(4, 0, True), (0, 8, True), (9, 8, False)])
def test_a_cosine_may_end_or_begin_but_not_become_shorter(folder, before, after, accepted):
    run(folder, steps=4, lr_decay_steps=before, record={"lr_decay_steps": before})
    settings = dict(steps=8, lr_decay_steps=after, record={"lr_decay_steps": after}, resume="auto")
    if accepted:
        assert run(folder, **settings)[1].step == 8
        return
    with pytest.raises(CheckpointError, match="lr_decay_steps: 9 there, 8 now, which may only grow or become 0"):
        run(folder, **settings)


def test_a_checkpoint_without_a_schedule_has_that_of_its_record(folder):
    assert schedule_of({"record": {"lr_decay_steps": 7}}, 9) == [{"step": 0, "lr_decay_steps": 7}]
    assert schedule_of({}, 9) == [{"step": 0, "lr_decay_steps": 9}]


def test_a_warm_up_longer_than_the_training_is_said(folder, capsys):
    run(folder, steps=2, warmup=2)
    assert "warmup=2 is not over when steps=2 are done" in capsys.readouterr().err
    run(folder, steps=3, warmup=2, resume="auto")
    assert "warmup" not in capsys.readouterr().err


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 12), batch=st.integers(1, 7), first=st.integers(0, 9), world=st.integers(1, 3))
def test_order_is_a_function_of_seed_and_step(count, batch, first, world):
    whole = StepOrder(count, batch, seed=3)
    drawn = [pair for step in range(20) for pair in whole.batch(step)]
    for epoch in range(20 * batch // count):
        members = [index for index, draw in drawn if draw == epoch]
        assert sorted(members) == list(range(count))
    resumed = iter(StepOrder(count, batch, seed=3, first=first))
    assert next(resumed) == StepOrder(count, batch, seed=3).batch(first)
    ranks = [next(iter(StepOrder(count, batch, 3, first, rank, world))) for rank in range(world)]
    assert sorted(sum(ranks, [])) == sorted(whole.batch(first))


def test_an_undecided_number_of_steps_is_rejected_by_training(folder):
    with pytest.raises(ValueError, match="steps=0 leaves the number of steps undecided: set TrainSettings.steps"):
        run(folder, steps=0)
    assert not list(folder.iterdir())


class Pairs(Toy):
    """Examples as tuples."""

    def __getitem__(self, key):
        return tuple(super().__getitem__(key).values())


class Nameless(Toy):
    """Examples without data."""

    def __getitem__(self, key):
        return {"image": torch.zeros(3, 4, 4), "mask": torch.zeros(4, 4).long()}


@pytest.mark.parametrize(("data", "found"), [(Pairs(), "got list"), (Nameless(), "got the entries image, mask")])
def test_examples_that_are_no_mappings_with_data_are_explained(folder, data, found):
    with pytest.raises(TypeError, match=f"a mapping with 'data' and the model's conditions by name.*{found}"):
        run(folder, data=data)


def test_every_entry_of_a_batch_is_cut_into_parts():
    batch = {"data": torch.arange(6.0), "text": list("abcdef"), "weight": torch.ones(6, 1)}
    first, second = split(batch, 2)
    assert first["data"].tolist() == [0, 1, 2] and second["text"] == ["d", "e", "f"]
    assert first.keys() == batch.keys() and second["weight"].shape == (3, 1)


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_batches_for_a_gpu_are_copied_while_the_host_goes_on(device, pinned, monkeypatch):
    accelerator = SimpleNamespace(device=torch.device(device), process_index=0, num_processes=1)
    assert batches_from(0, Toy(), TrainSettings(steps=2, batch_size=4), accelerator).pin_memory == pinned
    copied, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *given, **more: copied.append(more) or to(x, *given, **more))
    batch = {"data": torch.ones(2), "text": {"tokens": torch.ones(2, 3)}, "names": ["a", "b"]}
    moved = {name: _moved(x, torch.device("cpu")) for name, x in batch.items()}
    assert copied == [{"non_blocking": True}] * 2 and moved["names"] == ["a", "b"]


def test_the_moving_average_reads_no_value_of_the_device():
    """Reading one from a GPU would wait for it. A tensor on ``meta`` has no value to read."""
    average, last = moving_average(torch.nn.Linear(3, 2), 0.5).to("meta"), torch.nn.Linear(3, 2, device="meta")
    for _ in range(3):
        average.update_parameters(last)
    assert int(average.n_averaged) == 3 and average.module.weight.is_meta


def test_the_moving_average_is_that_of_torch():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))  # whose buffers are copied

    def update(averaged, current, count):
        torch._foreach_lerp_(averaged, current, 1 - min(0.3, (1 + int(count)) / (10 + int(count))))

    ours, theirs = moving_average(net, 0.3), AveragedModel(net, multi_avg_fn=update)
    for _ in range(6):
        with torch.no_grad():
            net[0].weight.normal_()
            net(torch.randn(4, 3))
        ours.update_parameters(net)
        theirs.update_parameters(net)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in ours.state_dict().items())
    assert ours.module[1].num_batches_tracked == 6


def test_conditions_reach_the_model_by_their_names(folder):
    """Whatever they are called: the loop knows none of them."""

    class Told(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, t, style=None, mask=None):
            assert style.shape == (2, 5) and mask.shape == (2, 4, 4)
            return x * self.scale

    class Styled(Toy):
        def __getitem__(self, key):
            return super().__getitem__(key) | {"style": torch.ones(5), "weight": torch.full((1, 1, 1), 2.0)}

    settings = TrainSettings(steps=2, batch_size=4, accumulate=2)
    assert train(Told(), build("v"), Styled(), settings, folder).step == 2


class Poisoned(Toy):
    """Examples that are not numbers, from a given epoch on."""

    def __init__(self, first=0, last=10**6):
        self.range = range(first, last)

    def __getitem__(self, key):
        example = super().__getitem__(key)
        return example | {"data": example["data"] * math.nan} if key[1] in self.range else example


def test_what_a_line_still_waits_for_goes_through_a_checkpoint(tmp_path):
    settings = TrainSettings(steps=9, batch_size=1, log_every=3)
    with RunLog(tmp_path, 0, settings, {}) as log:
        for step, loss in enumerate((1.0, 2.0, 3.0, 5.0, math.nan), 1):
            log.step(step, loss, 1.0, 0.1, Health())
        pending = json.loads(json.dumps(log.pending, allow_nan=False))
    assert pending == [5.0, None]
    with RunLog(tmp_path, 5, settings, {}, pending) as log:
        log.step(6, 7.0, 1.0, 0.1, Health(skipped=1))
        assert log.pending == []
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(3, 2.0), (6, 6.0)], "a bad step does not void the mean"
    assert lines[1]["skipped"] == 1


def test_a_step_that_is_not_finite_changes_nothing(folder, capsys):
    model, result = run(folder, data=Poisoned(1, 2), steps=8, batch_size=5)
    assert all(torch.isfinite(p).all() for p in [*model.parameters(), *result.ema.parameters()])
    assert "step 3: loss nan, gradient norm nan: not finite, the step is skipped" in capsys.readouterr().err
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    bad = [line for line in lines if line.get("event") == "skipped"]
    assert [line["step"] for line in bad] == [3, 4], "as the log counts: the third step begins the second epoch"
    first, pairs = bad[0], StepOrder(10, 5, seed=0).batch(2)
    assert first["examples"] == [list(pair) for pair in pairs] and {draw for _, draw in pairs} == {1}
    assert first["seeds"] == [derived_seed(0, "step", 2, 0, 0)] and first["loss"] is None
    assert [line["skipped"] for line in lines if "event" not in line] == [0, 0, 1, 2, 2, 2, 2, 2]


def test_skipped_steps_are_counted_over_the_whole_run(folder):
    assert run(folder, data=Poisoned(1, 2), steps=4, batch_size=5)[1].skipped == 2
    _, result = run(folder, resume="auto", steps=6, batch_size=5)
    assert (result.step, result.skipped) == (6, 2)
    assert run(folder, resume="auto", steps=6, batch_size=5)[1].skipped == 2


def test_steps_skipped_in_a_row_are_counted_over_a_resumption(folder):
    run(folder, data=Poisoned(1), steps=8, batch_size=5)
    with pytest.raises(FloatingPointError, match="10 steps in a row were not finite, the last is step 12"):
        run(folder, data=Poisoned(1), steps=50, batch_size=5, resume="auto")


class Loud(Toy):
    """Examples a hundred times as large in one epoch."""

    def __getitem__(self, key):
        example = super().__getitem__(key)
        return example | {"data": example["data"] * 100} if key[1] == 24 else example


def test_spikes_of_the_loss_are_counted_and_named_as_if_the_run_was_never_cut(tmp_path, capsys):
    options = {"data": Loud(), "batch_size": 10, "checkpoint_every": 100}
    for name, parts in {"whole": (30,), "cut": (22, 26, 30)}.items():
        (tmp_path / name).mkdir()
        for steps in parts:
            result = run(tmp_path / name, resume="auto", steps=steps, **options)[1]
        assert (result.spikes, result.skipped) == (1, 0)
    assert capsys.readouterr().err.count(": a spike of the loss; log.jsonl names its examples") == 2
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("whole", "cut")
    ]
    events = [[line for line in log if line.get("event") == "spike"] for log in logs]
    assert events[0] == events[1] and events[0][0]["step"] == 25 and len(events[0][0]["examples"]) == 10
    assert [line["spikes"] for line in logs[1] if "event" not in line] == [0] * 24 + [1] * 6


def test_one_huge_spike_hides_no_later_one():
    health = Health()
    events = [health.count(loss, 1.0) for loss in [1.0] * 50 + [1e9, 1.0, 10.0]]
    assert events[50:] == ["spike", None, "spike"]


def test_a_loss_that_stays_high_is_a_spike_only_at_first():
    health = Health()
    events = [health.count(loss, 1.0) for loss in [1.0] * 50 + [5.0] * 200]
    assert events[:50] == [None] * 50 and events[50] == "spike" and events[-1] is None
    assert health.spikes == events.count("spike") < 100


def test_a_run_whose_every_step_was_skipped_is_no_success(folder):
    for resume in (None, "auto"):  # step 3 has a checkpoint
        with pytest.raises(FloatingPointError, match="none of the 6 steps had a finite loss and gradient"):
            run(folder, data=Poisoned(), resume=resume)
    with pytest.raises(FloatingPointError, match="none of the 3 steps"):
        run(folder, data=Poisoned(), steps=3, resume="auto")


def test_training_gives_up_after_many_such_steps(folder):
    with pytest.raises(FloatingPointError, match="10 steps in a row were not finite"):
        run(folder, data=Poisoned(), steps=50)


def test_a_compiled_model_is_trained_and_resumed_as_a_plain_one(tmp_path, monkeypatch):
    """Checkpoints hold the model's own names, so that either goes on with what the other began."""
    plain = tmp_path / "plain"
    run(plain)
    monkeypatch.setattr(toy_training, "build", lambda name, **sizes: maybe_compiled(build(name, **sizes)))
    with torch.compiler.set_stance("force_eager"):  # wrapped all the same, without the seconds of compiling
        run(tmp_path / "mixed", steps=3)
    monkeypatch.undo()
    assert digests(checkpoints(tmp_path / "mixed/checkpoints")[-1]) == digests(checkpoints(plain / "checkpoints")[0])
    run(tmp_path / "mixed", resume="auto")
    assert digests(checkpoints(tmp_path / "mixed/checkpoints")[-1]) == digests(checkpoints(plain / "checkpoints")[-1])


def test_a_training_that_compiles_is_the_same_and_checks_what_it_is_given(tmp_path, monkeypatch):
    calls, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **how: calls.append(how) or compile(model, backend="eager"))
    run(tmp_path / "plain")
    run(tmp_path / "compiled", steps=3, compile=True)
    assert calls == [{"fullgraph": True, "dynamic": False}]
    run(tmp_path / "compiled", resume="auto")
    assert digests(checkpoints(tmp_path / "compiled/checkpoints")[-1]) == digests(
        checkpoints(tmp_path / "plain/checkpoints")[-1]
    )

    class Wrong(Toy):
        def __getitem__(self, key):
            return super().__getitem__(key) | {"mask": torch.full((4, 4), 19, dtype=torch.uint8)}

    with pytest.raises(ValueError, match="mask: label 19 is outside 0..18"):
        run(tmp_path / "wrong", data=Wrong(), compile=True)
    with pytest.raises(ValueError, match="compile=True does not work with shard=True"):
        TrainSettings(steps=1, batch_size=2, compile=True, shard=True)


def maybe_compiled(built):
    return torch.compile(built, backend="eager") if isinstance(built, torch.nn.Module) else built


def test_sigterm_saves_and_stops(tmp_path):
    """Sent to every process of the run, as a scheduler sends it, and a terminal Ctrl-C."""
    code = (
        "import sys, os, signal; from pathlib import Path; sys.path.insert(0, 'tests')\n"
        "import toy_training as t\n"
        "stop = lambda step, ema: os.killpg(0, signal.SIGTERM) if step == 4 else None\n"
        "_, result = t.run(Path(sys.argv[1]), steps=1000, checkpoint_every=500, on_step=stop, num_workers=1)\n"
        "print(result.step, result.interrupted)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("stopping after this step") == 1, (
        "the loader process, which has inherited the handler, is silent"
    )
    step, interrupted = done.stdout.split()
    assert interrupted == "True" and int(step) <= 5
    assert verify_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])["step"] == int(step)


def test_a_dead_stderr_ends_no_training(tmp_path, monkeypatch):
    """As of a closed terminal, or a file on a full disk."""
    written = []

    class Dead(io.StringIO):
        def write(self, text):
            written.append(text)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stderr", Dead())
    monkeypatch.setattr("ssmgen.training.progress._PAUSE", 0.0)
    stop = lambda step, ema: signal.raise_signal(signal.SIGHUP) if step == 4 else None  # noqa: E731
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores, for the tests too
    try:
        _, result = run(tmp_path, steps=100, warmup=200, checkpoint_every=50, on_step=stop, data=Poisoned())
    finally:
        signal.signal(signal.SIGHUP, before)
    for said in ("the learning rate never reaches", "to go, ", "not finite", "SIGHUP: stopping after this step"):
        assert any(said in text for text in written), said
    assert (result.step, result.signal) == (5, signal.SIGHUP)
    assert verify_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])["step"] == 5


def test_samples_and_curves_that_cannot_be_written_end_no_training(folder, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "there")

    class Full:
        package, extra = "torch", "train"

        def __init__(self, *_):
            self.scalars = self.image = self.close = full

    monkeypatch.setitem(TRACKERS, "tensorboard", Full)
    draw = lambda step, ema: Path("picture.png") if step == 2 else full()  # noqa: E731
    _, result = run(folder, on_step=draw, tracker="tensorboard")
    assert result.step == 6 and checkpoints(folder / "checkpoints")[-1].name == "step-00000006"
    said = capsys.readouterr().err
    for step in (0, 1, 3, 6):
        assert f"No space left on device: 'there'\nthe samples of step {step} are missing; training goes on" in said
    assert "samples of step 2 " not in said and said.count("tracker=tensorboard: not everything could be written") == 1


BAD = {"steps": -1, "batch_size": 0, "lr": 0.0, "warmup": -1, "precision": "fp16", "lr_decay_steps": 3, "accumulate": 3}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_explained(name):
    with pytest.raises(ValueError, match=name):
        TrainSettings(**({"steps": 4, "batch_size": 4} | {name: BAD[name]}))


def test_an_empty_data_set_is_refused(folder):
    class Empty(Toy):
        def __len__(self):
            return 0

    with pytest.raises(ValueError, match="data set is empty"):
        run(folder, data=Empty())


def test_measuring_a_step_takes_those_of_training_and_leaves_no_trace(folder, monkeypatch):
    torch.manual_seed(0)
    model, clock = build("sisma-debug", dim=24, depth=1, mask_dropout=0.2), [0.0]
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    options = TrainSettings(steps=6, batch_size=4, warmup=2, log_every=1)
    took, losses = [9.0, 3.0, 0.5, 0.4, 0.7, 0.4, 0.4, 0.4], []

    def slow_step(*args):
        losses.append(loop.training_step(*args).loss)
        clock[0] += took[len(losses) - 1]

    monkeypatch.setattr(pace, "training_step", slow_step)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock[0])
    arguments = (model, build("flow-matching"), Toy(), options)
    assert seconds_per_step(*arguments, limit=5.0) == pytest.approx(3.0)  # the first step has used it up
    assert len(losses) == 2
    losses.clear()
    assert seconds_per_step(*arguments, limit=13.5) == pytest.approx(0.5)  # median of 0.5, 0.4, 0.7
    assert len(losses) == 5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and not list(folder.iterdir())
    train(*arguments, folder)
    logged = [json.loads(line)["loss"] for line in (folder / "log.jsonl").open()]
    assert logged[:5] == losses


@pytest.mark.parametrize("count", [1, 6])
def test_entries_of_another_length_than_the_data_are_refused(count):
    batch = {"data": torch.zeros(4, 3, 8, 8), "mask": torch.zeros(count, 8, 8)}
    with pytest.raises(ValueError, match=f"'mask' has {count} items and 'data' 4: a batch has one of each per example"):
        split(batch, 1)
