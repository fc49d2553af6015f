"""An evaluation that is killed, shared by processes, or given images that somebody else made."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")

from recipes.sisma import evaluate, generated, measure, report, results, train
from recipes.sisma.arguments import UsageError
from recipes.sisma.evaluation.image_folder import find_images
from ssmgen.data import CELEBAMASK19
from ssmgen.data.drawn_faces import DrawnFaces
from ssmgen.data.folder import write_pair, write_records
from ssmgen.data.images import read_image, write_png

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
    evaluate.evaluate_run(run, command="whole", batch_size=1)
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

    monkeypatch.setattr(generated, "write_png", write)
    with pytest.raises(Killed):
        evaluate.evaluate_run(run, command="stopped", batch_size=1)
    monkeypatch.undo()
    assert len(images_of(run)) == last
    evaluate.evaluate_run(run, command="went on", batch_size=1)
    assert (figures(run), images_of(run)) == whole


@pytest.mark.parametrize("stage", ["measure_images", "save_mask_sheet", "write_report"])
def test_stopped_while_it_measures_it_goes_on_and_finds_the_same(run, whole, stage, monkeypatch):
    def stop(*_, **__):
        raise Killed

    monkeypatch.setattr(evaluate, stage, stop)
    with pytest.raises(Killed):
        evaluate.evaluate_run(run, command="stopped", batch_size=1)
    monkeypatch.undo()
    evaluate.evaluate_run(run, command="went on", batch_size=1)
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
    evaluate.evaluate_run(run, command="went on", batch_size=1)
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
    class Loaded:
        def generate(self, masks, seeds, **_):
            return torch.zeros(len(seeds), 3, 4, 4, dtype=torch.uint8)

    wanted = generated.one_each([f"{i}" for i in range(7)], torch.zeros(7, 4, 4, dtype=torch.uint8), 0)
    shares = []
    for process in range(3):
        folder = tmp_path / f"share{process}"
        folder.mkdir()
        generated.make_missing(Loaded(), wanted, folder, {}, batch_size=2, process=process, processes=3)
        shares.append({file.stem for file in folder.iterdir()})
    assert shares == [{"0", "1", "6"}, {"2", "3"}, {"4", "5"}]


def test_noise_belongs_to_an_id_not_to_a_place():
    masks = torch.zeros(3, 4, 4, dtype=torch.uint8)
    first = {image.name: image.seed for image in generated.one_each(["ann", "bo", "7"], masks, 0)}
    again = {image.name: image.seed for image in generated.one_each(["7", "bo", "ann"], masks, 0)}
    other = {image.name: image.seed for image in generated.one_each(["7", "bo", "ann"], masks, 1)}
    assert first == again and len(set(first.values()) | set(other.values())) == 6


def test_an_evaluation_that_says_less_replaces_none_that_says_more(run, whole, capsys):
    """One that says less goes beside; where each says something that the other does not, the older one does."""
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    for file in run.glob("re*"):
        file.unlink()
    evaluate.evaluate_run(run, command="first", masks=3)
    evaluate.evaluate_run(run, command="smaller", masks=2)
    said = capsys.readouterr().out
    assert "note: result.json stays, since it says more; this one is result-step-1-2-masks-mask_agreement.json" in said
    assert f"report: {run / 'report-step-1-2-masks-mask_agreement.html'}" in said
    evaluate.evaluate_run(run, command="blind", masks=3, parser="none")
    assert "this one is result-step-1-3-masks.json" in capsys.readouterr().out
    evaluate.evaluate_run(run, command="larger but blind", masks=4, parser="none")
    assert "note: the result before is now result-step-1-3-masks-mask_agreement.json" in capsys.readouterr().out
    evaluate.evaluate_run(run, command="all")
    assert "note:" not in capsys.readouterr().out
    two, three = "result-step-1-2-masks-mask_agreement", "result-step-1-3-masks-mask_agreement"
    assert commands_of(run) == {"result": "all", "result-step-1-3-masks": "blind", two: "smaller", three: "first"}
    assert (run / f"{two}.png").is_file() and (run / "report-step-1-3-masks-mask_agreement.html").is_file()


def commands_of(run):
    return {file.stem: json.loads(file.read_text())["command"] for file in run.glob("result*.json")}


def test_results_of_other_images_are_kept_by_name(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"images": "ours", "masks": 3}))
    files = results.place(tmp_path, {"images": "theirs", "masks": 2})
    assert files.json.name == "result.json" and (tmp_path / "result-ours.json").is_file()
    (tmp_path / "result.json").write_text(json.dumps({"images": "ours", "masks": 4, "lpips": 1}))
    (tmp_path / "result-ours.json").write_text(json.dumps({"images": "ours", "masks": 5}))
    results.place(tmp_path, {"images": "theirs", "masks": 2})
    assert (tmp_path / "result-ours-2.json").is_file(), "each says something that the other does not"
    (tmp_path / "result.json").write_text("half a resu")
    assert results.place(tmp_path, {"steps": 1, "masks": 2}).note == ""


# A folder of images that somebody else made.


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared folder with six drawn test pairs of 48 pixels."""
    folder = tmp_path_factory.mktemp("prepared")
    faces, hashes = DrawnFaces(8, size=48), {}
    ids = [f"face{index}" for index in range(8)]
    for index, id in enumerate(ids):
        hashes |= write_pair(folder, id, *faces[index])
    write_records(folder, CELEBAMASK19, {"train": ids[6:], "test": ids[:6]}, hashes, {})
    return folder


@pytest.fixture
def faces(prepared, tmp_path):
    """The real images under the ids of their masks, as if somebody had made them."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for index in range(6):
        shutil.copy(prepared / "images" / f"face{index}.png", folder / f"face{index}.png")
    return folder


def test_images_of_the_masks_themselves_reach_the_ceiling(prepared, faces):
    evaluate.main([f"images={faces}", f"data={prepared}", "parser=drawn"])
    out = faces.with_name("faces-evaluation")
    result = json.loads((out / "result.json").read_text())
    assert result["mask_agreement"] == result["ceiling"] and result["floor_to_ceiling"] == 1
    assert result["floor"]["miou"] < result["ceiling"]["miou"] and "autoencoder_ceiling" not in result
    assert result["masks"] == 6 and result["image_size"] == 48 and result["images"] == "faces"
    page = (out / "report.html").read_text()
    assert "6 images of 48 pixels" in page and "training steps" not in page and (out / "result.png").is_file()


def test_given_images_are_measured_by_one_process(prepared, faces, monkeypatch):
    monkeypatch.setattr(evaluate, "all_processes", lambda: SimpleNamespace(is_main_process=False))
    evaluate.main([f"images={faces}", f"data={prepared}", "parser=drawn"])
    assert not faces.with_name("faces-evaluation").exists()


def test_images_under_other_ids_and_blurred_ones_agree_less(prepared, faces):
    def agreement():
        return evaluate.evaluate_images(faces, str(prepared), command="test", parser="drawn")

    sharp = [read_image(faces / f"face{index}.png") for index in range(6)]
    real = agreement()["mask_agreement"]["miou"]
    for index, image in enumerate(sharp):
        blurred = torch.nn.functional.avg_pool2d(image.float(), 7, 1, 3).to(torch.uint8)
        write_png(faces / f"face{index}.png", blurred)
    assert agreement()["mask_agreement"]["miou"] < 0.9 * real
    for index, image in enumerate(sharp):
        write_png(faces / f"face{(index + 5) % 6}.png", image)  # not the shift that the floor makes
    assert agreement()["mask_agreement"]["miou"] < 0.8 * real


def test_several_images_a_mask_count_for_the_diversity(prepared, faces):
    for file in list(faces.iterdir()):
        shutil.copy(file, faces / f"{file.stem}--0.png")
        write_png(faces / f"{file.stem}--1.png", 255 - read_image(file))
        file.unlink()
    result = evaluate.evaluate_images(faces, str(prepared), command="test", masks=4)
    assert result["masks"] == 4 and result["diversity"]["same_mask"] > result["diversity"]["other_masks"] > 0
    files, groups = find_images(faces, [f"face{index}" for index in range(6)], 6)
    assert [file.name for file in files] == [f"face{index}--0.png" for index in range(6)]
    assert [[file.name for file in group] for group in groups][0] == ["face0--0.png", "face0--1.png"]


def test_the_images_of_a_run_measured_as_a_folder_give_the_runs_figures(run, whole, tmp_path):
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    evaluate.evaluate_run(run, command="run", batch_size=1)
    (folder,) = (run / "evaluation").iterdir()
    result = evaluate.evaluate_images(folder, "drawn", command="folder", masks=5, parser="drawn", out=tmp_path / "out")
    expected = json.loads((run / "result.json").read_text())
    for key in ("mask_agreement", "ceiling", "floor", "diversity"):
        assert result[key] == expected[key]


def extra(folder):
    shutil.copy(folder / "face0.png", folder / "stranger.png")


def missing(folder):
    (folder / "face3.png").unlink()


def smaller(folder):
    write_png(folder / "face2.png", torch.zeros(3, 32, 32, dtype=torch.uint8))


def oblong(folder):
    write_png(folder / "face0.png", torch.zeros(3, 48, 32, dtype=torch.uint8))


def grey(folder):
    write_png(folder / "face4.png", torch.zeros(48, 48, dtype=torch.uint8))


def alpha(folder):
    from PIL import Image

    Image.new("RGBA", (48, 48)).save(folder / "face5.png")


def damaged(folder):
    (folder / "face5.png").write_bytes(b"no image")


def twice(folder):
    from PIL import Image

    Image.new("RGB", (48, 48)).save(folder / "face5.jpg")


def uneven(folder):
    for name in ("face0--0", "face0--1", "face1--0", "face1--1", "face1--2"):
        shutil.copy(folder / "face0.png", folder / f"{name}.png")


def odd_size(folder):
    for file in folder.iterdir():
        write_png(file, torch.zeros(3, 40, 40, dtype=torch.uint8))


def empty(folder):
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "words", "message"),
    [
        (extra, [], "images without a mask, 1: stranger.png"),
        (missing, [], "masks without an image, 1 of 6: face3"),
        (smaller, [], "face2.png: is 32 pixels wide, face0.png is 48; all must have one size"),
        (oblong, [], "face0.png: is 32 x 48 pixels; images must be square"),
        (grey, [], "face4.png: is of mode L, not RGB"),
        (alpha, [], "face5.png: is of mode RGBA, not RGB"),
        (damaged, [], "face5.png: cannot be read as an image"),
        (twice, [], "face5.jpg and face5.png are two images of one name"),
        (uneven, [], "same number of images for the diversity; face0 has 2, face1 has 3"),
        (odd_size, ["parser=drawn"], "multiples of 16, got 40 pixels"),
        (empty, [], "holds no images"),
        (shutil.rmtree, [], "no such folder of images"),
        (None, ["masks=1"], "at least 2 unseen masks, got 1"),
        (None, ["masks=3", "proxy=none.safetensors"], "at least 4 unseen masks with real images, got 3"),
        (None, ["proxy=none.safetensors"], "none.safetensors: not found"),
        (None, ["fid=clean"], r"pt_inception-2015.*\.pth: not found"),
        (None, ["lpips=true"], r"alexnet.*\.pth: not found"),
        (None, ["parser=none.safetensors"], "none.safetensors: no such parser"),
        (None, ["steps=4"], "steps= has no meaning for images that are there"),
    ],
)
def test_images_that_cannot_be_measured_are_refused_before_anything_is_written(prepared, faces, spoil, words, message):
    if spoil is not None:
        spoil(faces)
    with pytest.raises((ValueError, OSError), match=message):
        evaluate.main([f"images={faces}", f"data={prepared}", f"weights={faces.parent / 'none'}", *words])
    assert not faces.with_name("faces-evaluation").exists()


def test_images_need_to_know_their_masks(faces):
    with pytest.raises(UsageError, match="images= needs data=PREPARED"):
        evaluate.main([f"images={faces}"])


class Seer:
    """A parser of one's own: it has seen the masks."""

    def __init__(self, masks):
        self.masks = iter(masks)

    def parse(self, images):
        return torch.stack([next(self.masks) for _ in images])


def test_any_parser_can_judge(prepared, faces):
    masks = [measured[1] for measured in evaluate.held_out_pairs(evaluate.Config(data=str(prepared), image_size=48), 6)]
    judge = measure.Judge("seer", Seer([*masks, *masks]), 19, weights="1" * 64)
    result = evaluate.evaluate_images(faces, str(prepared), command="test", parser=judge)
    assert result["mask_agreement"]["miou"] == result["ceiling"]["miou"] == 1
    assert result["mask_agreement"]["protocol"].startswith("agreement[parser=seer,")
    assert result["mask_agreement"]["weights"] == "1" * 64
    with pytest.raises(ValueError, match="seer: tells 6 classes apart, the masks have 19"):
        evaluate.evaluate_images(
            faces, str(prepared), command="test", parser=measure.Judge("seer", Seer(masks), 6), out=faces / "out"
        )


def test_a_parser_that_sees_nothing_is_said_not_divided_by(prepared, faces):
    class Blind:
        def parse(self, images):
            return torch.zeros(images[:, 0].shape, dtype=torch.uint8)

    result = evaluate.evaluate_images(
        faces, str(prepared), command="test", parser=measure.Judge("blind", Blind(), 19), out=faces.parent / "out"
    )
    assert result["floor_to_ceiling"] is None and "the parser fails on real images" in evaluate.summary(result)
    assert "it cannot judge these" in (faces.parent / "out" / "report.html").read_text()


# The page.


def test_every_published_row_says_what_differs_from_this_result():
    drawn = {"data": "drawn", "image_size": 128, "masks": 64}
    alike = {"data": "prepared folder", "image_size": 256, "masks": 2000, "distances": {"sdm-oasis": {}}}
    rows = {row.method: row for row in report.PUBLISHED}
    assert list(rows) == ["SPADE", "CLADE", "INADE", "SDM", "SCDM", "SISMA"]
    for row in rows.values():
        assert "photos, here drawn faces" in report.differences(row, drawn) and row.known
    scdm = report.differences(rows["SCDM"], drawn)
    assert "256 pixels, here 128" in scdm and "2,000 images, here 64" in scdm and "here not measured" in scdm
    assert report.differences(rows["SCDM"], alike) == (
        "trained on 28,000 photos of CelebAMask-HQ; mIoU by another parser; resized as by OASIS"
    )
    assert "against train images, here against test images" in report.differences(rows["CLADE"], alike)
    assert "not stated" in report.differences(rows["SISMA"], alike)


def test_curves_are_drawn_from_a_log(tmp_path):
    assert report.curves(tmp_path) == []
    lines = [json.dumps({"step": step, "loss": 2 / step, "lr": float("nan")}) for step in range(1, 501)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"step": 501, "lo']))
    (loss,) = report.curves(tmp_path)
    points = [tuple(map(float, point.split(","))) for point in loss["lines"][0]["raw"].split()]
    assert len(points) == 500 and points == sorted(points), "x grows"
    assert [y for _, y in points] == sorted(y for _, y in points), "a falling loss goes down the page"
    assert (points[0], points[-1]) == ((0, 0), (1000, 1000))
