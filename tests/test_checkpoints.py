"""Checkpoints are complete or absent, hold everything, and are verified before use."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from toy_training import digests, run

from ssmgen import build
from ssmgen.training import (
    CheckpointError,
    checkpoints,
    load_checkpoint,
    moving_average,
    parameter_groups,
    save_checkpoint,
    verify_checkpoint,
)
from ssmgen.training.resume import check_record

pytest.importorskip("accelerate", reason="training needs accelerate")


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


def test_a_checkpoint_that_records_no_precision_is_resumed(tmp_path):
    check_record(tmp_path, {"lr": 1}, {"lr": 1, "precision": "no"})
    with pytest.raises(CheckpointError, match="lr: 1 there, 2 now"):
        check_record(tmp_path, {"lr": 1}, {"lr": 2, "precision": "no"})


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
            shutil.rmtree(tmp_path / "aside")
    assert boundaries >= 8 and [p.name for p in checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


def test_old_checkpoints_are_pruned(folder):
    run(folder, steps=6, checkpoint_every=1, keep_checkpoints=2)
    assert [p.name for p in checkpoints(folder / "checkpoints")] == ["step-00000005", "step-00000006"]


def test_weights_and_optimizer_state_under_earlier_names_are_loaded(tmp_path):
    """A part of a model was renamed since: its ``renamed`` says so."""

    class Before(torch.nn.Module):
        def __init__(self, name="first"):
            super().__init__()
            self.add_module(name, torch.nn.Linear(2, 2))

    class Now(Before):
        renamed = {"first.": "second.part."}

        def __init__(self):
            super().__init__("other")
            self.second = torch.nn.ModuleDict({"part": torch.nn.Linear(2, 2)})
            del self.other

    old, new = Before(), Now()
    parts = [(model, moving_average(model, 0.9), torch.optim.AdamW(model.parameters())) for model in (old, new)]
    old.first(torch.ones(1, 2)).sum().backward()
    parts[0][2].step()
    path = save_checkpoint(tmp_path, 1, **dict(zip(("model", "ema", "optimizer"), parts[0], strict=True)), state={})
    load_checkpoint(path, **dict(zip(("model", "ema", "optimizer"), parts[1], strict=True)))
    torch.testing.assert_close(list(new.parameters()), list(old.parameters()), rtol=0, atol=0)
    states = [[optimizer.state[p]["exp_avg"] for p in model.parameters()] for model, _, optimizer in parts]
    torch.testing.assert_close(*states, rtol=0, atol=0)
