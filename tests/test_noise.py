"""Initial noise: each image's depends on its seed alone, and stays what it is."""

import hashlib

import pytest
import torch

import ssmgen
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
