"""The tutorials run, in small, and do what their pages say."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import ssmgen
from ssmgen import MaskToImage, registry
from ssmgen.data import CELEBAMASK19
from ssmgen.pipeline import Recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a tutorial as its command does, with names that it registers forgotten afterwards; gives what it printed."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    monkeypatch.chdir(tmp_path)

    def tutorial(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *options])
        monkeypatch.delitem(sys.modules, f"tutorials.{name}", raising=False)  # another test may have imported it
        runpy.run_module(f"tutorials.{name}", run_name="__main__")
        return capsys.readouterr().out

    return tutorial


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small pipeline of 19 classes in pixels, whose weights are random and not zero as a fresh head's."""
    folder = tmp_path_factory.mktemp("pipeline") / "small"
    args = {"in_channels": 3, "mask_scale": 1, "patch_size": 4, "dim": 96, "mask_dropout": 0.1}
    torch.manual_seed(0)
    model = ssmgen.build("sisma-debug", **args)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    recipe = Recipe("sisma-debug", args, "identity", 64, CELEBAMASK19, {"solver": "euler", "steps": 2}, "Small.")
    MaskToImage(model, ssmgen.build("identity"), recipe).save_pretrained(folder)
    return folder


def test_there_is_a_page_for_each_script_and_a_test():
    scripts = {file.stem for file in (ROOT / "tutorials").glob("*.py")} - {"__init__", "drawn_street"}
    pages = "".join(page.read_text() for page in (ROOT / "docs/tutorials").glob("*.md"))
    assert scripts == set(re.findall(r"python -m tutorials\.(\w+)", pages))
    assert scripts == set(re.findall(r'run\(\s*"(\w+)"', Path(__file__).read_text()))


def test_your_own_masks(run):
    said = run("your_own_masks", "--scenes", "16", "--steps", "4", "--unseen", "2")
    own, others = re.findall(r"(\d\.\d+) with", said)[0], re.findall(r"(\d\.\d+) with those", said)[0]
    assert float(own) > 0 and float(others) > 0
    pipe = MaskToImage.from_pretrained("runs/street/model")
    assert pipe.recipe.labels.classes == ("sky", "building", "tree", "pavement", "road", "car")
    assert pipe(torch.full((64, 64), 5, dtype=torch.uint8), steps=2)[0].size == (64, 64)
    with pytest.raises(ValueError, match="label 6 is outside 0..5"):
        pipe(torch.full((64, 64), 6, dtype=torch.uint8))
    assert Image.open("runs/street/street.png").size == (6 * 96, 2 * 96)


def test_a_scene_keeps_its_mask_under_another_look():
    from tutorials.drawn_street import draw_scene

    (image, mask), (other, same) = draw_scene(3), draw_scene(3, look=4)
    assert mask.tobytes() == same.tobytes() and image.tobytes() != other.tobytes()
    assert set(mask.tobytes()) <= set(range(6)) and mask.tobytes() != draw_scene(4)[1].tobytes()


def test_write_a_block(run):
    said = run("write_a_block", "--faces", "16", "--steps", "2")
    assert len(re.findall(r"(?:two-way|sisma)-debug: 0\.\d+ M parameters, loss on unseen faces [01]\.\d+", said)) == 2
    assert ssmgen.build("two-way-mamba", dim=16)(torch.randn(1, 6, 16), (2, 3)).shape == (1, 6, 16)


def test_write_a_solver(run, saved):
    said = run("write_a_solver", "--model", str(saved), "--masks", "1", "--fine", "20")
    orders = {name: float(order) for name, order in re.findall(r"(\w+): order (\d\.\d+)", said)}
    assert orders == pytest.approx({"ralston": 2, "leapfrog": 2}, abs=0.1)
    errors = {name: float(error) for name, error in re.findall(r"(\w+) +24 evaluations: (\d\.\d+) off", said)}
    assert errors["ralston"] < errors["euler"] and set(errors) == {"euler", "heun", "ralston", "leapfrog", "ab3"}
    with pytest.raises(ValueError, match="leapfrog needs a uniform time grid"):
        ssmgen.build("leapfrog").solve(lambda t, x: x, torch.ones(1), torch.tensor([0, 0.1, 1.0]))


def test_write_an_objective(run):
    said = run("write_an_objective", "--faces", "16", "--steps", "2")
    assert re.findall(r"([\w-]+): mean loss", said) == ["flow-matching", "data-prediction", "cosine-v"]


def test_change_resolution(run, saved):
    said = run("change_resolution", "--model", str(saved), "--count", "1", "--sizes", "1")
    assert re.search(r"64 x 64 +0\.\d+ +0\.\d+", said)
    assert Image.open("runs/sizes/64x64.png").size == (2 * 64, 64)
    from tutorials.change_resolution import faces, sample

    pipe = MaskToImage.from_pretrained(saved)
    assert sample(pipe, faces(1, 32, 48)[1]).shape == (1, 3, 32, 48)


def test_fine_tune(run, saved):
    said = run("fine_tune", "--model", str(saved), "--faces", "16", "--steps", "2", "--masks", "1")
    away = {name: float(value) for name, value in re.findall(r"(\w+): (\d\.\d+) away", said)}
    assert away["before"] > 0.01 and away["wanted"] < 0.005
    assert Image.open("runs/sepia/before-after.png").size == (64, 128)
    tuned = MaskToImage.from_pretrained("runs/sepia/model")
    assert tuned.recipe.about.endswith("Fine-tuned on sepia faces for 2 steps.")


def test_fine_tune_with_other_classes(saved):
    from tutorials.fine_tune import with_other_classes

    pipe = MaskToImage.from_pretrained(saved)
    model, old = with_other_classes(pipe, 6), pipe.model.state_dict()
    assert model.num_classes == 6
    changed = {key for key, value in model.state_dict().items() if value.shape != old[key].shape}
    assert changed == {"conditions.mask.encoder.classes.weight"}
    kept = model.state_dict()
    assert all(torch.equal(kept[key], old[key]) for key in old.keys() - changed)
