"""Copies of training images: the nearest training image of each image, and what an evaluation says about it."""

import json
import math
import shutil

import pytest
import torch
from metric_inputs import Pool, featured, smooth

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")
pytest.importorskip("torch_fidelity", reason="distances need ssmgen[metrics]")

from recipes.sisma import evaluate
from recipes.sisma.arguments import UsageError
from recipes.sisma.evaluation.distances import FeatureDistance, load_distances
from recipes.sisma.evaluation.images import HeldOut, Images, TrainingImages
from recipes.sisma.evaluation.nearest import coarse, judge, measure_nearest, training_images
from recipes.sisma.evaluation.results import summary
from recipes.sisma.evaluation.settings import Settings
from recipes.sisma.pairs import training_pairs
from recipes.sisma.presets import Config
from ssmgen.data import CELEBAMASK19
from ssmgen.data.drawn_faces import DrawnFaces
from ssmgen.data.folder import write_pair, write_records
from ssmgen.data.images import read_image, write_png
from ssmgen.metrics import FeatureSet, InceptionTrunk, memorisation, nearest, nearest_images


class Layout(torch.nn.Module):
    """Colours in 16 places of an image, in the place of Inception's features: a mirrored image has others."""

    protocol, distances = "layout", ("fid", "kid")

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(InceptionTrunk, "published", lambda *_, **__: Layout())


def at_angles(of, **degrees):
    """Features of two numbers at these angles, each of another length."""
    features = FeatureSet(Layout(), of)
    for length, (id, angle) in enumerate(degrees.items(), start=1):
        turn = math.radians(angle)
        features.counted[id] = length * torch.tensor([math.cos(turn), math.sin(turn)])
    return features


def one_minus_cosine(degrees):
    return pytest.approx(1 - math.cos(math.radians(degrees)), abs=1e-7)


@pytest.mark.parametrize("chunk", [1, 256])
def test_the_nearest_image_is_that_of_the_smallest_angle(chunk, monkeypatch):
    monkeypatch.setattr(nearest, "_CHUNK", chunk)
    found = nearest_images(at_angles("", x=10, y=85, z=180), at_angles("train", c=0, b=30, a=90))
    assert found == {
        "x": ("c", one_minus_cosine(10)),
        "y": ("a", one_minus_cosine(5)),
        "z": ("a", one_minus_cosine(90)),
    }


def test_the_summary_compares_with_unseen_real_images():
    training = at_angles("train", a=0, b=90)
    real = at_angles("test", **{f"r{k}": 2 * k for k in range(1, 22)})  # at 2, 4, ... 42 degrees from a
    generated = at_angles("seed=0", far=40, near=3, copy=90, other=130)
    found = memorisation(generated, real, training)
    assert found["real_median"] == one_minus_cosine(22) and found["threshold"] == one_minus_cosine(4)
    assert found["median"] == pytest.approx((1 - math.cos(math.radians(3)) + 1 - math.cos(math.radians(40))) / 2)
    assert found["ratio"] == found["median"] / found["real_median"] and found["share_nearer"] == 0.5
    assert list(found["images"]) == ["copy", "near", "far", "other"], "the smallest distance first"
    assert found["images"]["copy"] == {"training": "b", "distance": 0}
    assert found["protocol"] == "nearest[layout,cosine,real=test21,ref=train2,n=4,seed=0]"
    assert (found["n"], found["real_n"], found["reference_n"]) == (4, 21, 2)
    assert found["reference_list"] == training.list_hash() and found["real_list"] == real.list_hash()


def test_a_copy_is_caught_and_unseen_images_are_not():
    trunk = Pool()
    seen, real = featured(trunk, smooth(60, 0)), featured(trunk, smooth(40, 1))
    copied = memorisation(featured(trunk, smooth(60, 0)[10:30]), real, seen)
    assert copied["share_nearer"] == 1 and copied["ratio"] == 0
    assert copied["images"]["i00000"] == {"training": "i00010", "distance": 0}
    fresh = memorisation(featured(trunk, smooth(40, 2)), real, seen)
    assert 0.5 < fresh["ratio"] < 2 and fresh["share_nearer"] < 0.25
    assert memorisation(real, real, seen)["ratio"] == 1
    assert memorisation(seen, featured(trunk, smooth(60, 0)[:5]), seen)["ratio"] is None, "unseen images that were seen"


def test_sets_that_cannot_be_compared_are_refused():
    features, empty = featured(Pool(), smooth(3, 0)), FeatureSet(Pool())
    with pytest.raises(ValueError, match="the training set has 0 images, at least 1 are needed"):
        nearest_images(features, empty)
    with pytest.raises(ValueError, match="the real set has 0 images, at least 1 are needed"):
        memorisation(features, empty, features)
    with pytest.raises(ValueError, match="features of different networks: Pool .* and Pool .* and Pool "):
        memorisation(features, features, featured(Pool(5), smooth(3, 0)))


def measured(generated, training):
    """`measure_nearest` of images, with as many faces as the yardstick that are no training images."""
    real = torch.stack([DrawnFaces(len(generated), size=48, start=5_000)[i][0] for i in range(len(generated))])
    held_out = HeldOut([f"{i:02}" for i in range(len(generated))], real[:, 0], real, CELEBAMASK19)
    images = Images(held_out, generated, {}, "given", training)
    return measure_nearest(FeatureDistance("clean", Layout()), images, training, lambda _: None)


def test_mirrored_copies_are_copies_if_the_training_mirrored():
    config = Config(image_size=48, drawn_count=24)
    faces = torch.stack([training_pairs(config)[i][0] for i in range(12)])
    plain, mirrored = (training_images(config, mirrored) for mirrored in (False, True))
    straight, caught = measured(faces, plain), measured(faces.flip(-1), mirrored)
    assert straight["share_nearer"] == 1 and straight["ratio"] == 0
    assert caught["share_nearer"] == 1 and caught["ratio"] < 1e-3
    assert caught["images"]["03"]["training"] == "00003 mirrored" and caught["reference_n"] == 48
    assert torch.equal(mirrored.find("00003 mirrored"), faces[3].flip(-1))
    assert torch.equal(plain.find("00003"), faces[3])
    assert measured(faces.flip(-1), plain)["ratio"] > 0.1
    assert caught["protocol"] == "nearest[layout,cosine,real=test12,ref=train+mirrored48,n=12,given,coarse4]"


def test_a_training_image_whose_name_ends_in_mirrored_is_found():
    one, other = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    training = TrainingImages([(one, None), (other, None)], ["a", "b mirrored"], mirrored=True)
    assert torch.equal(training.find("b mirrored"), other)
    assert torch.equal(training.find("b mirrored mirrored"), other.flip(-1))


def test_coarse_images_keep_their_size_and_lose_their_noise():
    noise = torch.randint(0, 256, (3, 30, 41), dtype=torch.uint8)
    even = torch.full((3, 30, 41), 77, dtype=torch.uint8)
    assert coarse(noise).shape == noise.shape and coarse(noise).float().std() < noise.float().std() / 3
    assert torch.equal(coarse(even), even) and coarse(noise[:, :2, :3]).shape == (3, 2, 3)


def test_the_proxy_judges_before_fid(stand_in):
    fid = load_distances(Settings(fid="clean,sdm-oasis", nearest=True), 8)
    proxy = FeatureDistance("squeezenet11", Layout())
    assert judge(fid).name == "clean" and judge([*fid, proxy]) is proxy


def test_without_features_it_is_refused_before_sampling(trained):
    before = sorted(trained.rglob("*"))
    with pytest.raises(UsageError, match=r"nearest=true compares features: give proxy=FILE, .* or fid=PROTOCOL"):
        evaluate.main([f"run={trained}", "nearest=true", "solver=heun"])
    assert sorted(trained.rglob("*")) == before


def test_a_run_says_what_it_copied(trained, stand_in, capsys):
    """The images of the run are replaced by training images, one of them mirrored, in a training with flips."""
    config = (trained / "config.yaml").read_text()
    (trained / "config.yaml").write_text(config.replace("flip: false", "flip: true"))
    settings = Settings(fid="clean", nearest=True)
    before = evaluate.evaluate_run(trained, settings, command="test")["nearest"]
    assert before["reference_n"] == 48 and before["n"] == before["real_n"] == 4 and before["ratio"] > 0.1
    (folder,) = (record.parent for record in trained.glob("evaluation/*/record.json"))
    faces = DrawnFaces(24, size=64)
    for place, file in enumerate(file for file in sorted(folder.glob("*.png")) if "--" not in file.name):
        write_png(file, faces[place][0] if place else faces[7][0].flip(-1))
    capsys.readouterr()
    result = evaluate.evaluate_run(trained, settings, command="test")
    found, said = result["nearest"], capsys.readouterr().out
    assert found["share_nearer"] == 1 and found["ratio"] < 1e-3
    assert {one["training"] for one in found["images"].values()} == {"00007 mirrored", "00001", "00002", "00003"}
    assert json.loads((trained / "result.json").read_text())["nearest"] == found
    line = f"of real unseen images {found['real_median']:.4f} (ratio 0.00); 100 % nearer than 95 % of the real ones"
    assert line in summary(result) and line in (trained / "report.html").read_text() and found["protocol"] in said
    assert f"nearest training images: {trained / 'nearest.png'}" in said
    picture = read_image(trained / "nearest.png")
    assert picture.shape == (3, 4 * 68 + 4 + 22, 2 * 68 + 4), "four rows of two images of 64 pixels, gaps, a heading"
    rows = [picture[:, 26 + 68 * row :][:, :64] for row in range(4)]
    assert all(torch.equal(row[..., 4:68], row[..., 72:136]) for row in rows), "each beside the one it copies"


def test_the_result_with_the_check_is_kept_with_its_picture(trained, stand_in):
    evaluate.evaluate_run(trained, Settings(fid="clean", nearest=True), command="first")
    evaluate.evaluate_run(trained, Settings(fid="clean"), command="without")
    assert json.loads((trained / "result.json").read_text())["command"] == "first"
    evaluate.evaluate_run(trained, Settings(fid="clean,sdm-oasis"), command="other")
    assert json.loads((trained / "result.json").read_text())["command"] == "other"
    (kept,) = (file.stem.removeprefix("nearest") for file in trained.glob("nearest*.png"))
    assert kept and "nearest" in json.loads((trained / f"result{kept}.json").read_text())


def test_a_folder_of_images_is_compared_with_mirrored_images_too(tmp_path, stand_in):
    (tmp_path / "prepared").mkdir()
    pairs, hashes, ids = DrawnFaces(12, size=48), {}, [f"face{index}" for index in range(12)]
    for index, id in enumerate(ids):
        hashes |= write_pair(tmp_path / "prepared", id, *pairs[index])
    write_records(tmp_path / "prepared", CELEBAMASK19, {"train": ids[6:], "test": ids[:6]}, hashes, {})
    (tmp_path / "faces").mkdir()
    for index in range(6):
        write_png(tmp_path / "faces" / f"face{index}.png", pairs[6 + index][0].flip(-1))
    evaluate.main([f"images={tmp_path / 'faces'}", f"data={tmp_path / 'prepared'}", "fid=clean", "nearest=true"])
    out = tmp_path / "faces-evaluation"
    found = json.loads((out / "result.json").read_text())["nearest"]
    assert found["share_nearer"] == 1 and found["images"]["face2"]["training"] == "face8 mirrored"
    assert (out / "nearest.png").is_file()
    shutil.rmtree(out)
    with pytest.raises(UsageError, match="nearest=true compares features"):
        evaluate.main([f"images={tmp_path / 'faces'}", f"data={tmp_path / 'prepared'}", "nearest=true"])
    assert not out.exists()


def test_the_crops_of_a_training_have_their_own_names(tmp_path):
    """The preset ``faces`` trains on two crops of each pair: the names must follow the order of the crops."""
    hashes: dict[str, str] = {}
    for index in range(4):
        hashes |= write_pair(tmp_path, f"{index}", *DrawnFaces(4, size=64)[index])
    write_records(tmp_path, CELEBAMASK19, {"train": ["0", "1", "2"], "test": ["3"]}, hashes, {})
    training = training_images(Config(data=str(tmp_path), image_size=32, crops=2), mirrored=True)
    assert list(training.ids) == ["0", "0 crop 1", "1", "1 crop 1", "2", "2 crop 1"]
    whole = [training.pairs[2 * k][0] for k in range(3)]
    plain = training_pairs(Config(data=str(tmp_path), image_size=32))
    assert all(torch.equal(image, plain[k][0]) for k, image in enumerate(whole)), "the first crop is the centre"
    crop = training.find("1 crop 1 mirrored")
    assert torch.equal(crop, training.pairs[3][0].flip(-1)) and not torch.equal(crop.flip(-1), whole[1])
