"""A save or a prune may fail or be killed anywhere: an intact checkpoint stays, and the next save clears up."""

import errno
import io
import json
import os
import resource
import shutil
import sys
import traceback
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from toy_training import run

from ssmgen.training import (
    CheckpointError,
    TrainSettings,
    checkpoints,
    find_checkpoint,
    moving_average,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from ssmgen.training import checkpoint as module
from ssmgen.training.checkpoint import collect
from ssmgen.training.health import Health
from ssmgen.training.log import RunLog
from ssmgen.training.saver import Saver

pytest.importorskip("accelerate", reason="training needs accelerate")
CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"}
KILLED, RAISED, UNREACHED = 9, 1, 42


def parts():
    model = torch.nn.Linear(2, 2)
    return {"model": model, "ema": moving_average(model, 0.9), "optimizer": torch.optim.AdamW(model.parameters())}


def save(folder, step, **state):
    return save_checkpoint(folder, step, **parts(), state=state)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def interrupted(action, folder, at, kill):
    """Run ``action`` in a fork; its call number ``at`` into the file system under ``folder`` is failed or killed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in CHANGES and str(arguments[0]).startswith(str(folder)):
            seen += 1
            if seen == at and kill:
                os._exit(KILLED)
            if seen == at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    status = 3
    try:
        sys.addaudithook(hook)
        action()
        status = 0 if seen >= at else UNREACHED
    except OSError:
        status = RAISED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "failed"])
@pytest.mark.parametrize("step", [7, 5], ids=["another step", "the same step"])
def test_an_intact_checkpoint_exists_at_every_instant(tmp_path, step, kill, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # it only takes time: the system does not fail here
    save(tmp_path / "before/checkpoints", 5, old=True)
    folder = tmp_path / "run/checkpoints"

    def save_and_prune():
        save(folder, step)
        prune_checkpoints(folder, keep=1)

    outcomes = []
    while not outcomes or outcomes[-1] != UNREACHED:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "before", tmp_path / "run")
        call = 2 * len(outcomes) + 1 + kill  # every second one; `make torture` takes all
        outcomes.append(interrupted(save_and_prune, folder, call, kill))
        assert outcomes[-1] in (0, KILLED, RAISED, UNREACHED)
        assert all(verify_checkpoint(path) for path in checkpoints(folder)), "nothing half-done has this name"
        assert find_checkpoint(tmp_path / "run", "auto", {}) == newest_checkpoint(tmp_path / "run")
        save(folder, 9)
        prune_checkpoints(folder, keep=1)
        assert names(folder) == ["step-00000009"], "nothing is left to clear up by hand"
    assert len(outcomes) > 20


def test_a_save_over_the_same_step_replaces_it(tmp_path):
    save(tmp_path, 5, version=1)
    path = save(tmp_path, 5, version=2)
    assert verify_checkpoint(path)["version"] == 2 and names(tmp_path) == ["step-00000005"]


def test_pruning_counts_intact_checkpoints_only(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    for step in (5, 3):
        (tmp_path / f"step-0000000{step}/ema.safetensors").write_bytes(b"cut")
    (tmp_path / "step-00000006").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004", "step-00000005", "step-00000006"]
    (tmp_path / "step-00000004/MANIFEST.json").write_text("{}")
    for _ in range(2):
        prune_checkpoints(tmp_path, keep=1)
        assert verify_checkpoint(tmp_path / "step-00000002")


def test_what_does_not_read_back_is_not_kept(tmp_path, monkeypatch):
    first = save(tmp_path, 1)

    def write_badly(folder, write=module.write_manifest):
        write(folder)
        (folder / "model.safetensors").write_bytes(b"lost")

    monkeypatch.setattr(module, "write_manifest", write_badly)
    with pytest.raises(OSError, match=r"step-00000002/model.safetensors: has 4 bytes.*although it was just written"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_a_state_that_is_no_json_and_an_absurd_step_are_rejected_before_writing(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path, 1, loss=float("nan"))
    with pytest.raises(ValueError, match="step=100000000: a checkpoint's step has at most eight digits"):
        save(tmp_path, 10**8)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"seconds": None}, "seconds must be a duration, got None"),
        ({"health": {"unknown": 1}}, "health must be the counts of a `Health`, got {'unknown': 1}"),
        ({"skipped": -1}, "skipped must be a number of steps, got -1"),
        ({"a": "x" * 2 * 10**7}, "has 200000.. bytes, more than the 20000000 of any checkpoint"),
        ({"a": {1: 0, "1": 0}}, "is not valid JSON .a key stands twice"),
        ({"a": eval("[" * 60 + "]" * 60)}, "is nested too deeply"),
    ],
    ids=range(6),
)
def test_a_state_that_could_not_be_read_again_is_the_callers_fault(tmp_path, state, said):
    """Found only when the checkpoint is read back, it would be reported as a fault of the disk."""
    with pytest.raises(ValueError, match=f"^state of a checkpoint: {said}"):
        save(tmp_path, 1, **state)
    assert names(tmp_path) == []


def test_an_intact_checkpoint_that_makes_way_for_a_damaged_one_stays_until_the_next_is_written(tmp_path, monkeypatch):
    path = save(tmp_path, 5, version=1)
    shutil.copytree(path, tmp_path / "step-00000005.replaced")
    (path / "state.json").write_text("{}")
    replaced = []

    def rename_and_look(source, target, rename=Path.rename):
        replaced.append(verify_checkpoint(tmp_path / "step-00000005.replaced")["version"])
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", rename_and_look)
    save(tmp_path, 5, version=2)
    assert replaced[:2] == [1, 1] and verify_checkpoint(path)["version"] == 2 and names(tmp_path) == [path.name]


def test_space_is_looked_at_before_a_save(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 1_000_000))
    with pytest.raises(OSError, match=r"step-00000001: needs 1.0 MB, but only 1.0 MB are free on its disk"):
        save(tmp_path, 1)
    assert names(tmp_path) == []


def failing(monkeypatch, steps):
    """Saves of these steps find a full disk."""
    write = module.write_weights

    def write_or_fail(file, tensors):
        if any(f"step-{step:08d}" in str(file) for step in steps):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, tensors)

    monkeypatch.setattr(module, "write_weights", write_or_fail)


def test_training_goes_on_after_a_failed_save_and_tries_again(folder, monkeypatch, capsys):
    failing(monkeypatch, [1, 4])
    _, result = run(folder, steps=6, checkpoint_every=1)
    said = capsys.readouterr().err
    assert result.step == 6 and names(folder / "checkpoints") == ["step-00000005", "step-00000006"]
    assert (
        "step-00000001: writing failed ([Errno 28] No space left on device); nothing of it was kept (it needs" in said
    )
    assert "MB are free on its disk)\nstep 1 was not saved; there is no checkpoint yet. Training continues and" in said
    assert "step 4 was not saved; the newest checkpoint is step-00000003. Training continues and tries again at" in said


def test_a_failed_last_save_is_an_error(folder, monkeypatch):
    failing(monkeypatch, [6])
    with pytest.raises(OSError, match=r"No space left(?s:.)*the newest checkpoint is step-00000003; the steps since"):
        run(folder, steps=6, checkpoint_every=3)
    assert names(folder / "checkpoints") == ["step-00000003"]
    monkeypatch.undo()
    assert run(folder, steps=6, checkpoint_every=3, resume="auto")[1].step == 6


def test_the_first_save_says_what_it_costs(tmp_path, capsys):
    saver = Saver(tmp_path, keep=1)
    for step in (1, 2):
        saver.save(step, collect(**parts()), {}, last=False)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("step-00000001: saved 1.") and said.endswith("read it back\n")
    assert names(tmp_path) == ["step-00000002"]


def test_a_failed_prune_does_not_end_training(tmp_path, monkeypatch, capsys):
    saver = Saver(tmp_path, keep=1)

    def fail(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(module, "remove_folder", fail)
        for step in (1, 2):
            saver.save(step, collect(**parts()), {}, last=False)
    assert (
        "an older checkpoint was not deleted. Training continues and tries again at the next checkpoint."
        in capsys.readouterr().err
    )
    saver.save(3, collect(**parts()), {}, last=False)
    assert names(tmp_path) == ["step-00000003"]


def test_what_could_not_be_deleted_goes_with_the_next_save(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        prune_checkpoints(tmp_path, keep=1)
    assert len(names(tmp_path)) == 2
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_stderr_on_a_full_disk_does_not_end_training(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stderr", Full())
    failing(monkeypatch, [2])
    saver = Saver(tmp_path, keep=2)
    for step in (1, 2, 3):
        saver.save(step, collect(**parts()), {}, last=False)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_checkpoint_has_the_users_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {"0o640"}
    assert oct(path.stat().st_mode & 0o777) == "0o750"


def test_a_run_is_loaded_from_its_newest_checkpoint_or_not_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoints: no complete checkpoint; has the run reached"):
        newest_checkpoint(tmp_path)
    for step in (1, 2):
        path = save(tmp_path / "checkpoints", step)
    assert newest_checkpoint(tmp_path) == path
    (path / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000002/MANIFEST.json: missing(?s:.)*ssmgen fsck .* --mend"):
        newest_checkpoint(tmp_path)


def test_a_checkpoint_folder_may_be_a_link(tmp_path):
    moved = save(tmp_path / "other disk", 1)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / moved.name).symlink_to(moved)
    assert verify_checkpoint(newest_checkpoint(tmp_path))["step"] == 1
    save(tmp_path / "checkpoints", 2)
    prune_checkpoints(tmp_path / "checkpoints", keep=1)
    assert names(tmp_path / "checkpoints") == ["step-00000002"] and Path(moved).is_dir()


def test_a_full_disk_does_not_end_the_log(tmp_path, capsys):
    with RunLog(tmp_path, 0, TrainSettings(steps=9, batch_size=1, log_every=1), {}) as log:
        log.step(1, 1.0, 1.0, 0.1, Health())
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "log.jsonl").stat().st_size + 30, limit[1]))
        try:
            for step in (2, 3):
                log.step(step, 1.0, 1.0, 0.1, Health())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        log.step(4, 1.0, 1.0, 0.1, Health())
    said = [line for line in capsys.readouterr().err.splitlines() if "log.jsonl" in line]
    assert len(said) == 1 and "a line could not be written" in said[0] and "training goes on" in said[0]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(lines[number])["step"] for number in (0, 2)] == [1, 4]
    with RunLog(tmp_path, 4, TrainSettings(steps=9, batch_size=1), {}):
        assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2, "the torn line is dropped"
