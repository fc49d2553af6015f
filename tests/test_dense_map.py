"""The condition dense-map: maps of numbers on the image's grid."""

import math

import pytest
import torch

import ssmgen
from ssmgen import build

SMALL = {"depth": 2, "dim": 32, "num_classes": 5, "scale": 2}
SIZE = (4, 6)
KINDS = {
    "mask": "label-map",
    "sketch": {"name": "dense-map", "channels": 2, "dropout": 0.1},
}


def made(**more):
    torch.manual_seed(0)
    return build("dense-map", dim=8, channels=2, scale=4, patch_size=2, **more)


def maps(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def model():
    torch.manual_seed(0)
    made = build("sisma-debug", conditions=KINDS, cross={"mask": "cross-mamba", "sketch": "cross-mamba"}, **SMALL)
    for parameter in made.parameters():  # a new model predicts zero whatever it is told
        torch.nn.init.normal_(parameter, std=0.1) if parameter.dim() > 1 and not parameter.any() else None
    return made.eval()


def test_a_token_is_a_patch_of_the_map():
    condition, given = made(), maps(3, 2, 16, 24)
    signal = condition(given, SIZE)
    assert signal.tokens.shape == (3, 6, 8) and signal.grid == (2, 3)
    changed = given.clone()
    changed[:, :, :8, 8:16] += 1  # the second patch
    moved = (condition(changed, SIZE).tokens - signal.tokens).abs().amax(dim=2) > 1e-6
    assert moved.tolist() == [[False, True, False, False, False, False]] * 3


def test_a_map_of_the_latents_size_is_repeated():
    condition, given = made(), maps(2, 2, *SIZE)
    large = given.repeat_interleave(4, dim=-2).repeat_interleave(4, dim=-1)
    torch.testing.assert_close(condition(given, SIZE).tokens, condition(large, SIZE).tokens)


def test_the_null_is_not_a_map_of_zeros_and_is_learned():
    condition = made()
    null = condition(None, SIZE).tokens
    assert not torch.allclose(null, condition(torch.zeros(1, 2, 16, 24), SIZE).tokens)
    null.sum().backward()
    assert condition.nothing.grad is not None and bool((condition.nothing.grad != 0).all())


def test_dropout_makes_items_the_null_in_training_only():
    condition, given = made(dropout=0.5), maps(1, 2, 16, 24).expand(64, 2, 16, 24)
    null, full = condition(None, SIZE).tokens, condition.eval()(given, SIZE).tokens
    torch.testing.assert_close(full, full[:1].expand_as(full))
    dropped = torch.isclose(condition.train()(given, SIZE).tokens, null).all(dim=2).all(dim=1)
    assert 15 < int(dropped.sum()) < 49


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (torch.zeros(1, 3, 16, 24), ValueError, r"must be \(batch, 2, height, width\), got \(1, 3, 16, 24\)"),
        (torch.zeros(2, 16, 24), ValueError, "must be"),
        (torch.zeros(1, 2, 16, 25), ValueError, "takes a map of 16 x 24 .scale 4. or of its own size, got 16 x 25"),
        (torch.zeros(1, 2, 16, 24, dtype=torch.uint8), TypeError, "must be floating point, got torch.uint8"),
        (torch.full((1, 2, 16, 24), math.nan), ValueError, "item 0 is nan in channel 0 at row 0, column 0, and 768"),
    ],
)
def test_what_is_no_such_map_is_rejected(value, error, said):
    with pytest.raises(error, match=said):
        made()(value, SIZE)


def test_a_model_samples_a_rectangle_with_it():
    net, noise = model(), ssmgen.initial_noise(seeds=[0, 1], shape=(3, *SIZE))
    mask, sketch = torch.zeros(2, 8, 12, dtype=torch.long), maps(2, 2, 8, 12)
    both = ssmgen.sample(net, noise, mask, sketch=sketch, steps=2, guidance_scale={"sketch": 2})
    for i in range(2):
        alone = ssmgen.sample(
            net, noise[i : i + 1], mask[:1], sketch=sketch[i : i + 1], steps=2, guidance_scale={"sketch": 2}
        )
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-5, rtol=1e-4)
    other = ssmgen.sample(net, noise, mask, sketch=-sketch, steps=2, guidance_scale={"sketch": 2})
    assert float((both - other).abs().mean()) > 1e-3
