"""Paired transforms, crops, the interface of all pairs, and weights of rare classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from test_images import label_maps, photo
from test_prepared_folder import make_prepared
from torch import Tensor

from ssmgen import build
from ssmgen.data import Crops, DrawnFaces, LabelSet, PairFolder, Pairs, WithTexts, write_png
from ssmgen.data.balance import class_weights, repeats
from ssmgen.data.folder import PreparedFolder
from ssmgen.data.labels import BISENET19, CELEBAMASK19
from ssmgen.data.transforms import (
    center_crop_resize,
    center_crop_resize_mask,
    check_same_shape,
    crop_resize,
    flip_pair,
)


def test_crop_and_resize_keep_image_and_mask_aligned_across_resolutions() -> None:
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[10:30, 20:40] = 1
    image = (mask * 255).repeat_interleave(2, 0).repeat_interleave(2, 1).expand(3, -1, -1)
    for size in (20, 40, 33, (20, 30), (16, 40)):
        small_image, small_mask = center_crop_resize(image, mask, size)
        assert small_image.shape[-2:] == small_mask.shape == (size if isinstance(size, tuple) else (size, size))
        apart = (small_image[0] > 127) != (small_mask == 1)
        assert int(apart.sum()) <= sum(small_mask.shape), f"only edge pixels may differ at {size}"
        assert set(small_mask.unique().tolist()) <= {0, 1}


def test_no_size_takes_the_largest_square_both_have_pixels_for() -> None:
    image, mask = center_crop_resize(photo(80, 120), torch.zeros(40, 60, dtype=torch.uint8), None)
    assert image.shape == (3, 40, 40) and mask.shape == (40, 40)


def test_a_pair_of_the_right_size_is_untouched() -> None:
    mask = torch.randint(0, 19, (16, 16), dtype=torch.uint8)
    image, same = center_crop_resize(photo(), mask, 16)
    assert torch.equal(image, photo()) and torch.equal(same, mask)


@pytest.mark.parametrize("shape", [(16, 15), (15, 16), (32, 16), (8, 6)])
def test_other_aspect_ratios_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"image is 16 x 16 and mask {shape[0]} x {shape[1]}"):
        check_same_shape(photo(), torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize(("image", "mask"), [((1024, 1024), (512, 512)), ((667, 1000), (341, 512)), ((9, 9), (9, 9))])
def test_another_scale_and_its_rounding_are_accepted(image: tuple[int, int], mask: tuple[int, int]) -> None:
    check_same_shape(torch.empty(3, *image), torch.empty(mask))


class Squares:
    """Three grey pictures with a square that image and mask share, at two resolutions."""

    labels = CELEBAMASK19

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        mask = torch.zeros(60, 60, dtype=torch.uint8)
        mask[20 + index : 40, 15:45] = 1
        return (mask * 255).repeat_interleave(2, 0).repeat_interleave(2, 1).expand(3, -1, -1), mask

    def fingerprint(self) -> str:
        return "squares"


def test_crops_are_the_centre_and_then_parts_cut_alike_from_image_and_mask() -> None:
    crops = Crops(Squares(), 30, 4, smallest=0.7, seed=1)
    assert len(crops) == 12
    areas = []
    for index in range(12):
        image, mask = crops[index]
        assert image.shape == (3, 30, 30) and mask.shape == (30, 30)
        assert int(((image[0] > 127) != (mask == 1)).sum()) <= 60, "only edge pixels may differ"
        assert torch.equal(Crops(Squares(), 30, 4, smallest=0.7, seed=1)[index][0], image)
        areas.append(int(mask.sum()))
    centre = center_crop_resize(*Squares()[0], 30)
    assert torch.equal(crops[0][0], centre[0]) and torch.equal(crops[0][1], centre[1])
    assert len(set(areas[1:4])) > 1 and min(areas[1:4]) >= areas[0]  # parts are enlarged, each by another factor
    assert len({Crops(Squares(), 30, count, 0.7, seed).fingerprint() for count in (1, 2) for seed in (0, 1)}) == 4


def test_impossible_crops_are_refused() -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        Crops(Squares(), 30, 0)
    with pytest.raises(ValueError, match="smallest must be in"):
        Crops(Squares(), 30, 2, smallest=0)
    with pytest.raises(ValueError, match="share must be in"):
        crop_resize(*Squares()[0], 30, share=1.5)
    with pytest.raises(IndexError, match="crop 12 of 12"):
        Crops(Squares(), 30, 4)[12]
    for size in ("whole", None):
        with pytest.raises(ValueError, match=rf"size of crops must be a side, .*, got {size!r}"):
            Crops(Squares(), size, 2)  # type: ignore[arg-type]


def test_crops_of_pairs_with_extras_are_refused_and_extras_of_crops_are_not() -> None:
    class Told(Squares):
        def __getitem__(self, index: int) -> Any:
            return *super().__getitem__(index), {"text": torch.zeros(2, 4)}

    with pytest.raises(ValueError, match=r"pair 1 has the extras text, and Crops cuts only images and masks: add"):
        Crops(Told(), 30, 2)[2]
    texts = WithTexts(Crops(Squares(), 30, 2), ["word"] * 6, build("word-vectors", width=4))
    assert texts[5][0].shape == (3, 30, 30) and texts[5][2]["text"].shape[1] == 4


TWO: dict[str, Any] = {
    "name": "two", "classes": ["a", "b"], "palette": [[0, 0, 0], [255, 0, 9]], "mirrored": [[0, 1]]
}  # fmt: skip


def test_a_label_set_is_read_from_its_record() -> None:
    assert LabelSet.from_stored(TWO) == LabelSet("two", ("a", "b"), ((0, 0, 0), (255, 0, 9)), ((0, 1),))
    for labels in (CELEBAMASK19, BISENET19):
        assert LabelSet.from_stored(json.loads(json.dumps(asdict(labels)))) == labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": "ab"}, "classes, palette and mirrored must be lists"),
        ({"palette": {"a": 1, "b": 2}}, "classes, palette and mirrored must be lists"),
        ({"classes": ["a", 2]}, r"two: classes must be a sequence of names, got \('a', 2\)"),
        ({"classes": ["a", "b", "c"]}, "two: 3 classes but 2 palette colours"),
        *(
            ({"palette": [[0, 0, 0], colour]}, "two: a colour is a triple of integers from 0 to 255")
            for colour in ([999, 0, 0], [0, 0, -1], [0, 0], [0, 0, 0, 0], [0.5, 0, 0], "123")
        ),
        *(
            ({"mirrored": [pair]}, "two: mirrored holds pairs of class ids from 0 to 1, got")
            for pair in ([0, 7], [-1, 0], [0], [0, 1, 1], ["0", "1"])
        ),
        ({"mirrored": [[0, 1], [1, 0]]}, "two: an id is mirrored to one other id; more than once occurs 0"),
        ({"mirrored": [[1, 1]]}, "more than once occurs 1"),
    ],
)
def test_a_record_that_is_no_label_set_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelSet.from_stored(TWO | change)


def test_a_label_set_of_one_word_is_refused() -> None:
    with pytest.raises(ValueError, match="x: classes must be a sequence of names, got 'abc'"):
        LabelSet("x", "abc", ((0, 0, 0),) * 3)  # type: ignore[arg-type]


def test_a_size_below_one_pixel_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        center_crop_resize_mask(torch.zeros(4, 4, dtype=torch.uint8), 0)


@given(mask=label_maps())
@settings(max_examples=25, deadline=None)
def test_flipping_swaps_left_and_right_and_twice_is_nothing(mask: Tensor) -> None:
    image = photo(*mask.shape)
    flipped_image, flipped = flip_pair(image, mask, CELEBAMASK19)
    swapped = {4: 5, 5: 4, 6: 7, 7: 6, 8: 9, 9: 8}
    assert flipped.tolist() == [[swapped.get(value, value) for value in row[::-1]] for row in mask.tolist()]
    assert torch.equal(flipped_image, image.flip(-1))
    assert torch.equal(flip_pair(flipped_image, flipped, CELEBAMASK19)[1], mask)


def pair_folder(root: Path) -> PairFolder:
    for part, pixels in (("images", photo()), ("masks", torch.ones(16, 16, dtype=torch.uint8))):
        (root / part).mkdir()
        write_png(root / part / "x.png", pixels)
    return PairFolder(root, CELEBAMASK19)


PAIRS: dict[str, Callable[[Path], Pairs]] = {
    "drawn": lambda folder: DrawnFaces(2, size=16),
    "prepared": lambda folder: PreparedFolder(make_prepared(folder / "prepared"), "train"),
    "folder": pair_folder,
    "crops": lambda folder: Crops(DrawnFaces(2, size=16), 8, 2),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_data_set_of_pairs_has_one_interface(name: str, tmp_path: Path) -> None:
    pairs = PAIRS[name](tmp_path)
    assert isinstance(pairs.labels, LabelSet) and isinstance(pairs.fingerprint(), str)
    for index in range(len(pairs)):
        image, mask = pairs[index]
        assert image.shape == (3, *mask.shape) and image.dtype == mask.dtype == torch.uint8
    with pytest.raises(IndexError):
        pairs[len(pairs)]


def test_rare_classes_are_repeated_by_the_root_of_their_rarity():
    common, rare = torch.tensor([[0, 1]]), torch.tensor([[0, 2]])
    masks = [rare, *[common] * 24]  # class 2 in 4 % of the masks: sqrt(0.64 / 0.04) = 4 times
    shown = repeats(masks, 0.64)
    assert [pair for pair in shown if pair[0] == 0] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert len(shown) == 28
    assert repeats(masks, 0.0) == [(i, 0) for i in range(25)]
    many = repeats([rare] * 100 + [common] * 900, 0.225, seed=1)  # sqrt(2.25) = 1.5: half of them twice
    assert 35 < len(many) - 1000 < 65
    assert many == repeats([rare] * 100 + [common] * 900, 0.225, seed=1)
    assert {index for index, _ in many} == set(range(1000))
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got 5"):
        repeats(masks, 5)


def test_class_weights_rise_with_rarity_and_average_one_over_the_pixels() -> None:
    mask = torch.zeros(10, 10, dtype=torch.uint8)
    mask[0, :4] = 1
    assert class_weights([mask], 3, 0.0) == [1.0, 1.0, 1.0]
    half = class_weights([mask], 3, 0.5, largest=100)
    assert half[1] / half[0] == pytest.approx((96 / 4) ** 0.5)
    assert 0.96 * half[0] + 0.04 * half[1] == pytest.approx(1)
    assert class_weights([mask], 3, 1.0)[1:] == [10.0, 10.0]  # the cap
    with pytest.raises(ValueError, match="power must be at least 0"):
        class_weights([mask], 3, -1)
