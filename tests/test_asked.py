"""The measurement of what images were asked for: colours of regions, and words."""

import json

import pytest
import torch

pytest.importorskip("accelerate", reason="the measurement trains and samples, which needs ssmgen[train]")

from recipe_runs import words

from benchmarks.fidelity import asked, asked_report, attributes, regions
from recipes.sisma import train
from recipes.sisma.arguments import UsageError
from ssmgen.data.drawn_faces import ATTRIBUTES, attributes_of, draw_face

COLOURS = torch.tensor([[0.1, 0.2, 0.3], [0.9, 0.1, 0.1], [0.4, 0.4, 0.4], [0.0, 0.8, 0.2]])


def painted(colours, size=16):
    """Images of two classes, side by side: class 0 of the given colours, class 1 grey, and one pixel of class 2."""
    mask = torch.zeros(len(colours), size, size, dtype=torch.uint8)
    mask[:, :, size // 2 :] = 1
    mask[:, 0, 0] = 2
    images = torch.full((len(colours), 3, size, size), 0.5)
    images[:, :, :, : size // 2] = colours[:, :, None, None]
    return (images * 255).round().to(torch.uint8), mask


def test_a_region_has_the_mean_colour_of_its_pixels():
    images, masks = painted(COLOURS, 32)
    found = regions.region_colours(images, masks, 4)
    torch.testing.assert_close(found[:, 0], COLOURS, atol=1 / 255, rtol=0)
    assert found[:, 1].allclose(torch.tensor(0.5), atol=1 / 255)
    assert found[:, 2:].isnan().all()  # too small, and absent
    half = images.clone()
    half[:, :, 16:, :16] = 0
    torch.testing.assert_close(
        regions.region_colours(half, masks, 4)[:, 0], COLOURS * (15 * 16 + 15) / (31 * 16 + 15), atol=0.02, rtol=0
    )


def test_agreement_is_1_for_the_asked_colours_and_a_half_by_chance():
    pool = torch.rand(400, 1, 3, generator=torch.Generator().manual_seed(0))
    perfect = regions.colour_agreement(pool, pool, pool, ["a"])
    assert perfect["agreement"] == pytest.approx(399 / 400) and perfect["distance"] == 0
    chance = regions.colour_agreement(pool.roll(1, 0), pool, pool, ["a"])
    assert chance["agreement"] == pytest.approx(0.5, abs=0.05) and chance["distance"] > 0.4
    near = regions.colour_agreement(pool + 0.05, pool, pool, ["a"])
    assert chance["agreement"] < near["agreement"] < perfect["agreement"]


def test_only_regions_in_both_count_and_classes_count_alike():
    nothing = torch.full((4, 1, 3), float("nan"))
    pool = torch.cat([COLOURS.unsqueeze(1), COLOURS.flip(0).unsqueeze(1), nothing], dim=1)
    found = pool.clone()
    found[1:, 1] = float("nan")  # one region of class b, and it is wrong
    found[0, 1] = pool[1, 1]
    result = regions.colour_agreement(found, pool, pool, ["a", "b", "c"])
    assert set(result["by_class"]) == {"a", "b"} and result["by_class"]["b"]["n"] == 1
    expected = (result["by_class"]["a"]["agreement"] + result["by_class"]["b"]["agreement"]) / 2
    assert result["agreement"] == pytest.approx(expected) and result["by_class"]["a"]["agreement"] == 0.75
    with pytest.raises(ValueError, match="no region is in an image and in the picture"):
        regions.colour_agreement(nothing, pool[:, :1], pool[:, :1], ["a"])


def test_a_style_picture_shares_rare_classes_and_serves_once():
    hat, face = torch.full((16, 16), 14), torch.ones(16, 16, dtype=torch.long)
    targets, styles = torch.stack([face, hat, face, hat]), torch.stack([hat, face, face, hat])
    order = asked.matched(targets, styles)
    assert sorted(order) == [0, 1, 2, 3] and {order[1], order[3]} == {0, 3}


def test_words_agree_by_attribute_and_the_mean_is_over_those_a_mask_leaves_open():
    true = attributes.true_attributes([(0, 0), (1, 5), (2, 9)])
    for name in ATTRIBUTES:
        assert true[name][1] == attributes_of(1, appearance=5)[name]
    wrong = {name: ids.clone() for name, ids in true.items()}
    wrong["hair"][0] = (wrong["hair"][0] + 1) % len(ATTRIBUTES["hair"])
    wrong["hat"][:] = 9
    found = attributes.word_agreement(wrong, true)
    assert found["by_attribute"]["hair"] == pytest.approx(2 / 3) and found["by_attribute"]["hat"] == 0
    assert found["agreement"] == pytest.approx((2 / 3 + 1 + 1) / 3)


def test_a_classifier_is_trained_once(tmp_path, monkeypatch):
    file = tmp_path / "attributes.safetensors"
    trained = attributes.trained_classifier(file, faces=6, steps=30)
    images = torch.stack([draw_face(i, 64)[0] for i in range(6)])
    found = attributes.word_agreement(trained.classify(images), attributes.true_attributes([(i, i) for i in range(6)]))
    assert found["agreement"] > 0.6  # of faces it has seen
    monkeypatch.setattr(attributes, "_train", lambda *_: pytest.fail("it was trained before"))
    again = attributes.trained_classifier(file, faces=6, steps=30)
    assert torch.equal(again.classify(images)["hair"], trained.classify(images)["hair"])
    with pytest.raises(ValueError, match="was trained with other settings"):
        attributes.trained_classifier(file, faces=7, steps=30)


def test_a_run_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(asked, "RESULTS", tmp_path / "results")
    small = attributes.trained_classifier(tmp_path / "c.safetensors", faces=4, steps=2)
    monkeypatch.setattr(asked, "trained_classifier", lambda file: small)
    more = ("balance=0", "drawn_count=8", "evaluate=false", "steps=2", "model_args.mask_dropout=0.1")
    train.main(["quick", *words(tmp_path, *more, "style=true", "words=true")])
    run = tmp_path / "run"
    guided = ("guidance_scale.style=1.5", "guidance_start.words=0.1")
    asked.main([f"run={run}", f"plain={run}", "masks=4", *guided, "name=small"])
    result = json.loads((tmp_path / "results/fidelity/asked/small.json").read_text())
    assert result["guidance_scale"] == {"mask": 2.0, "style": 1.5, "words": 2.0} and result["commit"]
    assert result["guidance_start"] == {"mask": 0.2, "words": 0.1} and result["steps"] == 2
    for kind in ("style", "words"):
        figures = result[kind]
        low, high, found = (figures[key]["agreement"] for key in ("floor", "ceiling", "found"))
        way = pytest.approx((found - low) / (high - low)) if high > low else None
        assert figures["floor_to_ceiling"] == way
        assert figures["without"]["agreement"] <= 1
        assert (run / f"asked/{kind}.png").is_file()
    assert result["mask"]["neither"] == result["mask"]["plain"]
    assert result["mask"]["style"] != result["mask"]["neither"] and result["mask"]["ceiling"] > 0.1
    section = asked_report.section(tmp_path / "results/fidelity/asked")
    assert f"| style | {result['style']['found']['agreement']:.3f} |" in section and "| hair |" in section
    assert asked_report.section(tmp_path) == ""
    assert "small.json: style" in capsys.readouterr().err
    with pytest.raises(UsageError, match="neither style=true nor words=true"):
        train.main(["quick", *words(tmp_path / "plain", *more)])
        asked.main([f"run={tmp_path / 'plain/run'}", "masks=2"])
