"""Checkpoints are complete or absent, hold everything, and are verified before use."""

import errno
import io
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_training import digests, run

from ssmgen import atomic, build
from ssmgen.training import (
    CheckpointError,
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    moving_average,
    newest_checkpoint,
    parameter_groups,
    save_checkpoint,
    verify_checkpoint,
)
from ssmgen.training.fsck import check_run, mend_run
from ssmgen.training.resume import check_record, present, set_aside

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


def test_auto_falls_back_to_the_checkpoint_before_a_damaged_one(folder, capsys):
    run(folder)
    newest = checkpoints(folder / "checkpoints")[-1]
    whole = digests(newest)
    (newest / "ema.safetensors").write_bytes(b"cut")
    run(folder, resume="auto")
    message = capsys.readouterr().err
    assert "ema.safetensors: has 3 bytes" in message
    assert "falling back to step-00000003, the newest intact checkpoint" in message
    assert "step-00000006: set aside as damaged-step-00000006\n" in message
    assert digests(checkpoints(folder / "checkpoints")[-1]) == whole
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["damaged-step-00000006", "step-00000003", "step-00000006"]


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lose_manifest(path):
    (path / "MANIFEST.json").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lose_manifest, "step-00000006: .*MANIFEST.json: missing"),
        (lambda path: shutil.rmtree(path) or path.touch(), "step-00000006: .*MANIFEST.json: cannot be read"),
        (lambda path: path.rename(path.with_name("step-6")), "step-6: is not named step- and eight digits"),
        (lambda path: path.rename(path.with_name("step-000000006")), "step-000000006: is not named"),
        (lambda path: path.rename(path.with_name(path.name + "-copy")), "step-00000006-copy: is not named"),
        (lambda path: path.rename(path.with_name("damaged-" + path.name)), "damaged-step-00000006: was set aside"),
    ],
    ids=["no manifest", "a file", "few digits", "many digits", "a copy", "set aside"],
)
def test_a_run_with_checkpoints_never_begins_anew_by_itself(folder, damage, said):
    run(folder, keep_checkpoints=1)
    damage(checkpoints(folder / "checkpoints")[-1])
    before = everything(folder)
    with pytest.raises(CheckpointError, match=rf"none of its checkpoints can be used(?s:.)*{said}(?s:.)*ssmgen fsck"):
        run(folder, resume="auto")
    assert everything(folder) == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOENT])
def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(folder, monkeypatch, number):
    """Then training would begin at step 0 and write over the log."""
    run(folder)
    before = everything(folder)
    if number == errno.ENOENT:  # the folder lies on a disk that is not mounted
        (folder / "checkpoints").rename(folder / "elsewhere")
        (folder / "checkpoints").symlink_to("nowhere")
        before = everything(folder)

    def scandir(path, scandir=os.scandir):
        if str(path) == str(folder / "checkpoints") and number != errno.ENOENT:
            raise OSError(number, os.strerror(number), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for action in (
        lambda: run(folder, resume="auto"),
        lambda: find_checkpoint(folder, "auto", {}),
        lambda: checkpoints(folder / "checkpoints"),
        lambda: present(folder / "checkpoints"),
        lambda: newest_checkpoint(folder),
        lambda: check_run(folder),
        lambda: mend_run(folder),
    ):
        with pytest.raises(OSError, match=rf"{folder}/checkpoints") as raised:
            action()
        assert raised.value.errno == number and not isinstance(raised.value, FileNotFoundError)
    monkeypatch.undo()
    assert everything(folder) == before
    assert find_checkpoint(folder / "new", "auto", {}) is None


def test_an_intact_checkpoint_that_makes_way_for_a_damaged_one_is_resumed(folder, capsys):
    run(folder)
    newest = checkpoints(folder / "checkpoints")[-1]
    replaced = Path(shutil.copytree(newest, f"{newest}.replaced"))
    (newest / "state.json").write_text("{}")
    assert find_checkpoint(folder, "auto", {"precision": "no"}) == replaced
    assert "falling back to step-00000006.replaced" in capsys.readouterr().err
    assert newest_checkpoint(folder) == replaced
    assert run(folder, steps=7, resume="auto")[1].step == 7


def test_a_dead_stderr_does_not_keep_a_run_from_falling_back(folder, monkeypatch):
    run(folder)
    older, newest = checkpoints(folder / "checkpoints")
    (newest / "ema.safetensors").unlink()
    closed = io.StringIO()
    closed.close()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", closed)
        assert find_checkpoint(folder, "auto", {"precision": "no"}) == older
    assert not newest.exists()


def test_every_checkpoint_that_cannot_be_used_is_named_with_its_reason(folder):
    run(folder)
    for path, name in zip(checkpoints(folder / "checkpoints"), ("MANIFEST.json", "state.json"), strict=True):
        (path / name).write_text("{}")
    with pytest.raises(CheckpointError) as raised:
        find_checkpoint(folder, "auto", {})
    said = str(raised.value)
    assert f"step-00000006: {folder}/checkpoints/step-00000006/state.json: has 2 bytes" in said
    assert f"step-00000003: {folder}/checkpoints/step-00000003/MANIFEST.json: does not list" in said
    assert f"ssmgen fsck {folder} --mend" in said and "another run folder" in said


def test_a_folder_under_another_name_does_not_disturb_an_intact_one(folder):
    run(folder)
    newest = checkpoints(folder / "checkpoints")[-1]
    for name in ("step-7", "step-00000009-copy", "step-00000009.tmp-1"):
        shutil.copytree(newest, newest.with_name(name))
    assert find_checkpoint(folder, "auto", {"precision": "no"}) == newest


def test_what_another_run_wrote_is_not_set_aside(folder):
    """The configuration is checked first: a slip on the command line changes nothing."""
    run(folder, record={"lr": 1})
    (checkpoints(folder / "checkpoints")[-1] / "state.json").write_text("{}")
    before = everything(folder)
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        run(folder, resume="auto", record={"lr": 2})
    assert everything(folder) == before


def test_a_second_damaged_checkpoint_of_a_step_gets_another_name(tmp_path):
    for name in ("damaged-step-00000001", "damaged-step-00000001-2"):
        path = tmp_path / "step-00000001"
        path.mkdir()
        assert set_aside(path).name == name


def test_a_log_without_a_checkpoint_is_kept(folder, capsys):
    """The run was killed before its first checkpoint."""
    run(folder, steps=2)
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints/step-00000003.tmp-999999999").mkdir(parents=True)
    log = (folder / "log.jsonl").read_text()
    capsys.readouterr()
    for name in ("log.jsonl.before", "log.jsonl.before-2"):
        run(folder, steps=2, resume="auto")
        said = (
            f"{folder}: has a log but no checkpoint, so training begins at step 0; the earlier log is kept as {name}\n"
        )
        assert said in capsys.readouterr().err
        shutil.rmtree(folder / "checkpoints")
    assert (folder / "log.jsonl.before").read_text() == log
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2


def test_a_folder_of_another_run_is_not_trained_into(folder):
    """The older checkpoints, of later steps, would stay in the place of the new ones."""
    run(folder, steps=4)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    other = folder.with_name("other")
    run(other, steps=2)
    for resume in (None, other / "checkpoints" / "step-00000002"):
        with pytest.raises(FileExistsError, match="holds checkpoints of an earlier training.*resume='auto'"):
            run(folder, steps=2, resume=resume)
    assert {p: p.stat().st_mtime_ns for p in before if p.name != "lock.json"} == {
        path: when for path, when in before.items() if path.name != "lock.json"
    }


def test_a_complete_run_that_was_killed_while_pruning_is_cleared(folder):
    run(folder, steps=4)
    left = folder / "checkpoints" / f"step-00000002.tmp-{atomic._MACHINE}-999999999-1"
    left.mkdir()
    run(folder, steps=4, resume="auto")
    assert not left.exists() and checkpoints(folder / "checkpoints")


def test_a_log_of_many_steps_without_a_checkpoint_stops(folder, capsys):
    """Its disk is not mounted, or only a part of it was copied."""
    run(folder)
    (folder / "checkpoints").rename(folder / "elsewhere")
    log = (folder / "log.jsonl").read_text()
    with pytest.raises(CheckpointError, match="holds no checkpoint, though the log has 6 steps. Restore it"):
        run(folder, resume="auto")
    assert (folder / "log.jsonl").read_text() == log and not (folder / "checkpoints").exists()
    (folder / "elsewhere").rename(folder / "checkpoints")
    capsys.readouterr()
    shutil.rmtree(folder / "checkpoints/step-00000006")
    run(folder, resume="auto")
    assert "continuing after step 3 of 6; 3 logged steps are repeated\n" in capsys.readouterr().err
    assert (folder / "log.jsonl").read_text().count("\n") == 6


def test_only_checkpoints_that_were_set_aside_are_named(folder):
    run(folder, steps=3)
    set_aside(folder / "checkpoints/step-00000003")
    (folder / "checkpoints/damaged-step-00000003/state.json").write_text("")
    with pytest.raises(CheckpointError, match=r"set aside as damaged \(damaged-step-00000003\); ssmgen fsck"):
        newest_checkpoint(folder)
    with pytest.raises(CheckpointError, match="damaged-step-00000003: was set aside: .*state.json: has 0 bytes"):
        run(folder, steps=3, resume="auto")


def test_a_disk_without_room_for_a_checkpoint_is_said_at_the_start(folder, capsys, monkeypatch):
    monkeypatch.setattr("ssmgen.training.saver.free_space", lambda folder: 1000)
    run(folder, steps=1)
    assert "checkpoints: a checkpoint takes about" in capsys.readouterr().err


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
