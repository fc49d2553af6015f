"""A run's pictures stand beside another model's."""

import pytest

pytest.importorskip("accelerate", reason="a run is trained, which needs ssmgen[train]")

from PIL import Image

import ssmgen
from recipes.sisma import compare, train
from recipes.sisma.arguments import UsageError
from ssmgen import MaskToImage
from ssmgen.data import CELEBAMASK19
from ssmgen.pipeline import Recipe

ARGS = {"in_channels": 3, "mask_scale": 1, "patch_size": 4, "dim": 96}


def other(size):
    recipe = Recipe("sisma-debug", ARGS, "identity", size, CELEBAMASK19, {"solver": "euler", "steps": 1})
    return MaskToImage(ssmgen.build("sisma-debug", **ARGS), ssmgen.build("identity"), recipe)


@pytest.fixture
def run(tmp_path):
    words = ["drawn_count=8", "image_size=32", "steps=1", "lr_decay_steps=1", "batch_size=2", "solver_steps=1"]
    words += ["model_args.dim=32", "model_args.depth=1", "tracker=none", "sample_every=0", "evaluate=false"]
    train.main([*words, f"run={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}"])
    return tmp_path / "run"


def test_the_picture_names_both_and_shows_what_each_draws(run, tmp_path, capsys):
    other(32).save_pretrained(tmp_path / "other")
    compare.main([f"run={run}", f"pipe={tmp_path / 'other'}"])
    assert f"picture: {run / 'compare.png'}, this run after 1 steps beside" in capsys.readouterr().out
    sheet = Image.open(run / "compare.png").convert("RGB")
    assert sheet.width == 6 * 36 + 4  # mask, two of each, a real one
    cells = [sheet.crop((4 + 36 * i, 26, 36 + 36 * i, 58)).tobytes() for i in range(6)]
    assert len(set(cells)) == 6


def test_models_of_another_size_are_refused_before_anything_is_written(run, tmp_path):
    other(64).save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="makes images of 64 x 64 pixels .* the run of 32 x 32"):
        compare.main([f"run={run}", f"pipe={tmp_path / 'other'}"])
    assert not (run / "compare.png").exists()
