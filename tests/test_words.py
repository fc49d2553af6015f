"""Words of drawn faces: they state what is drawn, and can be asked for one by one."""

import re

import pytest
import torch
from torch import Tensor

from ssmgen.data.drawn_faces import ATTRIBUTES, DrawnFaces, attributes_of, draw_face, sentence, words_of
from ssmgen.data.drawn_faces.canvas import CLASS_ID

COUNT = 200


def faces_with(attribute: str, value: str, most: int = 12) -> list[int]:
    wanted = ATTRIBUTES[attribute].index(value)
    return [i for i in range(600) if attributes_of(i)[attribute] == wanted][:most]


def colour_in(index: int, part: str) -> Tensor:
    image, mask = draw_face(index, size=32)
    return image[:, mask == CLASS_ID[part]].float().mean(dim=1) / 255


def colours_of(attribute: str, value: str, part: str) -> Tensor:
    """Mean colour ``(3,)`` of a part over the faces where it can be seen."""
    found = torch.stack([colour_in(i, part) for i in faces_with(attribute, value)])
    return found[~found.isnan().any(dim=1)].mean(dim=0)


def test_a_face_has_the_same_words_on_every_machine():
    assert words_of(0) == "a face, long ginger hair, bronze skin, red background"
    assert words_of(9) == "a face, long grey hair, tan skin, hat, white background"


def test_glasses_hats_and_baldness_are_those_of_the_mask():
    seen = {"glasses": "eye_g", "hat": "hat"}
    for index in range(COUNT):
        attributes, mask = attributes_of(index), draw_face(index, size=64)[1]
        for attribute, part in seen.items():
            assert (attributes[attribute] > 0) == bool((mask == CLASS_ID[part]).any()), (index, attribute)
        if ATTRIBUTES["length"][attributes["length"]] == "bald":
            assert not (mask == CLASS_ID["hair"]).any() and ATTRIBUTES["hair"][attributes["hair"]] == "none"


def test_colours_are_those_of_the_image():
    black, blond, ginger = (colours_of("hair", name, "hair") for name in ("black", "blond", "ginger"))
    assert black.mean() + 0.25 < blond.mean()
    assert ginger[0] > 1.5 * ginger[2]
    skins = [float(colours_of("skin", name, "skin").mean()) for name in ATTRIBUTES["skin"]]
    assert skins == sorted(skins, reverse=True) and skins[0] > skins[-1] + 0.3
    red, green, blue = (colours_of("background", name, "background") for name in ("red", "green", "blue"))
    assert [int(colour.argmax()) for colour in (red, green, blue)] == [0, 1, 2]


def test_every_value_occurs_and_ids_are_places_in_the_table():
    found = [attributes_of(i) for i in range(600)]
    for name, values in ATTRIBUTES.items():
        assert {attributes[name] for attributes in found} == set(range(len(values))), name


def test_appearance_alters_colours_and_not_what_the_mask_shows():
    first, second = attributes_of(3), attributes_of(3, appearance=4)
    assert all(first[name] == second[name] for name in ("length", "hat", "glasses"))
    assert second["skin"] == attributes_of(4)["skin"] and second["background"] == attributes_of(4)["background"]


def test_a_data_set_tells_words_without_other_images_or_fingerprint():
    faces = DrawnFaces(5, size=32, seed=2, start=10)
    assert faces.words(1) == words_of(11, seed=2) and faces.words(-1) == words_of(14, seed=2)
    assert faces.attributes(1) == attributes_of(11, seed=2)
    assert faces.fingerprint() == "drawn_faces-v1-seed2-start10-count5-size32"
    assert len(faces[0]) == 2
    with pytest.raises(IndexError, match="face 5 of 5"):
        faces.words(5)


def test_a_sentence_states_what_it_is_given():
    assert sentence({"hair": "black", "hat": "cap"}) == "a face, black hair, cap"
    assert sentence({"length": "bald", "hair": "none", "skin": 0}) == "a face, bald, pale skin"
    assert sentence({"glasses": 2, "hat": "none"}) == "a face, sunglasses"
    assert sentence({}) == "a face"
    everything = {name: values[-1] for name, values in ATTRIBUTES.items()}
    assert sentence(everything) == "a face, long dyed hair, dark skin, sunglasses, cap, purple background"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"hiar": "black"}, "no attribute 'hiar'. Did you mean 'hair' or 'hat'?"),
        ({"hair": "blonde"}, "hair has no value 'blonde'. Did you mean 'blond'"),
        ({"hat": 4}, "hat has no value 4"),
        ({"hat": -1}, "hat has no value -1"),
    ],
)
def test_a_sentence_rejects_other_words(asked, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        sentence(asked)
