"""``ssmgen fsck`` names everything in a run's folder that is not in order, and mends what needs no guessing."""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ssmgen import atomic
from ssmgen.cli import main
from ssmgen.machine import start_of
from ssmgen.training import (
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    moving_average,
    read_manifest,
    run_lock,
    save_checkpoint,
    verify_checkpoint,
)
from ssmgen.training.fsck import check_run, mend_run, run_of

GOLDEN = Path(__file__).parent / "golden"
GONE = f".tmp-{atomic._MACHINE}-999999999-1"  # no process has this id
RUNNING = f".tmp-{atomic._MACHINE}-{os.getppid()}-{start_of(os.getppid())}"


@pytest.fixture
def run(tmp_path):
    """A run with three checkpoints, a log and a configuration."""
    model = torch.nn.Linear(2, 2)
    parts = {"model": model, "ema": moving_average(model, 0.9), "optimizer": torch.optim.AdamW(model.parameters())}
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "run/checkpoints", step, **parts, state={})
    (tmp_path / "run/log.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "run/config.yaml").write_text("steps: 3\n")
    return tmp_path / "run"


def statuses(run):
    return {finding.name: finding.status for finding in check_run(run)}


def test_a_run_without_checkpoints_is_listed_with_its_log(run, capsys):
    shutil.rmtree(run / "checkpoints")
    assert main(["fsck", str(run)]) == 0
    said = capsys.readouterr().out
    assert "holds no checkpoint, though the log has 2 steps" in said and "config.yaml" in said and "2 lines" in said


def test_mending_is_offered_where_it_does_something(run, capsys):
    (run / "config.yaml").write_text("a: [")
    assert main(["fsck", str(run)]) == 1 and "--mend" not in capsys.readouterr().out
    for path in checkpoints(run / "checkpoints"):
        (path / "state.json").write_text("")
    assert main(["fsck", str(run)]) == 1 and "--mend mends what can be mended" in capsys.readouterr().out
    assert main(["fsck", str(run), "--mend"]) == 1
    assert "put intact copies of the files back and mend again" in capsys.readouterr().out


def test_a_run_in_order_is_said_to_be(run, capsys):
    assert main(["fsck", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step-00000001  format 2  [0-9.]+ kB  ok", lines[0])
    assert [line.split()[0] for line in lines[:-1]] == [
        *("step-00000001", "step-00000002", "step-00000003", "log.jsonl", "config.yaml")
    ]
    assert lines[-1] == "nothing is wrong"
    assert main(["fsck", str(run / "checkpoints")]) == 0


def test_everything_that_is_wrong_is_named(run, capsys):
    folder = run / "checkpoints"
    (folder / "step-00000002/ema.safetensors").write_bytes(b"cut")
    shutil.rmtree(folder / "step-00000003")
    (folder / "step-00000003").mkdir()
    (folder / f"step-00000004{GONE}").mkdir()
    (run / f"log.jsonl{GONE}").touch()
    (folder / f"step-00000005{RUNNING}").mkdir()
    (folder / "step-7").mkdir()
    (run / "log.jsonl").write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    (run / "config.yaml").write_text("steps: [")
    assert statuses(run) == {
        "step-00000001": "ok",
        "step-00000002": "damaged",
        "step-00000003": "damaged",
        "step-7": "note",
        f"step-00000004{GONE}": "leftover",
        f"step-00000005{RUNNING}": "note",
        f"log.jsonl{GONE}": "leftover",
        "log.jsonl": "note",
        "config.yaml": "damaged",
    }
    assert main(["fsck", str(run), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    details = {finding["name"]: finding["detail"] for finding in facts["found"]}
    assert facts["ok"] is False and facts["mended"] == []
    assert details["step-00000002"].startswith("ema.safetensors: has 3 bytes, the manifest says ")
    assert details["step-00000003"].startswith("MANIFEST.json: missing")
    assert details["log.jsonl"] == "3 lines, 1 of them broken, the first is line 2; resuming drops them"
    assert details["config.yaml"].startswith("is not valid YAML")
    assert main(["fsck", str(run)]) == 1
    assert capsys.readouterr().out.endswith(f"5 of 9 are wrong; ssmgen fsck {run} --mend mends what can be mended\n")


def test_mending_leaves_what_resuming_takes(run, capsys):
    folder = run / "checkpoints"
    (folder / "step-00000003/model.safetensors").unlink()
    (folder / f"step-00000004{GONE}").mkdir()
    assert main(["fsck", str(run), "--mend"]) == 0
    said = capsys.readouterr().out
    assert "step-00000003: set aside as damaged-step-00000003\n" in said and "nothing is wrong" in said
    assert f"step-00000004{GONE}: deleted, a leftover\n" in said
    assert find_checkpoint(run, "auto", {}) == folder / "step-00000002"
    assert mend_run(run) == []


def test_what_was_set_aside_and_verifies_again_gets_its_name_back(run):
    folder = run / "checkpoints"
    file = folder / "step-00000003/model.safetensors"
    content = file.read_bytes()
    file.unlink()
    mend_run(run)
    assert statuses(run)["damaged-step-00000003"] == "set aside"
    (folder / "damaged-step-00000003/model.safetensors").write_bytes(content)  # from a copy
    assert statuses(run)["damaged-step-00000003"] == "damaged"
    assert mend_run(run) == ["damaged-step-00000003: verifies, restored as step-00000003"]
    assert verify_checkpoint(folder / "step-00000003")
    shutil.copytree(folder / "step-00000003", folder / "damaged-step-00000003")
    assert statuses(run)["damaged-step-00000003"] == "set aside" and mend_run(run) == []


def test_a_run_without_an_intact_checkpoint_is_not_in_order(run):
    for path in checkpoints(run / "checkpoints"):
        (path / "MANIFEST.json").unlink()
    mend_run(run)
    found = [finding for finding in check_run(run) if finding.wrong]
    assert [finding.detail for finding in found] == ["no checkpoint is intact, so the run is not resumed"]


def test_an_interrupted_replacement_is_finished(run):
    """The three states that a kill can leave when a step is saved again."""
    folder = run / "checkpoints"
    for name, replaced in (("step-00000001", "damaged"), ("step-00000002", "intact"), ("step-00000003", "alone")):
        shutil.copytree(folder / name, folder / f"{name}.replaced")
        if replaced == "damaged":
            (folder / name / "state.json").write_text("{}")
        elif replaced == "alone":
            shutil.rmtree(folder / name)
    assert statuses(run)["step-00000002.replaced"] == "leftover"
    assert len(mend_run(run)) == 4
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["damaged-step-00000001", "step-00000001", "step-00000002", "step-00000003"]
    assert all(verify_checkpoint(path) for path in checkpoints(folder))


def test_of_two_damaged_ones_none_is_deleted(run):
    folder = run / "checkpoints"
    shutil.copytree(folder / "step-00000003", folder / "step-00000003.replaced")
    for name in ("step-00000003", "step-00000003.replaced"):
        (folder / name / "state.json").write_text(name)
    assert mend_run(run) == [
        "step-00000003: set aside as damaged-step-00000003",
        "step-00000003.replaced: renamed to step-00000003",
        "step-00000003: set aside as damaged-step-00000003-2",
    ]
    assert (folder / "damaged-step-00000003-2/state.json").read_text() == "step-00000003.replaced"
    assert mend_run(run) == []


def test_the_folder_of_its_checkpoints_stands_for_the_run(run, monkeypatch, capsys):
    folder = run / "checkpoints"
    monkeypatch.chdir(folder)
    for given in (folder, Path("."), Path("../checkpoints")):
        (folder / "step-00000003/model.safetensors").unlink()
        with run_lock(run), ThreadPoolExecutor(1) as thread:  # as a training in another thread holds it
            assert thread.submit(main, ["fsck", str(given), "--mend"]).result() == 2
        assert "trains in it" in capsys.readouterr().err
        assert main(["fsck", str(given), "--mend"]) == 0
        said = capsys.readouterr().out
        assert "step-00000003: set aside as damaged-step-00000003" in said and "log.jsonl" in said
        assert not list(folder.glob("*lock*"))
        (folder / "damaged-step-00000003").rename(folder / "step-00000003")
        shutil.copy(folder / "step-00000002/model.safetensors", folder / "step-00000003")
    named_so = run.rename(folder.parent.parent / "checkpoints")
    assert run_of(named_so) == named_so and run_of(named_so / "checkpoints") == named_so


@pytest.mark.parametrize("text", ["a: &x 1\nb: *x\n", "steps: ${HOME}\n", "[1]\n"])
def test_of_a_configuration_it_is_said_only_that_it_is_yaml(run, text):
    (run / "config.yaml").write_text(text)
    (found,) = (finding for finding in check_run(run) if finding.name == "config.yaml")
    assert (found.status, found.detail) == ("ok", "readable YAML; its settings are not checked")


@pytest.mark.parametrize("name", ["first", "second"])
def test_an_older_format_is_completed(tmp_path, name, capsys):
    run = shutil.copytree(GOLDEN / name, tmp_path / "run")
    (path,) = checkpoints(run / "checkpoints")
    before = load_checkpoint(path)
    assert main(["fsck", str(run)]) == 0
    assert "an older format; --mend writes format 2" in capsys.readouterr().out
    assert mend_run(run) == ["step-00000003: has a manifest of format 2 now"]
    assert read_manifest(path).format == 2 and load_checkpoint(path) == before
    shutil.copy(GOLDEN / name / "checkpoints/step-00000003/MANIFEST.json", path)
    (path / "model.safetensors").write_bytes(b"cut")
    assert mend_run(run) == ["step-00000003: set aside as damaged-step-00000003"], "damage is never signed"


def test_other_folders_are_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    for name, said in (("nowhere", "is not a folder"), ("file", "is not a folder"), (".", "holds neither checkpoints")):
        assert main(["fsck", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err


def test_a_checkpoint_that_may_not_be_read_is_left_alone(run, monkeypatch):
    from ssmgen.training import fsck

    def forbid(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(fsck, "verify_checkpoint", forbid)
    assert statuses(run)["step-00000001"] == "unknown"
    with pytest.raises(PermissionError):
        mend_run(run)
    assert len(checkpoints(run / "checkpoints")) == 3
