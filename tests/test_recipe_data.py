"""What a recipe does with prepared folders of many shapes and origins: crops, buckets, and the record of the source."""

import pytest
import torch

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")

from recipes.clothes.presets import PRESETS
from recipes.sisma import train
from recipes.sisma.pairs import (
    EncodedPairs,
    check_pairs,
    encoded_pairs,
    load_autoencoder,
    pairs_to_encode,
    training_pairs,
)
from recipes.sisma.runs import new_model
from ssmgen.data import CELEBAMASK19, LabelSet, mirrored_contrasts
from ssmgen.data.folder import write_pair, write_records


def parsed(words):
    """The settings of a run of the clothes recipe."""
    return train.parse(words, PRESETS)


@pytest.fixture
def shapes(tmp_path):
    """Writes a prepared folder of pictures of these shapes by split."""

    def write(**splits):
        folder, hashes, ids = tmp_path / f"shapes{len(list(tmp_path.iterdir()))}", {}, {}
        folder.mkdir()
        for split, sizes in splits.items():
            ids[split] = [f"{split}{number}" for number in range(len(sizes))]
            for id, size in zip(ids[split], sizes, strict=True):
                image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
                hashes |= write_pair(folder, id, image, (image[0] > 99).to(torch.uint8))
        labels = LabelSet("two", ("background", "a"), ((0, 0, 0), (9, 9, 9)))
        write_records(folder, labels, ids, hashes, {"layout": "folder"})
        return folder

    return write


def test_the_examples_of_each_size_are_announced_and_rare_sizes_warned_of(shapes, tmp_path, capsys):
    data = shapes(train=[(64, 32)] * 5 + [(32, 64)], test=[(64, 32)])
    words = [f"data={data}", f"cache={tmp_path / 'cache'}", "autoencoder=identity", "crops=2", "balance=0"]
    config = parsed([*words, "image_size=64x32,32x64,32x32"])
    pairs = encoded_pairs(config, load_autoencoder(config))
    assert pairs.sizes() == {(64, 32): 10, (32, 64): 2}
    config.train.batch_size = 4
    train._announce(config, torch.nn.Identity(), pairs, 1)
    printed = capsys.readouterr().err
    assert "\nexamples by size: 64x32: 10, 32x64: 2, 32x32: 0\n" in printed
    assert "warning: 32x64: fewer examples than a batch of 4" in printed and "frequent_buckets" in printed
    config.train.batch_size = 2
    train._announce(config, torch.nn.Identity(), pairs, 1)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("image_size", "pictures"),
    [
        ("64", [(100, 100), (64, 64)]),  # squares: of others, crops are resized twice
        ("64x32", [(100, 50), (80, 64)]),
        ("64x32,32x32", [(100, 50), (80, 64)]),
    ],
)
def test_the_first_crop_of_a_picture_is_that_without_crops(shapes, image_size, pictures):
    data = shapes(train=pictures, test=[(64, 32)])
    config = parsed([f"data={data}", f"image_size={image_size}", "crops=2"])
    whole, cropped = training_pairs(config), pairs_to_encode(config)
    assert len(cropped) == 4
    for index, pair in enumerate(whole):
        for one, other in zip(pair, cropped[2 * index], strict=True):
            assert torch.equal(one, other)


def test_sizes_that_do_not_fit_the_test_split_are_rejected_before_training(shapes):
    words = ["image_size=64x32,32x64", "evaluate_masks=3"]
    extreme = shapes(train=[(64, 32)], test=[(64, 32), (64, 32), (32, 200)])
    for more in ([], ["evaluate=false"], ["evaluate=false", "sample_every=3"]):
        with pytest.raises(ValueError, match="1 of 3 images would lose more than half .*test2.png"):
            check_pairs(parsed([f"data={extreme}", *words, *more]))
    check_pairs(parsed([f"data={extreme}", *words, "evaluate=false", "sample_every=0"]))
    apart = shapes(train=[(64, 32)], test=[(64, 32), (32, 64), (64, 32)])
    assert check_pairs(parsed([f"data={apart}", *words])).name == "two"
    few = [f"data={apart}", words[0], "evaluate_masks=2"]
    with pytest.raises(ValueError, match="no two of the first 2 test pairs get the same size of image_size=64x32,32x6"):
        check_pairs(train.parse(few))
    check_pairs(parsed([*few, "evaluate=false"]))
    check_pairs(parsed([f"data={apart}", "image_size=64x32", "evaluate_masks=2"]))


def test_left_and_right_are_contrasted_in_the_loss_on_request(tmp_path):
    words = [
        "quick",
        "drawn_count=4",
        "image_size=64",
        "flip=true",
        f"cache={tmp_path / 'cache'}",
        "autoencoder=identity",
    ]
    plain, config = (train.parse([*words, f"mirrored_weighting={weight}"]) for weight in (0, 0.1))
    autoencoder = load_autoencoder(config)
    without, pairs = encoded_pairs(plain, autoencoder), encoded_pairs(config, autoencoder)
    assert "contrasts" not in without[0, 0]
    for draw in range(4):  # mirrored in some
        example = pairs[0, draw]
        expected = mirrored_contrasts(example["mask"].unsqueeze(0), CELEBAMASK19.mirrored, (64, 64), 0.1)[0]
        assert example["contrasts"].shape == (3, 64, 64) and torch.equal(example["contrasts"], expected)
    model, without_sides = new_model(config, autoencoder), LabelSet("two", ("a", "b"), ((0, 0, 0), (9, 9, 9)))
    config.evaluate = False  # the shipped parser knows faces
    train.check_config(config, model, autoencoder, without_sides)
    config.balance = config.class_weighting = 0.0
    pairs.cache.labels = without_sides
    assert "contrasts" not in EncodedPairs(pairs.cache, config)[0, 0]
    for wrong in (-1, float("nan"), float("inf")):
        config.mirrored_weighting = wrong
        with pytest.raises(ValueError, match=f"mirrored_weighting must be a number from 0 on, got {wrong}"):
            train.check_config(config, model, autoencoder)
