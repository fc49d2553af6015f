"""A plain folder of pairs with your own classes, through the cache into training."""

import pytest
import torch
from PIL import Image

import ssmgen
from ssmgen.data import LabelSet, LatentCache, PairFolder, write_latent_cache, write_png
from ssmgen.training import TrainSettings, train

LABELS = LabelSet("three", ("sea", "sand", "sky"), ((0, 0, 200), (230, 220, 160), (140, 200, 255)))


def photo(seed, height=12, width=12):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def write_pairs(root, count=3, size=12):
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for index in range(count):
        write_png(root / f"images/p{index}.png", photo(index, size, size))
        write_png(root / f"masks/p{index}.png", torch.full((size, size), index % 3, dtype=torch.uint8))
    return root


def test_pairs_are_read_by_name_with_ids_or_colours(tmp_path):
    root = write_pairs(tmp_path / "data")
    write_png(root / "masks/p1.png", LABELS.colorize(torch.ones(12, 12, dtype=torch.uint8)))
    pairs = PairFolder(root, LABELS)
    assert pairs.ids == ["p0", "p1", "p2"] and len(pairs) == 3
    for index in range(3):
        image, mask = pairs[index]
        assert torch.equal(image, photo(index, 12, 12)) and mask.unique().tolist() == [index]
    assert PairFolder(root, LABELS, (4, 8))[0][0].shape == (3, 4, 8)


def test_images_beside_their_masks(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    write_png(tmp_path / "a.png", torch.ones(8, 8, dtype=torch.uint8))
    assert PairFolder(tmp_path, LABELS).ids == ["a"]


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        PairFolder(tmp_path / "absent", LABELS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pairs: expected images/ and masks/"):
        PairFolder(tmp_path / "empty", LABELS)
    root = write_pairs(tmp_path / "data")
    (root / "masks/p2.png").rename(root / "masks/q2.png")
    with pytest.raises(ValueError, match=r"2 file\(s\) have no partner:\n.*p2.png: has no mask[^$]*q2.png: has no"):
        PairFolder(root, LABELS)
    (root / "masks/q2.png").rename(root / "masks/p2.png")
    write_png(root / "masks/p0.png", torch.full((12, 12), 255, dtype=torch.uint8))
    write_png(root / "masks/p1.png", torch.zeros(12, 6, dtype=torch.uint8))
    pairs = PairFolder(root, LABELS)
    with pytest.raises(ValueError, match="p0.png.*255"):
        pairs[0]
    with pytest.raises(ValueError, match="p1.png and .*p1.png: "):
        pairs[1]


def test_the_fingerprint_follows_the_data(tmp_path):
    root = write_pairs(tmp_path / "data")
    first = PairFolder(root, LABELS).fingerprint()
    assert PairFolder(root, LABELS).fingerprint() == first
    assert PairFolder(root, LABELS, 6).fingerprint() != first
    write_png(root / "masks/p0.png", torch.ones(12, 12, dtype=torch.uint8))
    assert PairFolder(root, LABELS).fingerprint() != first


def test_a_fingerprint_with_an_index_is_the_same_and_follows_the_data(tmp_path):
    root, index = write_pairs(tmp_path / "data"), tmp_path / "index.json"
    indexed = PairFolder(root, LABELS, index=index)
    assert indexed.fingerprint() == indexed.fingerprint() == PairFolder(root, LABELS).fingerprint()
    write_png(root / "images/p0.png", photo(8))
    assert indexed.fingerprint() == PairFolder(root, LABELS).fingerprint()


def test_a_folder_goes_through_the_cache_into_training(tmp_path):
    """Into a run folder that is not there yet; the loop's (index, draw) is understood by the cache."""
    pairs, identity = PairFolder(write_pairs(tmp_path / "data"), LABELS), ssmgen.build("identity")
    write_latent_cache(pairs, identity, tmp_path / "cache")
    cache = LatentCache(tmp_path / "cache", LABELS)
    assert torch.equal(cache[1, 7]["data"], cache[1]["data"])
    model = ssmgen.build("sisma-debug", num_classes=3)
    settings = TrainSettings(steps=2, batch_size=3)
    result = train(model, ssmgen.build("flow-matching"), cache, settings, tmp_path / "runs" / "new")
    assert result.step == 2 and (tmp_path / "runs/new/log.jsonl").is_file()
