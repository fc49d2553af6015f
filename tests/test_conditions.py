"""Every registered condition: its null, its dropout, its checks."""

import pytest
import torch
from conftest import OWN

import ssmgen
from ssmgen import build
from ssmgen.nn import Signal
from ssmgen.values import mapped

SIZE, BATCH = (4, 6), 3
MADE = {
    "label-map": (dict(dim=8, num_classes=5, scale=4, patch_size=2), lambda: torch.randint(0, 5, (BATCH, 16, 24))),
    "one-hot-map": (dict(num_classes=5), lambda: torch.randint(0, 5, (BATCH, *SIZE))),
    "style-image": (
        dict(dim=8, in_channels=3, num_classes=5),
        lambda: {"latents": torch.randn(BATCH, 3, 2, 5), "mask": torch.randint(0, 5, (BATCH, 4, 10))},
    ),
    "dense-map": (dict(dim=8, channels=2, scale=4, patch_size=2), lambda: torch.randn(BATCH, 2, 16, 24)),
    "token-sequence": (dict(dim=8, width=5, pooled=True), lambda: torch.randn(BATCH, 1, 5)),
    "class-label": (dict(dim=8, num_labels=4), lambda: torch.tensor([0, 3, 1])),
}


def made(name, **more):
    arguments, value = MADE[name]
    return build(name, **arguments, **more), value()


def fields(signal):
    return [x for x in (signal.tokens, signal.vector) if x is not None]


def test_each_has_a_case():
    assert set(MADE) == {name for name in ssmgen.names("condition") if name in OWN}


@pytest.mark.parametrize("name", MADE)
def test_a_signal_has_what_the_condition_gives(name):
    condition, value = made(name)
    signal = condition(value, SIZE)
    assert isinstance(signal, Signal) and signal.batch == BATCH
    assert condition.gives == tuple(f for f in ("tokens", "vector") if getattr(signal, f) is not None)
    if signal.grid is not None:
        assert signal.tokens.shape[1] == signal.grid[0] * signal.grid[1]
    for i in range(BATCH):  # items do not touch one another
        for whole, alone in zip(
            fields(signal), fields(condition(mapped(lambda each, i=i: each[i : i + 1], value), SIZE)), strict=True
        ):
            torch.testing.assert_close(whole[i : i + 1], alone)


@pytest.mark.parametrize("name", MADE)
def test_the_null_is_what_a_dropped_item_becomes(name):
    condition, value = made(name)
    null, kept = condition(None, SIZE), condition(value, SIZE)
    dropped = condition(value, SIZE, keep=torch.tensor([True, False, True]))
    for nothing, all_of_it, some in zip(fields(null), fields(kept), fields(dropped), strict=True):
        assert nothing.shape[0] == 1
        torch.testing.assert_close(some[1:2], nothing)
        torch.testing.assert_close(some[::2], all_of_it[::2])
        assert not torch.allclose(all_of_it[1:2], nothing)


@pytest.mark.parametrize("name", MADE)
def test_dropout_acts_in_training_only(name):
    condition, value = made(name, dropout=0.5)
    many = mapped(lambda each: each[:1].expand(64, *each.shape[1:]), value)
    nothing, full = (fields(condition.eval()(given, SIZE))[0][:1] for given in (None, many))
    trained = fields(condition.train()(many, SIZE))[0].flatten(1)
    null = (trained == nothing.flatten(1)).all(1) | torch.isclose(trained, nothing.flatten(1), atol=1e-6).all(1)
    assert 15 < null.sum() < 49 and torch.allclose(trained[~null], full.flatten(1), atol=1e-6)
    rarely, value = made(name, dropout=0.1)
    many = fields(rarely.train()(mapped(lambda each: each[:1].expand(600, *each.shape[1:]), value), SIZE))[0].flatten(1)
    nothing = fields(rarely.eval()(None, SIZE))[0]
    dropped = torch.isclose(many, nothing.flatten(1), atol=1e-6).all(1).float().mean()
    assert 0.05 < dropped < 0.16
    with pytest.raises(ValueError, match=r"dropout of a condition must be in \[0, 1\), got 1"):
        made(name, dropout=1)


@pytest.mark.parametrize("name", ["label-map", "one-hot-map", "class-label"])
def test_values_out_of_range_are_named(name):
    condition, value = made(name)
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
