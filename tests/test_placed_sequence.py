"""A sequence that each class of the mask reads."""

import pytest
import torch
from conftest import randomize

import ssmgen
from ssmgen import build

K, WIDTH = 4, 6


@pytest.fixture
def condition():
    torch.manual_seed(0)
    return randomize(build("placed-sequence", dim=16, width=WIDTH, num_classes=K, patch_size=2)).eval()


def words(lengths=(5, 2)):
    return {"tokens": torch.randn(len(lengths), 5, WIDTH), "lengths": torch.tensor(lengths)}


def test_a_token_is_the_mean_of_its_classes_codes(condition):
    said, mask = words(), torch.randint(0, K, (2, 8, 12))
    signal = condition(condition.placed(said, mask, None), (4, 6))
    assert signal.tokens.shape == (2, 6, 16) and signal.grid == (2, 3) and signal.valid is None
    pure = torch.stack([torch.full((8, 12), k) for k in range(K)])
    for i in range(2):
        own = {name: each[i : i + 1] for name, each in said.items()}
        codes = condition(condition.placed(own, pure, None), (4, 6)).tokens[:, 0]  # one token of each class
        shares = torch.nn.functional.one_hot(mask[i].view(2, 4, 3, 4).permute(0, 2, 1, 3).reshape(6, 16), K).float()
        torch.testing.assert_close(signal.tokens[i], shares.mean(1) @ codes)
    assert not torch.allclose(codes[0], codes[1], atol=1e-3)


def test_each_class_reads_the_words_and_no_padding(condition):
    said, mask = words(), torch.randint(0, K, (2, 8, 12))
    once = condition(condition.placed(said, mask, None), (4, 6)).tokens
    changed = said["tokens"].clone()
    changed[1, 2:] = 7.0  # beyond its length of 2
    torch.testing.assert_close(condition(condition.placed(said | {"tokens": changed}, mask, None), (4, 6)).tokens, once)
    changed[0, 4] += 1.0  # a word
    assert not torch.allclose(condition(condition.placed(said | {"tokens": changed}, mask, None), (4, 6)).tokens, once)


def test_the_null_of_mask_or_words_has_no_place(condition):
    said, mask = words(), torch.randint(0, K, (2, 8, 12))
    nothing = condition(None, (4, 6)).tokens
    for value, keep in (
        (said, torch.tensor([False, False])),
        (condition.placed(said, mask, torch.tensor([False, False])), None),
        (condition.placed(said, mask, None), torch.tensor([False, False])),
    ):
        torch.testing.assert_close(condition(value, (4, 6), keep).tokens, nothing.expand(2, -1, -1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    named = {"mask": "label-map", "words": {"name": "placed-sequence", "width": WIDTH, "dropout": 0.1}}
    model = ssmgen.build("sisma-debug", conditions=named, add=["words"], mask_dropout=0.1, num_classes=K)
    return randomize(model).eval()


def test_a_model_places_words_by_its_mask_and_guides_each(model):
    x0, mask = ssmgen.initial_noise([0, 1], (3, 8, 12)), torch.randint(0, K, (2, 8, 12))
    said, settings = words(), {"steps": 2, "guidance_scale": {"mask": 2, "words": 3}}
    images = ssmgen.sample(model, x0, mask, words=said, **settings)
    assert not torch.allclose(images, ssmgen.sample(model, x0, mask, words=words(), **settings), atol=1e-3)
    alone = ssmgen.sample(model, x0[1:], mask[1:], words={n: each[1:] for n, each in said.items()}, **settings)
    torch.testing.assert_close(images[1:], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("names", [("mask", "words"), ("words", "mask")])
def test_guidance_of_placed_words_is_its_formula(names):
    """Words without their mask are null, so no evaluation has them: a scale would multiply nothing."""
    kinds = {"mask": "label-map", "words": {"name": "placed-sequence", "width": WIDTH, "dropout": 0.1}}
    named = {name: kinds[name] for name in names}
    model = ssmgen.build("sisma-debug", conditions=named, add=["words"], mask_dropout=0.1, num_classes=K)
    randomize(model).eval()
    x0, mask, said, t = torch.randn(2, 3, 8, 12), torch.randint(0, K, (2, 8, 12)), words(), torch.zeros(1)
    v0, vm, v = (model(x0, t, **each) for each in ({}, {"mask": mask}, {"mask": mask, "words": said}))
    assert not torch.allclose(vm, v, atol=1e-2)
    for m, w in ((1, 4), (2, 1), (2, 4), (2, 2), (0, 1)):
        scales = {"mask": m, "words": w}
        found = ssmgen.sample(model, x0, mask, words=said, steps=1, solver="euler", guidance_scale=scales)
        torch.testing.assert_close(found, x0 + v0 + m * (vm - v0) + w * (v - vm), rtol=1e-4, atol=1e-4)


def test_guidance_starts_where_it_is_told_by_condition(model):
    """Two steps of Euler: words are guided from the noise on, the mask in the second step alone."""
    x0, mask, said = torch.randn(2, 3, 8, 12), torch.randint(0, K, (2, 8, 12)), words()
    settings = {"steps": 2, "solver": "euler", "guidance_scale": {"mask": 2, "words": 3}}
    expected = x0
    for t, m in ((0.0, 1.0), (0.5, 2.0)):
        given = ({}, {"mask": mask}, {"mask": mask, "words": said})
        v0, vm, v = (model(expected, torch.full((1,), t), **each) for each in given)
        expected = expected + 0.5 * (v0 + m * (vm - v0) + 3 * (v - vm))
    for start in ({"mask": 0.5}, {"mask": 0.5, "words": 0}):
        found = ssmgen.sample(model, x0, mask, words=said, guidance_start=start, **settings)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    whole = ssmgen.sample(model, x0, mask, words=said, guidance_start={"mask": 0}, **settings)
    assert torch.equal(whole, ssmgen.sample(model, x0, mask, words=said, **settings))
    late = ssmgen.sample(model, x0, mask, words=said, guidance_start={"mask": 0.5, "words": 0.5}, **settings)
    assert torch.equal(late, ssmgen.sample(model, x0, mask, words=said, guidance_start=0.5, **settings))


def test_a_start_of_guidance_names_a_condition(model):
    x0, mask = torch.randn(2, 3, 8, 12), torch.randint(0, K, (2, 8, 12))
    with pytest.raises(ValueError, match=r"guidance_start names no condition 'wrods'. Did you mean 'words'"):
        ssmgen.sample(model, x0, mask, guidance_start={"wrods": 0.1})
    with pytest.raises(ValueError, match=r"a time in \[0, 1\], .* or one for each condition, got {'mask': 2}"):
        ssmgen.sample(model, x0, mask, guidance_start={"mask": 2})


def test_words_without_a_mask_are_an_error(model):
    x0, said = torch.randn(2, 3, 8, 12), words()
    with pytest.raises(ValueError, match="'words' has a value and 'mask' has none, which says where it lies"):
        ssmgen.sample(model, x0, words=said, steps=1)
    with pytest.raises(ValueError, match="guides 'words', which has no place without a value for 'mask': pass one"):
        ssmgen.sample(model, x0, words=said, steps=1, guidance_scale={"words": 2})
    assert model.train()(x0, torch.rand(2), words=said).shape == x0.shape  # a batch without masks, in training


def test_bad_values_and_classes_are_named(model):
    mask = torch.randint(0, K, (1, 8, 12))
    with pytest.raises(ValueError, match="'words'.*tokens must be .batch, length, 6."):
        model.condition(mask, words=torch.randn(1, 3, 7))
    with pytest.raises(TypeError, match="'words': the value takes no 'target'"):
        model.condition(mask, words=words() | {"target": mask.expand(2, -1, -1)})
    for size in ({"num_classes": 0}, {"patch_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(size))} must be a positive whole number, got 0"):
            build("placed-sequence", dim=16, width=8, **{"num_classes": K} | size)
    named = {"mask": "label-map", "words": {"name": "placed-sequence", "width": 6, "num_classes": 7}}
    with pytest.raises(ValueError, match="codes of 7 classes cannot be placed by 'mask', which has 4"):
        ssmgen.build("sisma-debug", conditions=named, add=["words"], num_classes=K)
