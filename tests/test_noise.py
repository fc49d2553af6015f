"""Initial noise: each image's depends on its seed alone, and stays what it is."""

import hashlib

import pytest
import torch

import ssmgen
from ssmgen.data import CELEBAMASK19, draw_face
from ssmgen.noise import shared_noise
from ssmgen.training import derived_seed


def test_noise_of_small_seeds_is_what_it_was():
    """Figures and pictures of the docs rest on it; torch's default dtype and device do not matter."""
    expected = {
        0: "a25207107225c7f610397660248fee8c2aac455439e6b113fdf5cfea11eff662",
        7: "df1f2643101fd18998697a13646d2397d4810f69f30336576c8e5b87043472de",
        2**32 - 1: "4181534d1bf44f1d9c94f748867b35360e28963cb58c3d1b5ac5c22c36bb496c",
    }
    try:
        for dtype, device in ((torch.float32, "cpu"), (torch.float64, "meta"), (torch.bfloat16, "cpu")):
            torch.set_default_dtype(dtype)
            torch.set_default_device(device)
            noise = ssmgen.initial_noise([*expected, 2**40], (4, 32, 32))
            assert noise.dtype == torch.float32 and noise.device.type == "cpu"
            found = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in noise]
            assert found[:3] == list(expected.values())
            assert found[3] == "875b1e14f90cd98bb105f84575597a94e03cadee6f62c375338bb177aa7f4922", (
                "noise of a large seed is fixed too"
            )
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_every_bit_of_a_seed_counts():
    seeds = [0, 2**32, 5, *(5 + 2**bit for bit in range(3, 64)), derived_seed(0, "a"), derived_seed(0, "a") ^ 2**62]
    noise = ssmgen.initial_noise(seeds, (3, 64, 64)).flatten(1)
    assert (torch.corrcoef(noise) - torch.eye(len(seeds))).abs().max() < 0.06, "5 of the standard deviations"
    large = noise[-20:].double()
    assert abs(large.mean()) < 0.01 and abs(large.std() - 1) < 0.01 and abs((large**4).mean() - 3) < 0.1
    assert 3.5 < large.abs().max() < 6


def test_noise_that_cannot_be_is_explained():
    for seeds, kind, message in (
        (3, TypeError, "seeds is a list, one for each image"),
        (None, TypeError, "seeds is a list, one for each image"),
        ([], ValueError, "seeds is empty"),
        ([None], TypeError, "a seed is a whole number from 0 to .* got None"),
        ([2**64], ValueError, "a seed is a whole number from 0 to .* got 18446744073709551616"),
    ):
        with pytest.raises(kind, match=message):
            ssmgen.initial_noise(seeds, (3, 4, 4))
    with pytest.raises(TypeError, match="Sampler takes no 'step'. Did you mean 'steps'"):
        ssmgen.sample(ssmgen.build("sisma-debug"), torch.zeros(1), step=3)


def eyes(left=(4, 12, 8, 12), right=(20, 28, 8, 12), side=32):
    """A mask whose classes 1 and 2 are rectangles (x, x, y, y)."""
    mask = torch.zeros(1, side, side, dtype=torch.long)
    for each, (x0, x1, y0, y1) in ((1, left), (2, right)):
        mask[0, y0:y1, x0:x1] = each
    return mask


def test_the_right_side_starts_from_the_noise_of_the_left():
    noise = ssmgen.initial_noise([0, 1], (3, 8, 8))
    found = shared_noise(noise, eyes(), [(1, 2)])
    changed = (found != noise).any(1)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[1:4, 4:8] = True  # the right eye, cells 5 and 6 of row 2, and its neighbours
    assert torch.equal(changed, expected.expand(2, -1, -1))
    assert torch.equal(found[..., 1:4, 4:8], noise[..., 1:4, 0:4])
    assert torch.equal(shared_noise(found, eyes(), [(1, 2)]), found), "twice changes nothing"


def test_shared_noise_is_moved_by_whole_cells_to_the_nearest_place():
    """Never by rounding cell by cell, which would take some of them twice."""
    places = torch.arange(64.0).view(1, 1, 8, 8)
    for offset in range(8):
        found = shared_noise(places, eyes(right=(16 + offset, 24 + offset, 10, 14)), [(1, 2)])
        moves = set((places - found)[found != places].tolist())
        assert len(moves) == 1 and moves <= {8 * rows + round(3 + offset / 4) for rows in (0, 1)}, "half a row"


def test_noise_is_moved_along_both_axes_and_never_into_the_first_class():
    noise = ssmgen.initial_noise([0], (3, 8, 8))
    lower = shared_noise(noise, eyes(right=(20, 28, 16, 20)), [(1, 2)])
    assert torch.equal(lower[..., 4, 5:7], noise[..., 2, 1:3])
    beside = shared_noise(noise, eyes(left=(4, 12, 8, 12), right=(12, 20, 8, 12)), [(1, 2)])
    assert torch.equal(beside[..., 2, 1:3], noise[..., 2, 1:3]) and torch.equal(beside[..., 2, 3:5], noise[..., 2, 1:3])


def test_shared_noise_stays_standard_normal():
    noise = shared_noise(ssmgen.initial_noise(range(4000), (1, 8, 8)), eyes(), [(1, 2)]).flatten(1)
    assert noise.mean(0).abs().max() < 0.08 and (noise.std(0) - 1).abs().max() < 0.06
    related = (torch.corrcoef(noise.T) - torch.eye(64)).abs() > 0.5
    assert related.sum() == 2 * 12, "each of the twelve cells goes with one other"


def test_shared_noise_leaves_what_has_no_other_side():
    noise = ssmgen.initial_noise([0], (3, 8, 8))
    for mask, pairs in (
        (eyes(), []),
        (eyes(), [(3, 4)]),
        (torch.ones(1, 32, 32, dtype=torch.uint8), [(1, 2)]),
        (eyes(right=(20, 22, 8, 10)), [(1, 2)]),  # a quarter of a cell
    ):
        assert torch.equal(shared_noise(noise, mask, pairs), noise)


def test_noise_is_given_once_where_regions_of_faces_meet():
    masks = torch.stack([draw_face(i, 128)[1] for i in range(40)])
    for side in (16, 32):
        cells = torch.arange(1.0, side * side + 1).view(1, 1, side, side).expand(40, -1, -1, -1)
        found = shared_noise(cells, masks, CELEBAMASK19.mirrored)
        assert (found != cells).flatten(1).sum(1).double().mean() > 12
        assert torch.equal(shared_noise(found, masks, CELEBAMASK19.mirrored), found), "twice is once"
        assert max(int(each.unique(return_counts=True)[1].max()) for each in found) == 2
        inside = torch.nn.functional.adaptive_avg_pool2d((masks == 4).float(), (side, side)) > 0.9
        assert torch.equal(found[:, 0][inside], cells[:, 0][inside]), "the first class keeps its noise"


def test_each_mask_has_its_own_sides_and_a_mixed_cell_its_nearer_one():
    noise = ssmgen.initial_noise([0, 1], (3, 8, 8))
    masks = torch.cat([eyes(), eyes(right=(20, 28, 16, 20))])
    found = shared_noise(noise, masks, [(1, 2)])
    for i in range(2):
        assert torch.equal(found[i : i + 1], shared_noise(noise[i : i + 1], masks[i : i + 1], [(1, 2)]))
    masks[:, 4:8, 4:12], masks[:, 4:8, 20:28] = 3, 4  # brows right above the eyes
    both = shared_noise(noise[:1], masks[:1], [(1, 2), (3, 4)])
    assert torch.equal(both, shared_noise(noise[:1], masks[:1], [(3, 4), (1, 2)])), "in any order of the pairs"
    assert torch.equal(both[..., 1:3, 5:7], noise[:1, :, 1:3, 1:3])


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(1, 8, 8), r"integer labels \(batch, H, W\), got torch.float32 \(1, 8, 8\)"),
        (torch.zeros(8, 8, dtype=torch.long), r"got torch.int64 \(8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.long), "got 3 masks for the noise of 2"),
    ],
)
def test_shared_noise_names_what_is_wrong(masks, message):
    with pytest.raises(ValueError, match=message):
        shared_noise(torch.zeros(2, 1, 4, 4), masks, [(1, 2)])


@pytest.mark.parametrize("pairs", [[(1, 2, 3)], [("a", "b")], (1, 2), [(True, False)]])
def test_shared_noise_wants_pairs_of_classes(pairs):
    with pytest.raises(ValueError, match="pairs of class ids, such as"):
        shared_noise(torch.zeros(2, 1, 4, 4), torch.zeros(1, 8, 8, dtype=torch.long), pairs)
    with pytest.raises(ValueError, match=r"noise must be \(batch, channels, h, w\), got \(1, 4, 4\)"):
        shared_noise(torch.zeros(1, 4, 4), torch.zeros(1, 8, 8, dtype=torch.long), [(1, 2)])
