"""Conditions: how bad values are explained. What holds for all is in test_contracts.py."""

import pytest
import torch
from examples import small
from examples import value as value_of

from ssmgen import build
from ssmgen.nn import Signal

SIZE = (4, 6)


@pytest.mark.parametrize("name", ["label-map", "one-hot-map", "class-label"])
def test_values_out_of_range_are_named(name):
    condition = small(name)
    value = value_of(condition, SIZE)
    for bad, kind, message in (
        (torch.where(value == value.flatten()[0], 7, value), ValueError, "label 7 .*is outside"),
        (value.float() if value.dim() == 1 else value.bool(), TypeError, "must be integers"),
        (value[:0], ValueError, "empty|one per image"),
    ):
        with pytest.raises(kind, match=message):
            condition(bad, SIZE)


def test_one_hot_masks_are_checked_in_every_family():
    """A mask of four dimensions went past the checks of a pixel model."""
    x, t = torch.randn(1, 3, 8, 8), torch.rand(1)
    for name in ("sisma-debug", "sdm-debug"):
        model = build(name)
        with pytest.raises(ValueError, match=r"one-hot mask must be \(batch, 19, height, width\).*got \(1, 5, 8, 8\)"):
            model(x, t, torch.zeros(1, 5, 8, 8))
        with pytest.raises(TypeError, match="one-hot mask must be floating point"):
            model(x, t, torch.zeros(1, 19, 8, 8, dtype=torch.long))


def test_a_signal_on_a_coarser_grid_is_its_mean():
    tokens = torch.arange(16.0).view(1, 16, 1)
    coarse = Signal(tokens, (4, 4)).on((2, 2))
    assert coarse.grid == (2, 2) and coarse.tokens.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert Signal(tokens).on((2, 2)).tokens is tokens  # a sequence has no grid


def test_a_latent_pixel_is_told_the_share_of_each_class_under_it():
    condition = build("one-hot-map", num_classes=3, scale=2)
    mask = torch.tensor([[[0, 1, 2, 2], [1, 1, 2, 0]]])
    expected = torch.tensor([[[0.25, 0.75, 0.0], [0.25, 0.0, 0.75]]])
    torch.testing.assert_close(condition(mask, (1, 2)).tokens, expected)
    torch.testing.assert_close(condition(mask).tokens, expected)
    coarse = torch.tensor([[[1, 2]]])  # labels of the latent's own size are repeated
    torch.testing.assert_close(condition(coarse, (1, 2)).tokens, torch.eye(3)[coarse.flatten()][None])
    with pytest.raises(ValueError, match="scale must be positive, got num_classes=3, scale=0"):
        build("one-hot-map", num_classes=3, scale=0)


def test_sdm_takes_latents_with_masks_of_the_images():
    model = build("sdm-debug", in_channels=4, mask_scale=4, num_classes=3).eval()
    assert model.mask_scale == 4
    out = model(torch.randn(2, 4, 4, 6), torch.tensor([0.5]), torch.randint(0, 3, (2, 16, 24)))
    assert out.shape == (2, 4, 4, 6)
    with pytest.raises(ValueError, match="takes a mask of 16 x 24"):
        model(torch.randn(2, 4, 4, 6), torch.tensor([0.5]), torch.randint(0, 3, (2, 8, 24)))
