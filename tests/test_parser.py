"""The networks that are trained for the recipe: parser and autoencoder."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")


from recipes.sisma import parser
from recipes.sisma.pairs import HELD_OUT
from ssmgen.data.drawn_faces import DrawnFaces
from ssmgen.weights import write_weights

ROOT = Path(__file__).parents[1]


def test_the_shipped_parser_finds_every_class_on_unseen_faces():
    network, card = parser.load_parser(parser.SHIPPED)
    faces = DrawnFaces(96, size=128, start=HELD_OUT + 5000)
    score = parser.evaluate_parser(network, faces)
    assert score["miou"] >= 0.80 and min(score["iou"].values()) > 0.05 and len(score["iou"]) == 19
    assert card["held_out"]["miou"] >= 0.85 and min(card["held_out"]["iou"].values()) > 0.2
    assert abs(score["miou"] - card["held_out"]["miou"]) < 0.06


def test_shipped_assets_are_small_and_carry_their_command():
    for file in (ROOT / "recipes" / "sisma" / "assets").rglob("*.safetensors"):
        assert file.stat().st_size <= 1_500_000, file
    card = json.loads((ROOT / "recipes" / "sisma" / "assets" / "drawn-autoencoder" / "card.json").read_text())
    assert card["command"].startswith("python -m recipes.sisma.autoencoder")
    assert parser.load_parser(parser.SHIPPED)[1]["command"].startswith("python -m recipes.sisma.parser")


def test_train_parser_on_drawn_faces(tmp_path, capsys):
    out = tmp_path / "parser.safetensors"
    parser.main([f"out={out}", "steps=2", "batch_size=2", "image_size=32", "width=8", "held_out=4", "faces=8"])
    _, card = parser.load_parser(out)
    assert card["width"] == 8 and "miou" in card["held_out"] and card["precision"] in ("no", "bf16")
    assert f"precision {card['precision']}" in capsys.readouterr().err
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="broken.safetensors: is no safetensors file"):
        parser.load_parser(tmp_path / "broken.safetensors")
    write_weights(tmp_path / "other.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="other.safetensors: is not a parser"):
        parser.load_parser(tmp_path / "other.safetensors")
    write_weights(tmp_path / "cut.safetensors", {"a": torch.zeros(1)}, {"card": json.dumps(card)})
    with pytest.raises(ValueError, match="cut.safetensors: .* do not fit"):
        parser.load_parser(tmp_path / "cut.safetensors")


def test_a_training_whose_loss_is_no_number_saves_nothing(tmp_path):
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan; lower lr"):
        parser.main(
            [f"out={tmp_path / 'p.safetensors'}", "steps=3", "lr=1e30", "batch_size=2", "image_size=32", "width=8"]
            + ["held_out=4", "faces=8"]
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "message"),
    [("image_size=40", "must be a multiple of 16, got 40"), ("steps=0", "must be at least 1"), ("data=no", "no such")]
    + [("precision=fp16", "precision must be 'auto', 'no' .float32. or 'bf16', got 'fp16'")],
)
def test_a_parser_that_cannot_be_trained_is_refused_before_training(tmp_path, word, message):
    with pytest.raises((ValueError, OSError), match=message):
        parser.main([f"out={tmp_path / 'new' / 'parser.safetensors'}", "held_out=1", word])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("factor", [4, 8])
def test_train_autoencoder_on_drawn_faces(tmp_path, factor):
    from recipes.sisma import autoencoder
    from ssmgen import build

    autoencoder.main(
        [f"out={tmp_path / 'ae'}", "steps=2", "batch_size=2", "image_size=32", "width=8", "held_out=16", "faces=8"]
        + [f"factor={factor}"]
    )
    assert build("autoencoder-tiny", source=str(tmp_path / "ae")).factor == factor
    assert json.loads((tmp_path / "ae" / "card.json").read_text())["precision"] in ("no", "bf16")


@pytest.mark.parametrize("began", ["no", "bf16"])
def test_an_autoencoder_goes_on_in_the_precision_it_began_with(tmp_path, began):
    from recipes.sisma import autoencoder

    settings = autoencoder.Settings(out=str(tmp_path / "ae"), precision=began)
    network = torch.nn.Linear(1, 1)
    autoencoder._checkpoint(network, torch.optim.AdamW(network.parameters()), settings, 1000)
    asked = dataclasses.replace(settings, precision="auto")
    assert autoencoder._precision(asked) == (began, "as step-00001000 was made")
    assert autoencoder._precision(dataclasses.replace(settings, precision="no")) == ("no", "as asked")
