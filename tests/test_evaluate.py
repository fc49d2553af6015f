"""An evaluation of a run: stopped, shared by processes, and beside earlier ones."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")

from recipes.sisma import evaluate, train
from recipes.sisma.evaluation import results, trained_run
from recipes.sisma.evaluation.settings import Settings
from ssmgen.data.images import write_png

ROOT = Path(__file__).parents[1]


SMALL = [
    *("image_size=32", "drawn_count=4", "batch_size=2", "model_args.dim=64", "model_args.depth=1", "steps=1"),
    *("sample_every=0", "evaluate_masks=5", "solver=euler", "solver_steps=2", "warmup=1", "evaluate=false"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train.main([f"run={folder / 'run'}", f"cache={folder / 'cache'}", *SMALL])
    return folder / "run"


def figures(run):
    result = json.loads((run / "result.json").read_text())
    return {key: result[key] for key in ("mask_agreement", "ceiling", "autoencoder_ceiling", "floor", "diversity")}


def images_of(run):
    return {file.name: file.read_bytes() for file in run.glob("evaluation/*/*.png")}


@pytest.fixture(scope="module")
def whole(run):
    """Figures and images of an evaluation that nothing disturbed."""
    evaluate.evaluate_run(run, Settings(batch_size=1), command="whole")
    found = figures(run), images_of(run)
    assert len(found[1]) == 5 + 5 * 4
    shutil.rmtree(run / "evaluation")
    return found


class Killed(BaseException):
    """Not an error that anything would catch."""


@pytest.mark.parametrize("last", [0, 1, 8, 24])
def test_stopped_at_any_image_it_goes_on_and_finds_the_same(run, whole, last, monkeypatch):
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    written = []

    def write(file, pixels):
        if len(written) == last:
            raise Killed
        written.append(file)
        write_png(file, pixels)

    monkeypatch.setattr(trained_run, "write_png", write)
    with pytest.raises(Killed):
        evaluate.evaluate_run(run, Settings(batch_size=1), command="stopped")
    monkeypatch.undo()
    assert len(images_of(run)) == last
    evaluate.evaluate_run(run, Settings(batch_size=1), command="went on")
    assert (figures(run), images_of(run)) == whole


@pytest.mark.parametrize("stage", ["measure_images", "save_mask_sheet", "write_report"])
def test_stopped_while_it_measures_it_goes_on_and_finds_the_same(run, whole, stage, monkeypatch):
    def stop(*_, **__):
        raise Killed

    monkeypatch.setattr(trained_run if stage == "measure_images" else results, stage, stop)
    with pytest.raises(Killed):
        evaluate.evaluate_run(run, Settings(batch_size=1), command="stopped")
    monkeypatch.undo()
    evaluate.evaluate_run(run, Settings(batch_size=1), command="went on")
    assert (figures(run), images_of(run)) == whole


def command(run, *words):
    return [sys.executable, "-m", "recipes.sisma.evaluate", f"run={run}", "batch_size=1", *words]


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | more


def test_killed_by_the_system_it_goes_on_and_finds_the_same(run, whole):
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    (run / "result.json").unlink(missing_ok=True)
    process = subprocess.Popen(command(run), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    while len(images_of(run)) < 7 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    assert 7 <= len(images_of(run)) < 25 and not (run / "result.json").exists()
    evaluate.evaluate_run(run, Settings(batch_size=1), command="went on")
    assert (figures(run), images_of(run)) == whole


def test_two_processes_make_one_evaluation(run, whole):
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    (run / "result.json").unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            command(run), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "2 processes" in said[0] and "report:" in said[0] and "report:" not in said[1]
    assert (figures(run), images_of(run)) == whole


def test_every_process_makes_its_share(tmp_path):
    def pipe(masks, *, seed, **_):
        return torch.zeros(len(seed), 3, 4, 4, dtype=torch.uint8)

    wanted = trained_run.one_per_mask([f"{i}" for i in range(7)], torch.zeros(7, 4, 4, dtype=torch.uint8), 0)
    shares = []
    for process in range(3):
        folder = tmp_path / f"share{process}"
        folder.mkdir()
        trained_run.draw_missing(pipe, wanted, folder, {}, batch_size=2, process=process, processes=3)
        shares.append({file.stem for file in folder.iterdir()})
    assert shares == [{"0", "1", "6"}, {"2", "3"}, {"4", "5"}]


def test_noise_belongs_to_an_id_not_to_a_place():
    masks = torch.zeros(3, 4, 4, dtype=torch.uint8)
    first = {image.name: image.seed for image in trained_run.one_per_mask(["ann", "bo", "7"], masks, 0)}
    again = {image.name: image.seed for image in trained_run.one_per_mask(["7", "bo", "ann"], masks, 0)}
    other = {image.name: image.seed for image in trained_run.one_per_mask(["7", "bo", "ann"], masks, 1)}
    assert first == again and len(set(first.values()) | set(other.values())) == 6


def test_an_evaluation_that_says_less_replaces_none_that_says_more(run, whole, capsys):
    """One that says less goes beside; where each says something that the other does not, the older one does."""
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    for file in run.glob("re*"):
        file.unlink()
    evaluate.evaluate_run(run, Settings(masks=3), command="first")
    evaluate.evaluate_run(run, Settings(masks=2), command="smaller")
    said = capsys.readouterr().out
    assert "note: result.json stays, since it says more; this one is result-step-1-2-masks-mask_agreement.json" in said
    assert f"report: {run / 'report-step-1-2-masks-mask_agreement.html'}" in said
    evaluate.evaluate_run(run, Settings(masks=3, parser="none"), command="blind")
    assert "this one is result-step-1-3-masks.json" in capsys.readouterr().out
    evaluate.evaluate_run(run, Settings(masks=4, parser="none"), command="larger but blind")
    assert "note: the previous result is now result-step-1-3-masks-mask_agreement.json" in capsys.readouterr().out
    evaluate.evaluate_run(run, Settings(), command="all")
    assert "note:" not in capsys.readouterr().out
    two, three = "result-step-1-2-masks-mask_agreement", "result-step-1-3-masks-mask_agreement"
    assert commands_of(run) == {"result": "all", "result-step-1-3-masks": "blind", two: "smaller", three: "first"}
    assert (run / f"{two}.png").is_file() and (run / "report-step-1-3-masks-mask_agreement.html").is_file()


def commands_of(run):
    return {file.stem: json.loads(file.read_text())["command"] for file in run.glob("result*.json")}


def test_results_of_other_images_are_kept_by_name(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"images": "ours", "masks": 3}))
    files = results.result_files(tmp_path, {"images": "theirs", "masks": 2})
    assert files.json.name == "result.json" and (tmp_path / "result-ours.json").is_file()
    (tmp_path / "result.json").write_text(json.dumps({"images": "ours", "masks": 4, "lpips": 1}))
    (tmp_path / "result-ours.json").write_text(json.dumps({"images": "ours", "masks": 5}))
    results.result_files(tmp_path, {"images": "theirs", "masks": 2})
    assert (tmp_path / "result-ours-2.json").is_file(), "each says something that the other does not"
    (tmp_path / "result.json").write_text("half a resu")
    assert results.result_files(tmp_path, {"steps": 1, "masks": 2}).note == ""


def test_the_images_of_a_run_measured_as_a_folder_give_the_runs_figures(run, whole, tmp_path):
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    evaluate.evaluate_run(run, Settings(batch_size=1), command="run")
    (folder,) = (run / "evaluation").iterdir()
    result = evaluate.evaluate_images(
        folder, Settings(data="drawn", masks=5, parser="drawn", out=str(tmp_path / "out")), command="folder"
    )
    expected = json.loads((run / "result.json").read_text())
    for key in ("mask_agreement", "ceiling", "floor", "diversity"):
        assert result[key] == expected[key]
