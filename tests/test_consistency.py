"""Figures that say whether the parts of a face go together."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")

from recipes.sisma import evaluate
from recipes.sisma.evaluation.consistency import consistency, iris_colour, shows_faces
from recipes.sisma.evaluation.results import summary
from recipes.sisma.evaluation.settings import Settings
from recipes.sisma.pairs import load_autoencoder
from recipes.sisma.presets import quick
from ssmgen.data import CELEBAMASK19
from ssmgen.data.drawn_faces import portrait
from ssmgen.pipeline.mask_to_image import to_output

L_EYE, R_EYE, L_BROW, HAIR = (CELEBAMASK19.classes.index(name) for name in ("l_eye", "r_eye", "l_brow", "hair"))


@pytest.fixture(scope="module")
def drawn():
    """Faces, the same with the left iris of another one, and their masks."""
    with pytest.MonkeyPatch.context() as patch:
        return faces_and_others(patch, range(50_000, 50_024))


def faces_and_others(patch, indices):
    usual, matched, mixed, masks = portrait.random_appearance, [], [], []
    for index in indices:
        image, mask = portrait.draw_face(index)
        iris = usual(0, index + 1000).iris
        patch.setattr(portrait, "random_appearance", lambda *key, iris=iris: replace(usual(*key), iris=iris))
        other, _ = portrait.draw_face(index)
        patch.setattr(portrait, "random_appearance", usual)
        masks.append(mask)
        matched.append(image)
        mixed.append(torch.where(mask == L_EYE, other, image))
    return torch.stack(matched), torch.stack(mixed), torch.stack(masks)


def found(images, masks, **sets):
    return consistency({"generated": images, "real": images, **sets}, masks, CELEBAMASK19, {})["generated"]


def test_irises_of_two_colours_are_told_from_those_of_one(drawn):
    matched, mixed, masks = drawn
    one, two = found(matched, masks), found(mixed, masks)
    assert two["iris_distance"] > 2.5 * one["iris_distance"]
    assert {key: two[key] for key in two if key != "iris_distance"} == {
        key: one[key] for key in one if key != "iris_distance"
    }


@torch.no_grad()
def test_they_are_told_after_the_autoencoder_too(drawn):
    network = load_autoencoder(quick())
    after = [
        to_output((network.decode(network.encode(images.float() / 127.5 - 1)) / 2 + 0.5).clamp(0, 1), "uint8")
        for images in (drawn[0][:12], drawn[1][:12])
    ]
    one, two = (found(images, drawn[2][:12])["iris_distance"] for images in after)
    assert two > 2 * one


def test_an_iris_is_what_is_darker_than_the_white_of_the_eye():
    image, eye = torch.full((3, 4, 6), 240, dtype=torch.uint8), torch.zeros(4, 6, dtype=torch.bool)
    eye[1:3] = True
    image[:, 1:3, 2:4] = torch.tensor([40, 80, 160], dtype=torch.uint8)[:, None, None]
    torch.testing.assert_close(iris_colour(image, eye) * 255, torch.tensor([40.0, 80, 160]), rtol=0.01, atol=0.1)


def test_brows_and_hair_have_their_own_figures(drawn):
    matched, _, masks = drawn
    usual = found(matched, masks)
    lighter = torch.where((masks == L_BROW)[:, None], 200, matched).to(torch.uint8)
    assert found(lighter, masks)["brow_distance"] > 3 * usual["brow_distance"]
    spotted = matched.clone()
    spotted[:, 0, ::4] = 255
    spotted = torch.where((masks == HAIR)[:, None], spotted, matched)
    assert found(spotted, masks)["hair_chroma_variance"] > 3 * usual["hair_chroma_variance"]


def test_both_eyes_are_there_if_the_parser_finds_half_of_each(drawn):
    matched, _, masks = drawn
    lost = masks.clone()
    lost[:6][lost[:6] == R_EYE] = 1
    most = masks.clone()
    most[:, :, ::3] = torch.where(most[:, :, ::3] == L_EYE, 1, most[:, :, ::3])  # a third of it is lost
    sets = {"generated": matched, "real": matched, "autoencoder": matched}
    result = consistency(sets, masks, CELEBAMASK19, {"generated": lost, "real": most, "autoencoder": masks})
    having = result["n"]["both_eyes"]
    without = sum(float((masks[i] == R_EYE).sum() >= 16 and (masks[i] == L_EYE).sum() >= 16) for i in range(6))
    assert result["generated"]["both_eyes"] == pytest.approx(1 - without / having) and without > 3
    assert result["real"]["both_eyes"] == 1 and result["autoencoder"]["both_eyes"] == 1
    assert result["ratio"]["both_eyes"] == result["generated"]["both_eyes"] and "reference=autoencoder" in str(result)


def test_parts_that_a_mask_does_not_have_are_left_out(drawn):
    matched, _, masks = drawn
    hidden = torch.where((masks == R_EYE) | (masks == HAIR), 1, masks)
    result = consistency({"generated": matched, "real": matched}, list(hidden), CELEBAMASK19, {"generated": hidden})
    assert set(result["generated"]) == {"brow_distance"} == set(result["ratio"]) == set(result["n"])
    assert not shows_faces(replace(CELEBAMASK19, classes=tuple(f"{i}" for i in range(19))))


def test_an_evaluation_reports_them(trained):
    result = evaluate.evaluate_run(trained, Settings(), command="test")
    stored = json.loads((trained / "result.json").read_text())["consistency"]
    assert stored == result["consistency"] and stored["ratio"]["iris_distance"] > 0
    assert set(stored) == {"generated", "real", "autoencoder", "ratio", "n", "protocol"}
    assert 0 <= stored["generated"]["both_eyes"] <= stored["real"]["both_eyes"] <= 1
    line = f"iris distance {stored['generated']['iris_distance']:.3f} ({stored['autoencoder']['iris_distance']:.3f})"
    assert "of the real images after the autoencoder" in summary(result) and line in summary(result)
    assert "<td>iris distance" in (trained / "report.html").read_text()
    assert "consistency" not in summary({key: result[key] for key in result if key != "consistency"})
