"""Several processes are one training, whole or sharded; activation checkpointing changes no gradient."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_training import Toy

pytest.importorskip("accelerate", reason="training needs accelerate")

from parallel_runs import difference

from ssmgen import build
from ssmgen.training import TrainSettings, checkpoints, train, verify_checkpoint
from ssmgen.weights import read_weights

ROOT = Path(__file__).parents[1]
STEP_10 = "checkpoints/step-00000010"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of trainings of 20 steps, in processes forked from one."""
    folder = tmp_path_factory.mktemp("parallel")
    sharded, muon = {"shard": True, "processes": 2}, {"optimizer": "muon", "accumulate": 2}
    poisoned = {"data": "poisoned", "steps": 8, "log_every": 4}
    wanted = {
        "one": {},
        "two": {"processes": 2},
        "four": {"processes": 4, "steps": 5},
        "sharded": sharded,
        "one-buckets": {"data": "buckets", "steps": 10},
        "two-buckets": {"data": "buckets", "steps": 10, "processes": 2},
        "two-muon": muon | {"processes": 2},
        "sharded-muon": muon | sharded | {"checkpoint_activations": True},
        **{f"late-{late}": sharded | muon | poisoned | {"late": late} for late in (True, False)},
        **{f"warned-{late}": {"processes": 2, "data": "warned", "late": late} for late in (True, False)},
        "resumed-whole": muon | {"resume": str(folder / "sharded-muon" / STEP_10)},
        "resumed-sharded": sharded | {"resume": str(folder / "one" / STEP_10)},
    }
    given = [{"run": str(folder / name), **options} for name, options in wanted.items()]
    done = subprocess.run(
        [sys.executable, "tests/parallel_runs.py", json.dumps(given)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "UserWarning" not in done.stderr
    return folder


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").open()]


def test_any_number_of_processes_has_the_same_losses(runs):
    one = losses(runs / "one")
    assert len(one) == 20 and len(losses(runs / "four")) == 5
    for name in ("two", "four", "sharded"):
        assert losses(runs / name) == pytest.approx(one[: len(losses(runs / name))], rel=1e-5), name
    assert max(difference(runs / "one", runs / "two")) < 1e-5


def test_processes_share_the_buckets_of_one(runs):
    assert losses(runs / "two-buckets") == pytest.approx(losses(runs / "one-buckets"), rel=1e-5)
    assert max(difference(runs / "one-buckets", runs / "two-buckets")) < 1e-5


@pytest.mark.parametrize("optimizer", ["", "-muon"])
def test_a_sharded_training_has_the_weights_of_a_whole_one(runs, optimizer):
    assert max(difference(runs / f"two{optimizer}", runs / f"sharded{optimizer}")) < 1e-5


def test_a_checkpoint_resumes_in_another_number_of_processes(runs):
    assert max(difference(runs / "sharded-muon", runs / "resumed-whole")) < 1e-5
    assert max(difference(runs / "one", runs / "resumed-sharded")) < 1e-5


def test_sharded_processes_that_read_late_leave_out_the_same_steps(runs):
    assert max(difference(runs / "late-True", runs / "late-False")) == 0
    for name in ("late-True", "late-False"):
        lines = [json.loads(line) for line in (runs / name / "log.jsonl").open()]
        assert [line["step"] for line in lines] == [3, 4, 4, 5, 8] and lines[-1]["skipped"] == 3, name
        assert verify_checkpoint(checkpoints(runs / name / "checkpoints")[-1])["averaged"] == 5


@pytest.mark.parametrize(("late", "last"), [(False, 3), (True, 4)])
def test_processes_agree_on_the_step_after_which_they_stop(runs, late, last):
    """One of two is asked before it launches the third step; where values are read late, the fourth follows."""
    (only,) = checkpoints(runs / f"warned-{late}" / "checkpoints")
    assert verify_checkpoint(only)["step"] == last == len(losses(runs / f"warned-{late}"))


def test_samples_and_result_of_a_sharded_training_come_from_the_whole_average(runs):
    for name in ("two", "sharded"):
        for step in (10, 20):
            averaged = read_weights(runs / name / f"checkpoints/step-{step:08d}/ema.safetensors")
            drawn = torch.load(runs / name / f"sheet-{step}.pt", weights_only=True)
            assert all(torch.equal(drawn[key], averaged[key]) for key in averaged) and len(drawn) == len(averaged)
        returned = torch.load(runs / name / "returned.pt", weights_only=True)
        assert all(torch.equal(returned[key], averaged[key]) for key in averaged)
        assert len(list((runs / name).glob("sheet-*"))) == 2


def gradients(name, keep, size, channels, precision=torch.float32, **arguments):
    """Gradients of a model with dropout in its first block, and the bytes kept for the backward pass."""
    torch.manual_seed(0)
    model = build(name, in_channels=channels, mask_dropout=0.3, **arguments)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.checkpoint_activations = not keep
    last = list(model.blocks[0].children())[-1]
    last.register_forward_hook(lambda module, given, out: torch.nn.functional.dropout(out, 0.5))
    data, stored = torch.randn(2, channels, size, size), {}

    def note(tensor):
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    mask = torch.randint(0, 19, (2, size * getattr(model, "mask_scale", 1), size * getattr(model, "mask_scale", 1)))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
        loss = build("flow-matching").loss(model, data, mask=mask)
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return found, sum(size for place, size in stored.items() if place not in own)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "size", "arguments"), [("sisma-debug", 16, {"depth": 3}), ("sdm-debug", 16, {})])
def test_activation_checkpointing_changes_no_bit_and_keeps_less(name, size, arguments, precision):
    kept, recomputed = (gradients(name, keep, size, 3, precision, **arguments) for keep in (True, False))
    assert len(kept[0]) == len(recomputed[0]) > 20
    assert all(map(torch.equal, kept[0], recomputed[0]))
    assert recomputed[1] < 0.6 * kept[1]


def test_what_cannot_be_sharded_or_checkpointed_is_refused(tmp_path):
    for name in ("shard", "checkpoint_activations"):
        settings = TrainSettings(steps=1, batch_size=2, **{name: True})
        with pytest.raises(ValueError, match=f"{name}=True works block by block, and Conv2d has no"):
            train(torch.nn.Conv2d(3, 3, 1), build("flow-matching"), Toy(), settings, tmp_path)
    compiled = torch.compile(build("sisma-debug", dim=24, depth=1))
    with pytest.raises(ValueError, match="shard=True needs the model itself"):
        train(compiled, build("flow-matching"), Toy(), TrainSettings(steps=1, batch_size=2, shard=True), tmp_path)
    assert not checkpoints(tmp_path / "checkpoints")
