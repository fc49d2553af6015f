"""A style from another picture: what its codes depend on, where they lie, and what is rejected."""

import pytest
import torch
from conftest import randomize

import ssmgen
from ssmgen import build
from ssmgen.conditions.style_image import class_shares

K, C = 4, 3
SIZE = (4, 6)  # of the latent of the new image: a grid of 2 x 3 tokens
MODEL = dict(dim=24, in_channels=C, mask_scale=2, num_classes=K, depth=2)
STYLE = {"name": "style-image", "placed_by": "mask"}


def style(batch=1, size=(5, 7), scale=3, classes=K):
    """A style picture of another size than the new image."""
    mask = torch.randint(0, classes, (batch, size[0] * scale, size[1] * scale))
    return {"latents": torch.randn(batch, C, *size), "mask": mask}


def condition(**more):
    return randomize(build("style-image", dim=8, in_channels=C, num_classes=K, **more)).eval()


def model(**more):
    conditions = {"mask": "label-map", "style": STYLE}
    made = {"conditions": conditions, "add": ("mask", "style")} | more
    return randomize(build("sisma-debug", **MODEL, **made)).eval()


def halves(left, right):
    """A mask for `SIZE`, of two classes side by side."""
    mask = torch.full((1, 8, 12), left)
    mask[:, :, 4:] = right  # the first column of tokens, and the other two
    return mask


def test_shares_are_the_means_of_the_one_hot_map():
    mask = torch.randint(0, K + 1, (2, 6, 8))
    one_hot = torch.nn.functional.one_hot(mask, K + 1).movedim(-1, 1)[:, :K].float()
    expected = torch.nn.functional.avg_pool2d(one_hot, 2).flatten(2).mT
    torch.testing.assert_close(class_shares(mask, (3, 4), K), expected)
    torch.testing.assert_close(class_shares(one_hot, (3, 4), K), expected)


def test_codes_tell_colour_and_texture_but_not_place():
    read, given = condition(), style()
    order = torch.randperm(5 * 7)
    moved = {
        "latents": given["latents"].flatten(2)[..., order].view_as(given["latents"]),
        "mask": given["mask"].view(1, 5, 3, 7, 3).transpose(2, 3).reshape(1, 35, 9)[:, order],
    }
    moved["mask"] = moved["mask"].view(1, 5, 7, 3, 3).transpose(2, 3).reshape(1, 15, 21)
    before, after = read(given), read(moved)
    torch.testing.assert_close(before.tokens, after.tokens)
    torch.testing.assert_close(before.vector, after.vector)
    rougher = {**given, "latents": given["latents"].mean((2, 3), keepdim=True) + 2 * given["latents"]}
    assert not torch.allclose(before.tokens, read(rougher).tokens)


def test_a_class_has_the_moments_of_its_own_pixels():
    """With one label per latent pixel the pooled values are the plain mean and deviation."""
    from ssmgen.conditions.style_image import _moments

    given = style(2, scale=1)
    found = _moments(given["latents"], class_shares(given["mask"], (5, 7), K))
    for item in range(2):
        for k in range(K):
            own = given["latents"][item][:, given["mask"][item] == k]
            torch.testing.assert_close(found[item, k], torch.cat([own.mean(1), own.std(1, correction=0)]))


def test_a_class_that_the_picture_lacks_is_null_and_no_valid_token():
    read, given = condition(), style(2)
    given["mask"][0].clamp_(max=1)
    signal = read(given)
    assert signal.valid.tolist() == [[True, True, False, False], [True] * 4] and signal.grid is None
    torch.testing.assert_close(signal.tokens[0, 2:], read.nothing.expand(2, -1))
    assert not torch.isclose(signal.tokens[0, :2], read.nothing).all(-1).any()
    null = read(None)  # attention over no token at all would be undefined
    assert null.valid.all() and torch.equal(null.tokens, read.nothing.expand(1, K, -1))


def test_placed_codes_lie_where_the_new_mask_has_the_class():
    read, sequence = condition(placed_by="mask"), condition()
    sequence.load_state_dict(read.state_dict())
    given = style()
    codes = sequence(given).tokens[0]
    target = halves(0, 3)
    target[:, :4, 4:8] = torch.tensor([1, 2]).repeat(2)  # one token is half and half
    signal = read({**given, "target": target}, SIZE)
    assert signal.grid == (2, 3) and signal.valid is None
    expected = torch.stack([codes[0], (codes[1] + codes[2]) / 2, codes[3], codes[0], codes[3], codes[3]])
    torch.testing.assert_close(signal.tokens[0], expected)
    one_hot = torch.nn.functional.one_hot(target, K).movedim(-1, 1).float()
    torch.testing.assert_close(read({**given, "target": one_hot}, SIZE).tokens, signal.tokens)
    torch.testing.assert_close(read(given, SIZE).tokens, read.nothing.expand(1, 6, -1))


def test_a_model_places_a_style_by_its_own_mask():
    made, x, t = model(), torch.randn(2, C, *SIZE), torch.rand(2)
    first = style()
    second = {**first, "latents": first["latents"] + 3 * (first["mask"][:, None, ::3, ::3] == 3)}
    plain = halves(0, 0)
    without, with_3 = halves(0, 1), halves(0, 3)
    one, other = ({"style": each} for each in (first, second))
    # The vector of the whole picture tells more than the regions: it is set aside.
    torch.nn.init.zeros_(made.conditions["style"].whole[2].weight)
    torch.nn.init.zeros_(made.conditions["style"].whole[2].bias)
    only_3 = {"latents": first["latents"], "mask": torch.full_like(first["mask"], 3)}
    null = made(x, t, plain)
    torch.testing.assert_close(made(x, t, plain, style=only_3), null)  # the mask has no class of the picture
    assert not torch.allclose(made(x, t, with_3, style=only_3), made(x, t, with_3))
    assert not torch.allclose(made(x, t, without, **one), made(x, t, without))
    assert not torch.allclose(made(x, t, with_3, **one), made(x, t, with_3, **other))
    with pytest.raises(ValueError, match="condition 'style' has a value and 'mask' has none.*: give 'mask' too"):
        made(x, t, style=first)
    assert made.train()(x, t, style=first).shape == x.shape  # a batch without masks, in training


@pytest.mark.parametrize("layer", ["cross-mamba", {"name": "cross-attention", "num_heads": 2}])
def test_cross_layers_read_a_placed_style(layer):
    made = model(cross={"mask": "cross-mamba", "style": layer}, add=())
    x, t, given = torch.randn(2, C, *SIZE), torch.rand(2), style(2)
    mask = torch.randint(0, K, (2, 8, 12))
    out = made(x, t, mask, style=given)
    for i in range(2):  # items do not touch one another
        own = {name: each[i : i + 1] for name, each in given.items()}
        alone = made(x[i : i + 1], t[i : i + 1], mask[i : i + 1], style=own)
        torch.testing.assert_close(out[i : i + 1], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out, made(x, t, mask))


def test_attention_reads_the_codes_as_a_sequence():
    attention = {"name": "cross-attention", "num_heads": 2}
    conditions = {"mask": "label-map", "style": "style-image"}
    made = model(conditions=conditions, cross={"mask": "cross-mamba", "style": attention}, add=())
    x, t, mask, given = torch.randn(1, C, *SIZE), torch.rand(1), torch.randint(0, K, (1, 8, 12)), style()
    assert not torch.allclose(made(x, t, mask, style=given), made(x, t, mask))
    assert made(x, t, mask).isfinite().all()


def test_one_style_serves_many_masks_and_one_mask_many_styles():
    made, x, t = model(), torch.randn(3, C, *SIZE), torch.rand(3)
    masks, given = torch.randint(0, K, (3, 8, 12)), style(3)
    one = {name: each[:1] for name, each in given.items()}
    thrice = {name: each[:1].expand(3, *each.shape[1:]) for name, each in given.items()}
    torch.testing.assert_close(made(x, t, masks, style=one), made(x, t, masks, style=thrice))
    expanded = masks[:1].expand(3, -1, -1)
    torch.testing.assert_close(made(x, t, masks[:1], style=given), made(x, t, expanded, style=given))
    with pytest.raises(ValueError, match="style.*latents has 3.*target has 2"):
        made(x, t, masks[:2], style=given)


def test_computed_once_it_gives_the_same_numbers():
    made, x, t = model(), torch.randn(2, C, *SIZE), torch.rand(2)
    mask, given = torch.randint(0, K, (1, 8, 12)), style()
    cond = made.condition(mask, style=given)
    assert torch.equal(made(x, t, cond=cond), made(x, t, mask, style=given))


@pytest.mark.parametrize("names", [("mask", "style"), ("style", "mask")])
def test_each_condition_has_its_own_scale_of_guidance(names):
    conditions = {name: {"mask": "label-map", "style": STYLE}[name] for name in names}
    made, noise = model(conditions=conditions, mask_dropout=0.1, style_dropout=0.1), torch.randn(2, C, *SIZE)
    mask, given, t = torch.randint(0, K, (1, 8, 12)), style(), torch.zeros(1)
    v0, vm, v = (made(noise, t, **each) for each in ({}, {"mask": mask}, {"mask": mask, "style": given}))
    for m, s in ((1, 3), (2, 1), (2, 3), (2, 2), (0, 1), (1, 0)):
        scales = {"mask": m, "style": s}
        found = ssmgen.sample(made, noise, mask, style=given, steps=1, solver="euler", guidance_scale=scales)
        torch.testing.assert_close(found, noise + v0 + m * (vm - v0) + s * (v - vm), rtol=1e-4, atol=1e-4)


def test_a_dropped_mask_places_nothing():
    """Or a model without its mask would learn to read it from the style."""
    made, x, t = model(mask_dropout=0.5), torch.randn(32, C, *SIZE), torch.rand(32)
    mask, given = torch.randint(0, K, (32, 8, 12)), style()
    null = made.train()(x, t, style=given)
    whole = made.eval()(x, t, mask, style=given)
    trained = made.train()(x, t, mask, style=given)
    dropped = torch.isclose(trained, null, atol=1e-4, rtol=1e-3).flatten(1).all(1)
    kept = torch.isclose(trained, whole, atol=1e-4, rtol=1e-3).flatten(1).all(1)
    assert 4 < dropped.sum() < 28 and bool((dropped ^ kept).all())


def test_classes_are_dropped_one_by_one_in_training_alone():
    read, given = condition(class_dropout=0.5), style()
    many = {name: each.expand(64, *each.shape[1:]) for name, each in given.items()}
    whole = read(many).tokens
    null = (read.train()(many).tokens == read.nothing).all(-1)
    assert torch.equal(read.eval()(many).tokens, whole)
    assert 0.35 < null.float().mean() < 0.65 and null.sum(1).unique().numel() > 1


def test_the_whole_picture_alone():
    read = condition(regions=False)
    latents = style(2)["latents"]
    signal = read(latents)
    assert signal.tokens.shape == (2, 1, 8) and signal.vector.shape == (2, 8)
    torch.testing.assert_close(read(latents[:1]).vector, signal.vector[:1])
    conditions = {"mask": "label-map", "style": {"name": "style-image", "regions": False}}
    made, x, t = model(conditions=conditions, add=("mask",)), torch.randn(2, C, *SIZE), torch.rand(2)
    mask = halves(0, 1)
    assert not torch.allclose(made(x, t, mask, style=latents), made(x, t, mask))
    with pytest.raises(TypeError, match="'style': the value takes no 'mask'. It takes: latents."):
        made(x, t, mask, style={"latents": latents, "mask": torch.full((2, 5, 7), 77)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    made, given, mask = model().to(dtype), style(), halves(0, 1)
    out = made(torch.randn(1, C, *SIZE, dtype=dtype), torch.rand(1), mask, style=given)
    assert out.dtype == dtype and out.isfinite().all()


def test_gradients_reach_every_weight():
    made, given = model(style_dropout=0.5).train(), style(8)
    given["mask"].clamp_(max=2)
    out = made(torch.randn(8, C, *SIZE), torch.rand(8), torch.randint(0, K, (8, 8, 12)), style=given)
    out.square().mean().backward()
    grads = {name: p.grad for name, p in made.conditions["style"].named_parameters()}
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads.values())


def test_it_compiles_as_one_graph():
    made, x, t = model(), torch.randn(1, C, *SIZE), torch.rand(1)
    mask, given = torch.randint(0, K, (1, 8, 12)), style()
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t, mask, style=given), made(x, t, mask, style=given))


BAD = [
    (lambda v: {"latents": v["latents"]}, ValueError, "a style image without its mask"),
    (lambda v: v["latents"], ValueError, "a style image without its mask"),
    (lambda v: {"mask": v["mask"]}, ValueError, r"must be \(batch, 3, height, width\), and there are none"),
    (lambda v: {**v, "latents": v["latents"][:, :2]}, ValueError, r"got \(1, 2, 5, 7\)"),
    (lambda v: {**v, "latents": v["latents"].long()}, TypeError, "floating point, got torch.int64"),
    (lambda v: {**v, "latents": v["latents"] / 0}, ValueError, "not finite"),
    (lambda v: {**v, "mask": v["mask"][:, :-1]}, ValueError, r"5 x 7, got 14 x 21: resize"),
    (lambda v: {**v, "mask": v["mask"] + 1}, ValueError, "label 4 .*is outside 0..3"),
    (lambda v: {**v, "mask": v["mask"].float()}, TypeError, "must be integers"),
    (lambda v: {**v, "masks": v["mask"]}, TypeError, "no 'masks'.*Did you mean 'mask'"),
    (lambda v: {**v, "target": v["mask"]}, TypeError, "the value takes no 'target'"),
    (lambda v: {**v, "mask": v["mask"].expand(2, -1, -1)}, ValueError, "latents has 1, mask has 2"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_what_does_not_suit_is_named(change, kind, message):
    with pytest.raises(kind, match=message):
        model().condition(halves(0, 1), style=change(style()))


def test_what_cannot_be_built_is_named():
    for arguments, message in (
        (dict(num_classes=None), "needs num_classes"),
        (dict(num_classes=0), "num_classes must be a positive whole number, got 0"),
        (dict(num_classes=-2, regions=False), "num_classes must be a positive whole number, got -2"),
        (dict(patch_size=0), "patch_size must be a positive whole number, got 0"),
        (dict(in_channels=0), "in_channels must be a positive whole number, got 0"),
        (dict(class_dropout="a"), r"class_dropout must be in \[0, 1\), got 'a'"),
        (dict(regions=False, placed_by="mask"), "placed_by='mask' needs regions=True"),
        (dict(regions=False, class_dropout=0.1), "class_dropout=0.1 needs regions=True"),
        (dict(class_dropout=1), r"class_dropout must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            build("style-image", dim=8, **{"in_channels": C, "num_classes": K} | arguments)
    for spec, message in (
        ({**STYLE, "placed_by": "masks"}, "'style' is placed_by 'masks', which is no label map.*'mask'"),
        ({**STYLE, "num_classes": 5}, "of 5 classes cannot be placed by 'mask', which has 4"),
    ):
        with pytest.raises(ValueError, match=message):
            model(conditions={"mask": "label-map", "style": spec})
