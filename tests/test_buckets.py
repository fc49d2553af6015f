"""Images of many shapes: buckets of aspect ratios, folders and crops in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssmgen import build
from ssmgen.atomic import whole_folder
from ssmgen.data import (
    Crops,
    LabelSet,
    LatentCache,
    PairFolder,
    PreparedFolder,
    aspect_buckets,
    check_buckets,
    frequent_buckets,
    loss_weights,
    write_latent_cache,
    write_png,
)
from ssmgen.data.buckets import kept_share, nearest_bucket, parse_size
from ssmgen.data.folder import write_pair, write_records

LABELS = LabelSet("toy", ("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)))
BUCKETS = [(16, 16), (24, 8), (8, 24)]
SHAPES = [(40, 40), (62, 20), (20, 54), (33, 40), (48, 16)]  # (height, width) of the images
EXPECTED = [0, 1, 2, 0, 1]


def pair(shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Left half black and of class 0, right half white and of class 1."""
    mask = torch.zeros(shape, dtype=torch.uint8)
    mask[:, shape[1] // 2 :] = 1
    return (mask * 255).expand(3, -1, -1).contiguous(), mask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("images", "masks"):
        (tmp_path / "pairs" / part).mkdir(parents=True)
    for number, shape in enumerate(SHAPES):
        image, mask = pair(shape)
        write_png(tmp_path / "pairs" / "images" / f"{number}.png", image)
        write_png(tmp_path / "pairs" / "masks" / f"{number}.png", mask)
    return tmp_path / "pairs"


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    with whole_folder(tmp_path / "prepared") as root:
        hashes: dict[str, str] = {}
        for number, shape in enumerate(SHAPES):
            hashes |= write_pair(root, str(number), *pair(shape))
        write_records(root, LABELS, {"train": [str(number) for number in range(len(SHAPES))]}, hashes, {})
    return tmp_path / "prepared"


@settings(max_examples=100, deadline=None)
@given(
    side=st.integers(32, 600),
    multiple=st.sampled_from([1, 7, 8, 16, 32]),
    lowest=st.floats(0.2, 1.0),
    widen=st.floats(1.0, 9.0),
)
def test_generated_buckets_are_full_multiples_in_the_range(
    side: int, multiple: int, lowest: float, widen: float
) -> None:
    pixels, highest = side * side, lowest * widen
    try:
        buckets = aspect_buckets(pixels, multiple, lowest, highest)
    except ValueError as error:
        assert "no size has at most" in str(error)
        return
    aspects = [height / width for height, width in buckets]
    assert aspects == sorted(set(aspects)) and lowest <= aspects[0] and aspects[-1] <= highest
    check_buckets(buckets, multiple)
    for height, width in buckets:
        assert height * width <= pixels
        assert (height + multiple) * (width + multiple) > pixels, "no larger size has about this shape"


def test_generated_buckets_of_a_known_case() -> None:
    assert aspect_buckets(256 * 256, 64) == [(192, 320), (256, 256), (320, 192)]
    assert aspect_buckets(64 * 64, 16, 1.5, 4.0) == [(80, 48), (96, 32), (112, 32), (128, 32)]
    assert (512, 512) in aspect_buckets(512 * 512, 8)
    with pytest.raises(ValueError, match="no size has at most 100 pixels, sides that are multiples of 16"):
        aspect_buckets(100, 16)
    for arguments in ((100, 0, 1, 2), (100, 1, 0, 2), (100, 1, 2, 1)):
        with pytest.raises(ValueError, match="multiple must be at least 1 and 0 < lowest <= highest"):
            aspect_buckets(*arguments)


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ([], "the list of buckets is empty"),
        ([(16, 16), (16, 0)], r"a bucket is a pair \(height, width\) of pixels, got \(16, 0\)"),
        ([(16.0, 16)], "a bucket is a pair"),
        ([(16, 16), (24, 12), (20, 16)], "must be multiples of 8, got 24 x 12, 20 x 16"),
        ([(16, 16), (24, 8), (16, 16)], "twice is 16 x 16"),
    ],
)
def test_buckets_that_no_model_takes_are_refused(buckets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_buckets(buckets, 8)


def test_sizes_are_read_from_lists_as_well() -> None:
    assert parse_size([16, 8]) == (16, 8) and parse_size([[16, 8], (8, 8)]) == [(16, 8), (8, 8)]  # type: ignore[list-item]
    assert parse_size(16) == 16 and parse_size(None) is None and parse_size("whole") == "whole"
    for wrong in ("large", 1.5, [1, 2, 3], [(1, 2, 3)], [(1, 2), 3]):
        with pytest.raises(ValueError, match="size must be a side"):
            parse_size(wrong)  # type: ignore[arg-type]
    for small in (0, -3, (0, 5), [5, -1]):
        with pytest.raises(ValueError, match="size must be at least 1 pixel"):
            parse_size(small)


def test_the_nearest_bucket_is_that_which_keeps_most() -> None:
    assert [nearest_bucket(shape, BUCKETS) for shape in SHAPES] == EXPECTED
    assert kept_share((60, 20), (24, 8)) == 1.0 and kept_share((40, 20), (16, 16)) == 0.5
    assert nearest_bucket((10, 10), [(8, 16), (16, 8)]) == 0, "the first of equals"


def test_rare_buckets_are_left_out_one_by_one(folder: Path) -> None:
    masks = PairFolder(folder, LABELS, "whole").mask_files()  # two square ones, two tall ones, one wide one
    assert frequent_buckets(masks, BUCKETS, 1) == BUCKETS
    assert frequent_buckets(masks, BUCKETS, 2) == BUCKETS[:2]
    assert frequent_buckets(masks, [(24, 8), (26, 8), (16, 16)], 2) == [(24, 8), (16, 16)], (
        "its image goes to a near one"
    )
    assert frequent_buckets(masks, BUCKETS, 5) in ([bucket] for bucket in BUCKETS)
    with pytest.raises(ValueError, match="no bucket can have 6 images: there are 5"):
        frequent_buckets(masks, BUCKETS, 6)


@pytest.mark.parametrize("size", [0, -3, (0, 5)])
def test_folders_and_crops_of_no_pixels_do_not_open(folder: Path, prepared: Path, size: Any) -> None:
    whole = PairFolder(folder, LABELS, "whole")
    for opened in (
        lambda: PairFolder(folder, LABELS, size), lambda: PreparedFolder(prepared, "train", size),
        lambda: Crops(whole, size, 2),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="size must be at least 1 pixel"):
            opened()


@pytest.mark.parametrize("base", [PairFolder, PreparedFolder])
def test_a_subclass_groups_pairs_its_own_way(folder: Path, prepared: Path, base: Any) -> None:
    class Own(base):
        def bucket_of(self, index: int) -> int:
            return 10 + super().bucket_of(index)

    pairs = Own(folder, LABELS, BUCKETS) if base is PairFolder else Own(prepared, "train", BUCKETS)
    assert [pairs.bucket_of(index) for index in range(5)] == [10 + bucket for bucket in EXPECTED]


@pytest.mark.parametrize("kind", ["plain", "prepared"])
def test_a_folder_in_buckets_scales_every_pair_to_its_own(folder: Path, prepared: Path, kind: str) -> None:
    def opened(size: Any) -> Any:
        return PairFolder(folder, LABELS, size) if kind == "plain" else PreparedFolder(prepared, "train", size)

    pairs = opened(BUCKETS)
    assert [pairs.bucket_of(index) for index in range(len(pairs))] == EXPECTED
    for index, bucket in enumerate(EXPECTED):
        image, mask = pairs[index]
        assert image.shape == (3, *BUCKETS[bucket]) and mask.shape == BUCKETS[bucket]
        half = mask.shape[1] // 2
        assert not mask[:, :half].any() and bool((mask[:, half:] == 1).all()), "cropped centrally"
        assert image[0, :, : half - 2].max() < 60 and image[0, :, half + 2 :].min() > 195, "image and mask agree"
    again, other, one = opened([list(bucket) for bucket in BUCKETS]), opened(BUCKETS[:2] + [(8, 32)]), opened((24, 8))
    assert pairs.fingerprint() == again.fingerprint() != other.fingerprint()
    assert one[0][0].shape == (3, 24, 8) and {one.bucket_of(index) for index in range(5)} == {0}
    whole = opened("whole")
    assert [whole[index][1].shape for index in range(5)] == SHAPES


def test_images_far_from_every_bucket_are_counted_and_the_largest_crop_named(folder: Path) -> None:
    message = r"3 of 5 images would lose more than half to every bucket; .*masks/1.png of 62 x 20 .* 32 % in 16 x 16"
    with pytest.raises(ValueError, match=message):
        PairFolder(folder, LABELS, [(16, 16)])
    with pytest.raises(ValueError, match="twice is 16 x 16"):
        PairFolder(folder, LABELS, [(16, 16), (16, 16)])
    (folder / "masks" / "3.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"masks/3.png: is not a readable PNG file"):
        PairFolder(folder, LABELS, BUCKETS)


def test_crops_are_rectangles_or_in_buckets(folder: Path) -> None:
    squares, whole = PairFolder(folder, LABELS), PairFolder(folder, LABELS, "whole")
    for index in range(15):
        image, mask = Crops(whole, (8, 16), 3)[index]
        assert image.shape == (3, 8, 16) and mask.shape == (8, 16)
    crops = Crops(whole, BUCKETS, 3)
    groups = [crops.bucket_of(index) for index in range(15)]
    assert groups == [bucket for bucket in EXPECTED for _ in range(3)]
    assert [crops[index][1].shape for index in range(15)] == [BUCKETS[group] for group in groups]
    assert torch.equal(crops[3][1], PairFolder(folder, LABELS, BUCKETS)[1][1]), "the first crop is the centre"
    with pytest.raises(ValueError, match='cut from a PairFolder or PreparedFolder of size="whole"'):
        Crops(squares, BUCKETS, 3)


def test_a_folder_in_buckets_is_cached_and_weighted(folder: Path, tmp_path: Path) -> None:
    pairs = PairFolder(folder, LABELS, BUCKETS)
    write_latent_cache(pairs, build("identity"), tmp_path / "cache", batch_size=2)
    cache = LatentCache(tmp_path / "cache", LABELS)
    record = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert [entry["examples"] for entry in record["shards"]] == ["0 3", "1 4", "2"]
    for index in range(5):
        example = cache[index]
        assert torch.equal(example["mask"], pairs[index][1])
        weight = loss_weights(example["mask"].unsqueeze(0), (1.0, 2.0, 3.0), example["data"].shape[-2:])
        assert torch.equal(weight[0, 0], 1.0 + example["mask"])
