"""The loop: exact resume, checkpoints that are complete or absent, and errors before anything is lost."""

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ssmgen import build
from ssmgen.precision import Choice
from ssmgen.training import (
    CheckpointError,
    StepOrder,
    TrainSettings,
    checkpoints,
    derived_seed,
    load_checkpoint,
    loader_processes,
    loop,
    make_optimizer,
    moving_average,
    muon,
    on_cpu,
    pace,
    parameter_groups,
    save_checkpoint,
    schedule_changes,
    schedule_of,
    seconds_per_step,
    settle,
    train,
    verify_checkpoint,
)
from ssmgen.training.launch import make_accelerator
from ssmgen.training.log import RunLog
from ssmgen.training.memory import keep_freed_memory
from ssmgen.training.muon import orthogonalize

pytest.importorskip("accelerate", reason="training needs accelerate")


class Toy(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, key):
        index, draw = key
        g = torch.Generator().manual_seed(derived_seed(index, draw))
        return torch.randn(3, 4, 4, generator=g), torch.randint(0, 19, (4, 4), generator=g, dtype=torch.uint8)


def run(folder: Path, *, resume=None, record=None, on_step=None, data=None, **changes):
    torch.manual_seed(0)
    model = build("sisma-debug", dim=24, depth=1, mask_dropout=0.2)
    options = dict(steps=6, batch_size=4, lr=1e-3, warmup=2, ema_decay=0.9, checkpoint_every=3, log_every=1) | changes
    result = train(
        model,
        build("flow-matching"),
        Toy() if data is None else data,
        TrainSettings(**options),
        folder,
        record=record,
        resume=resume,
        on_step=on_step,
    )
    return model, result


def digests(checkpoint: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in checkpoint.glob("*.safetensors")}


def forget_accelerate():
    """So that the next training reads the environment, as the first one of a process does."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def environment_free():
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


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


def lrs(folder):
    return [json.loads(line)["lr"] for line in (folder / "log.jsonl").read_text().splitlines()]


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


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "accumulate=2 of the run decides"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "precision=no of the run decides"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "training does not compile the model"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.001", ""),
    ],
)
def test_the_environment_changes_no_weight(tmp_path, environment_free, monkeypatch, capsys, variable, value, said):
    """accelerate would scale the gradients, round or compile by it, and no record would tell."""
    for name in ("without", "with"):
        (tmp_path / name).mkdir()
        # Plain gradient descent in effect: Adam would hide a factor, clipping too.
        run(tmp_path / name, steps=2, accumulate=2, clip=0)
        monkeypatch.setenv(variable, value)
        forget_accelerate()
    assert (f"{variable}={value} has no effect: {said}" in capsys.readouterr().err) == bool(said)
    first, second = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("without", "with"))
    assert digests(first) == digests(second)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines()[-1] for name in ("without", "with")]
    assert len({json.loads(line)["grad_norm"] for line in logs}) == 1


@pytest.mark.parametrize("variable", ["USE_DEEPSPEED", "USE_FSDP", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG"])
def test_an_environment_that_would_shard_the_model_is_refused(folder, monkeypatch, variable):
    monkeypatch.setenv(f"ACCELERATE_{variable}", "true")
    with pytest.raises(ValueError, match=f"ACCELERATE_{variable}=true: .* is not supported, every process holds"):
        run(folder)
    assert not list(folder.iterdir())


def test_the_cpu_may_be_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not on_cpu()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert on_cpu()


def test_no_more_loader_processes_than_cores():
    assert loader_processes(0) == 0 and loader_processes(1) == 1
    assert 1 <= loader_processes(10_000) <= (os.cpu_count() or 1)


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


def test_moving_average_is_its_formula():
    model = torch.nn.Linear(2, 2)
    ema = moving_average(model, 0.5)
    expected = None
    for n in range(4):
        with torch.no_grad():
            model.weight.fill_(float(n))
        ema.update_parameters(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = float(n) if expected is None else decay * expected + (1 - decay) * n
    torch.testing.assert_close(ema.module.weight, torch.full((2, 2), expected))
    with pytest.raises(ValueError, match="ema_decay must be in"):
        moving_average(model, 1.0)
    with pytest.raises(ValueError, match="16-bit"):
        moving_average(torch.nn.Linear(2, 2).bfloat16(), 0.999)


def test_weight_decay_spares_vectors_and_state_matrices():
    model = build("sisma-debug")
    decayed, exempt = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and exempt["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {names[id(p)] for p in exempt["params"]}
    assert {n for n in names.values() if n.endswith(("A_log", "ssm.D", "bias"))} <= spared
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)
    assert "blocks.0.self_mamba.in_proj.weight" not in spared


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_muon_steps_the_blocks_matrices_and_adamw_the_rest(precision):
    first, second = (build("sisma-debug", dim=24, depth=1) for _ in range(2))
    second.load_state_dict(first.state_dict())
    ours = make_optimizer(first, "muon", lr=0.01, weight_decay=0.1, precision=precision)
    named, before = dict(second.named_parameters()), {n: p.detach().clone() for n, p in first.named_parameters()}
    matrices = [n for n, p in named.items() if n.startswith("blocks.") and p.dim() == 2 and not n.endswith("A_log")]
    assert "blocks.0.self_mamba.in_proj.weight" in matrices
    rest = [{**group, "params": [p for p in group["params"]]} for group in parameter_groups(second, 0.1)]
    rest[0]["params"] = [p for p in rest[0]["params"] if not any(p is named[n] for n in matrices)]
    theirs = [
        torch.optim.Muon([named[n] for n in matrices], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01 / 3, betas=(0.9, 0.95), fused=True),
    ]
    for _ in range(3):
        for name, parameter in first.named_parameters():
            parameter.grad = named[name].grad = torch.randn_like(parameter)
        for optimizer in (ours, *theirs):
            optimizer.step()
    for name, parameter in first.named_parameters():
        if name in matrices:  # theirs multiplies in bfloat16
            assert (parameter - named[name]).norm() < 0.03 * (named[name] - before[name]).norm(), name
            torch.testing.assert_close(ours.state[parameter], theirs[0].state[named[name]])
        else:
            assert torch.equal(parameter, named[name]), name
    loop.set_lr(ours, 0.3)
    assert [group["lr"] for group in ours.param_groups] == [0.3, *[pytest.approx(0.1)] * (len(ours.param_groups) - 1)]
    slots = {name: set(ours.state[p]) for name, p in first.named_parameters()}
    assert all((slots[name] == {"momentum_buffer"}) == (name in matrices) for name in slots)


def newton_schulz(x):
    """The iteration as it is written, in float64."""
    x = x.double() / x.double().norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize(("rows", "columns"), [(24, 96), (40, 40), (3, 50), (1, 7)])
@pytest.mark.parametrize("smallest", [1.0, 1e-4])
def test_muons_products_are_as_exact_as_the_run(rows, columns, smallest):
    u, _, v = torch.linalg.svd(torch.randn(3, rows, columns, dtype=torch.float64), full_matrices=False)
    x = (u * torch.logspace(0, math.log10(smallest), rows, dtype=torch.float64) @ v).float()
    exact = torch.stack([newton_schulz(each) for each in x])
    high, low = (orthogonalize(x, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert high.dtype == torch.float32 and low.dtype == torch.bfloat16
    errors = [((each - exact).norm() / exact.norm()).item() for each in (high, low)]
    assert errors[0] < 1e-3 and errors[0] < 0.1 * errors[1] and errors[1] < 0.5
    alone = torch.cat([orthogonalize(each.unsqueeze(0), torch.float32) for each in x])
    torch.testing.assert_close(alone, high, rtol=1e-3, atol=1e-4)
    assert not orthogonalize(torch.zeros(1, 2, 3), torch.float32).any(), "no gradient, no step"


def test_large_matrices_are_orthogonalised_a_few_at_a_time(monkeypatch):
    found = []
    for at_once in (muon._BATCH, 200, 1):
        torch.manual_seed(0)
        monkeypatch.setattr(muon, "_BATCH", at_once)
        matrices = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((8, 12), (12, 8), (8, 12), (3, 4))]
        for matrix in matrices:
            matrix.grad = torch.randn_like(matrix)
        group = {"params": matrices, "lr": 1.0, "weight_decay": 0.0, "momentum": 0.95}
        muon.muon_step(group, defaultdict(dict), torch.float32)
        found.append(matrices)
    for matrices in found[1:]:
        assert all(map(torch.allclose, matrices, found[0]))


def test_muon_repeats_to_the_bit_for_any_number_of_threads():
    x = torch.randn(3, 96, 384)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([orthogonalize(x, torch.float32), orthogonalize(x[:1], torch.bfloat16)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer must be one of adamw, muon, got 'adam'"):
        TrainSettings(steps=1, batch_size=1, optimizer="adam")


def test_learning_rate_schedule():
    constant = TrainSettings(steps=10, batch_size=1, lr=1.0, warmup=3)
    assert [round(constant.lr_at(i), 3) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = TrainSettings(steps=10, batch_size=1, lr=1.0, lr_decay_steps=10)
    assert cosine.lr_at(0) == 1 and abs(cosine.lr_at(5) - 0.5) < 1e-9 and cosine.lr_at(10) == 0 == cosine.lr_at(99)


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


def test_a_checkpoint_holds_everything_and_loads(folder):
    model, result = run(folder)
    path = checkpoints(folder / "checkpoints")[-1]
    other = build("sisma-debug", dim=24, depth=1, mask_dropout=0.2)
    average = moving_average(other, 0.9)
    optimizer = torch.optim.AdamW(parameter_groups(other, 0.0))
    state = load_checkpoint(path, model=other, ema=average, optimizer=optimizer)
    assert state["step"] == 6
    for a, b in ((model, other), (result.ema, average.module)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    slots = load_file(path / "optimizer.safetensors")
    name, parameter = next(iter(other.named_parameters()))
    assert torch.equal(optimizer.state[parameter]["exp_avg"], slots[f"{name}:exp_avg"])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_damage_is_found_and_named(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    path = save_checkpoint(folder, 1, model=model, ema=moving_average(model, 0.9), optimizer=optimizer, state={})
    verify_checkpoint(path)
    file = data.draw(st.sampled_from(sorted(p for p in path.iterdir() if p.name != "MANIFEST.json")))
    content = bytearray(file.read_bytes())
    kind = data.draw(st.sampled_from(["truncate", "flip", "remove"]))
    position = data.draw(st.integers(0, len(content) - 1))
    if kind == "remove":
        file.unlink()
    elif kind == "truncate":
        file.write_bytes(content[:position])
    else:
        content[position] ^= 1
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=file.name):
        verify_checkpoint(path)


def test_a_damaged_manifest_is_named(folder):
    run(folder)
    path = checkpoints(folder / "checkpoints")[-1]
    (path / "MANIFEST.json").write_text('{"model')
    with pytest.raises(CheckpointError, match=r"MANIFEST.json: is not valid JSON"):
        verify_checkpoint(path)


def test_auto_falls_back_to_the_checkpoint_before_a_damaged_one(folder, capsys):
    run(folder)
    newest = checkpoints(folder / "checkpoints")[-1]
    whole = digests(newest)
    (newest / "ema.safetensors").write_bytes(b"cut")
    run(folder, resume="auto")
    assert "ema.safetensors: has 3 bytes" in (message := capsys.readouterr().err) and "falling back" in message
    assert digests(checkpoints(folder / "checkpoints")[-1]) == whole


def test_a_named_checkpoint_that_is_damaged_stops_before_work(folder):
    run(folder)
    newest = checkpoints(folder / "checkpoints")[-1]
    log = (folder / "log.jsonl").read_text()
    (newest / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: missing"):
        run(folder, resume=newest, steps=9)
    assert (folder / "log.jsonl").read_text() == log


def test_resuming_behind_newer_checkpoints_is_refused(folder):
    run(folder)
    older = checkpoints(folder / "checkpoints")[0]
    with pytest.raises(CheckpointError, match="newer checkpoints .step-00000006."):
        run(folder, resume=older, steps=9)
    assert len(checkpoints(folder / "checkpoints")) == 2


def test_another_configuration_is_refused(folder):
    run(folder, record={"lr": 1e-3, "model": "a"})
    with pytest.raises(CheckpointError, match=r"another configuration \(lr: 0.001 there, 0.002 now\)"):
        run(folder, resume="auto", record={"lr": 2e-3, "model": "a"})


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    """Fail at each write, flush and rename of a save in turn: the checkpoint before it survives every time."""
    from ssmgen.training import checkpoint

    model = torch.nn.Linear(2, 2)
    parts = dict(model=model, ema=moving_average(model, 0.9), optimizer=torch.optim.AdamW(model.parameters()), state={})
    first = save_checkpoint(tmp_path, 1, **parts)
    boundaries = 0
    for failing in range(100):
        calls = []

        def guarded(original, calls=calls, failing=failing):
            def call(*args, **kwargs):
                calls.append(original)
                if len(calls) == failing + 1:
                    raise OSError(28, "No space left on device")
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, "fsync", guarded(os.fsync))
            patch.setattr(checkpoint.Path, "write_text", guarded(Path.write_text))
            patch.setattr(checkpoint.Path, "rename", guarded(Path.rename))
            try:
                save_checkpoint(tmp_path, 2, **parts)
            except OSError:
                boundaries += 1
            else:
                break
        complete = checkpoints(tmp_path)
        assert complete[0] == first and all(verify_checkpoint(path) for path in complete)
        assert not list(tmp_path.glob("*.tmp-*"))
        for path in complete[1:]:
            path.rename(tmp_path / "aside")
            __import__("shutil").rmtree(tmp_path / "aside")
    assert boundaries >= 8 and [p.name for p in checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


def test_old_checkpoints_are_pruned(folder):
    run(folder, steps=6, checkpoint_every=1, keep_checkpoints=2)
    assert [p.name for p in checkpoints(folder / "checkpoints")] == ["step-00000005", "step-00000006"]


class Poisoned(Toy):
    """Examples that are not numbers, from a given epoch on."""

    def __init__(self, first=0, last=10**6):
        self.range = range(first, last)

    def __getitem__(self, key):
        x, mask = super().__getitem__(key)
        return (x * float("nan") if key[1] in self.range else x), mask


def test_what_a_line_still_waits_for_goes_through_a_checkpoint(tmp_path):
    settings = dict(steps=9, batch_size=1, log_every=3, tracker="none", config={})
    with RunLog(tmp_path, 0, **settings) as log:
        for step, loss in enumerate((1.0, 2.0, 3.0, 5.0, math.nan), 1):
            log.step(step, loss, 1.0, 0.1)
        pending = json.loads(json.dumps(log.pending, allow_nan=False))
    assert pending == [5.0, None]
    with RunLog(tmp_path, 5, pending=pending, **settings) as log:
        log.step(6, 7.0, 1.0, 0.1)
        assert log.pending == []
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(3, 2.0), (6, None)]


def test_a_step_that_is_not_finite_changes_nothing(folder, capsys):
    model, result = run(folder, data=Poisoned(1, 2), steps=8, batch_size=5)
    assert all(torch.isfinite(p).all() for p in [*model.parameters(), *result.ema.parameters()])
    assert "step 2: loss nan" in capsys.readouterr().err


def test_skipped_steps_are_counted_over_the_whole_run(folder):
    assert run(folder, data=Poisoned(1, 2), steps=4, batch_size=5)[1].skipped == 2
    _, result = run(folder, resume="auto", steps=6, batch_size=5)
    assert (result.step, result.skipped) == (6, 2)
    assert run(folder, resume="auto", steps=6, batch_size=5)[1].skipped == 2


def test_a_run_whose_every_step_was_skipped_is_no_success(folder):
    for resume in (None, "auto"):  # step 3 has a checkpoint
        with pytest.raises(FloatingPointError, match="none of the 6 steps had a finite loss and gradient"):
            run(folder, data=Poisoned(), resume=resume)
    with pytest.raises(FloatingPointError, match="none of the 3 steps"):
        run(folder, data=Poisoned(), steps=3, resume="auto")


def test_a_compiled_model_is_trained_and_resumed_as_a_plain_one(tmp_path, monkeypatch):
    """Checkpoints hold the model's own names, so that either goes on with what the other began."""
    plain = tmp_path / "plain"
    run(plain)
    built = build
    monkeypatch.setattr(sys.modules[__name__], "build", lambda name, **sizes: maybe_compiled(built(name, **sizes)))
    with torch.compiler.set_stance("force_eager"):  # wrapped all the same, without the seconds of compiling
        run(tmp_path / "mixed", steps=3)
    monkeypatch.undo()
    assert digests(checkpoints(tmp_path / "mixed/checkpoints")[-1]) == digests(checkpoints(plain / "checkpoints")[0])
    run(tmp_path / "mixed", resume="auto")
    assert digests(checkpoints(tmp_path / "mixed/checkpoints")[-1]) == digests(checkpoints(plain / "checkpoints")[-1])


def maybe_compiled(built):
    return torch.compile(built, backend="eager") if isinstance(built, torch.nn.Module) else built


def test_training_gives_up_after_many_such_steps(folder):
    with pytest.raises(FloatingPointError, match="10 steps in a row were not finite"):
        run(folder, data=Poisoned(), steps=50)


def test_sigterm_saves_and_stops(tmp_path):
    """Sent to every process of the run, as a scheduler sends it, and a terminal Ctrl-C."""
    code = (
        "import sys, os, signal; from pathlib import Path; sys.path.insert(0, 'tests')\n"
        "import test_training as t\n"
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


def test_two_processes_train_as_one(tmp_path):
    """Under torchrun: one checkpoint, one precision, and a stop asked of one stops both at the same step."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, 'tests')\n"
        "import test_training as t\n"
        "stop = lambda step, ema: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None\n"
        "found = t.Choice(('bf16', 'no')[int(os.environ['RANK'])], 'each by itself')\n"
        "t.settle.choose_precision = lambda *_: found\n"
        "taken, step = set(), t.loop.training_step\n"
        "t.loop.training_step = lambda *args: (taken.add(args[6].precision), step(*args))[1]\n"
        "_, result = t.run(Path(sys.argv[1]), steps=1000, checkpoint_every=500, on_step=stop, precision='auto')\n"
        "said = f'{result.step} {result.interrupted} {taken}'\n"
        "(Path(sys.argv[1]).parent / ('rank' + os.environ['RANK'])).write_text(said)\n"
    )
    (tmp_path / "run").mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (tmp_path / f"rank{rank}" for rank in range(2))
    assert first.read_text() == second.read_text()
    step, interrupted, taken = first.read_text().split()
    newest = verify_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert interrupted == "True" and newest["step"] == int(step)
    assert taken == "{'bf16'}" and newest["record"]["precision"] == "bf16", "the first process decides"


BAD = {"steps": 0, "batch_size": 0, "lr": 0.0, "warmup": -1, "precision": "fp16", "lr_decay_steps": 3, "accumulate": 3}


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


def test_two_runs_of_one_process_may_differ_in_precision(tmp_path):
    last = {}
    for precision in ("bf16", "no"):
        (tmp_path / precision).mkdir()
        run(tmp_path / precision, precision=precision)
        last[precision] = json.loads((tmp_path / precision / "log.jsonl").read_text().splitlines()[-1])["loss"]
    assert last["bf16"] != last["no"] and abs(last["bf16"] - last["no"]) < 0.05 * last["no"]


@pytest.fixture
def found(monkeypatch):
    """Say what measuring finds."""

    def find(precision):
        monkeypatch.setattr(settle, "choose_precision", lambda asked, device: Choice(precision, "it was measured"))

    return find


def test_a_resumed_run_keeps_the_precision_it_began_with(tmp_path, found, capsys):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    run(tmp_path / "whole", precision="bf16", optimizer="muon")
    assert not capsys.readouterr().err
    found("bf16")
    run(tmp_path / "cut", steps=3, precision="auto", optimizer="muon")
    assert capsys.readouterr().err == "precision bf16: it was measured\n"
    found("no")
    run(tmp_path / "cut", resume="auto", precision="auto", optimizer="muon")
    assert capsys.readouterr().err == "precision bf16: as step-00000003 was made\n"
    whole, cut = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "cut"))
    assert digests(whole) == digests(cut) and verify_checkpoint(cut)["record"] == {"precision": "bf16"}
    with pytest.raises(CheckpointError, match="precision: 'bf16' there, 'no' now"):
        run(tmp_path / "cut", steps=9, resume="auto", precision="no", optimizer="muon")


def test_a_checkpoint_that_records_no_precision_is_resumed(tmp_path):
    loop._check_record(tmp_path, {"lr": 1}, {"lr": 1, "precision": "no"})
    with pytest.raises(CheckpointError, match="lr: 1 there, 2 now"):
        loop._check_record(tmp_path, {"lr": 1}, {"lr": 2, "precision": "no"})


def test_the_products_are_measured_as_the_run_rounds_them(folder, monkeypatch):
    rounding = []
    choice = Choice("no", "")
    monkeypatch.setattr(
        settle, "choose_precision", lambda *_: rounding.append(torch.get_float32_matmul_precision()) or choice
    )
    settings = TrainSettings(steps=1, batch_size=1, precision="auto", matmul_precision="medium")
    accelerator = make_accelerator(settings)
    assert settle.settle_precision(settings, folder, None, accelerator).precision == "no"
    assert rounding == ["medium"] and torch.get_float32_matmul_precision() == "highest"


FREED = """
import ctypes
from ssmgen.training.memory import keep_freed_memory

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_int) for name in names.split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallinfo.restype = Info

def kept():
    blocks = [libc.malloc(2**20) for _ in range(64)]
    for block in blocks:
        libc.free(block)
    return libc.mallinfo().fordblks  # free bytes that were not given back

kept()
before, done, after = kept(), keep_freed_memory(), kept()
print(done, before, after)
"""


def test_freed_memory_is_kept_for_the_next_step():
    if platform.libc_ver()[0] != "glibc":
        assert keep_freed_memory() is False, "another C library is left as it is"
        return
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    printed = subprocess.run([sys.executable, "-c", FREED], env=environment, capture_output=True, text=True, check=True)
    done, before, after = printed.stdout.split()
    assert done == "True" and int(before) < 32 * 2**20 and int(after) >= 60 * 2**20, printed.stdout


def test_training_on_a_cpu_keeps_freed_memory(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("ssmgen.training.loop.keep_freed_memory", lambda: calls.append(True))
    run(tmp_path, steps=1)
    assert calls == [True]


def test_measuring_a_step_takes_those_of_training_and_leaves_no_trace(folder, monkeypatch):
    torch.manual_seed(0)
    model, clock = build("sisma-debug", dim=24, depth=1, mask_dropout=0.2), [0.0]
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    options = TrainSettings(steps=6, batch_size=4, warmup=2, log_every=1)
    took, losses = [9.0, 3.0, 0.5, 0.4, 0.7, 0.4, 0.4, 0.4], []

    def slow_step(*args):
        losses.append(loop.training_step(*args)[0])
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
