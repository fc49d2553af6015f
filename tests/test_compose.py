"""What a user writes to go beyond the registered models: each from the parts, trained and sampled."""

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from einops import rearrange, repeat
from torch import nn

import ssmgen
from ssmgen import build, registry
from ssmgen.models import TokenModel

SMALL = {"dim": 32, "depth": 3, "in_channels": 3, "mask_scale": 1, "num_classes": 5}


@pytest.fixture(autouse=True)
def scratch(monkeypatch):
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))


def train_and_sample(model, **conditions):
    """Thirty steps towards images that are their condition, then one image of each."""
    data = conditions["mask"].unsqueeze(1).float().expand(-1, 3, -1, -1) / 2 - 1
    objective, optimizer = build("flow-matching"), torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = objective.loss(model, data, **conditions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    images = ssmgen.sample(model, ssmgen.initial_noise([1, 2], (3, 8, 8)), **conditions, steps=4)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]) and images.shape == data.shape and images.isfinite().all()


MASK = torch.arange(5).repeat(26)[:128].view(2, 8, 8)


def test_another_mixer():
    @ssmgen.register("block", "row-mixer")
    class RowMixer(nn.Module):
        def __init__(self, dim, reach=1):
            super().__init__()
            self.conv = nn.Conv1d(dim, dim, 2 * reach + 1, padding=reach, groups=dim)

        def forward(self, x, size):
            rows = self.conv(rearrange(x, "b (h w) d -> (b h) d w", h=size[0]))
            return rearrange(rows, "(b h) d w -> b (h w) d", h=size[0])

    ssmgen.register("model", "row-debug", mixer="row-mixer", cross={"mask": "cross-mamba"}, **SMALL)(TokenModel)
    train_and_sample(build("row-debug", reach=2), mask=MASK)


def test_a_second_condition():
    kinds = {"mask": "label-map", "kind": {"name": "class-label", "num_labels": 2, "dropout": 0.1}}
    model = build("sisma-debug", conditions=kinds, **SMALL)
    train_and_sample(model, mask=MASK, kind=torch.tensor([0, 1]))


def test_a_condition_of_your_own():
    @ssmgen.register("condition", "brightness")
    class Brightness(ssmgen.conditions.Condition):
        gives = ("vector",)

        def __init__(self, dim):
            super().__init__()
            self.proj = nn.Linear(1, dim)

        def null(self, size, device):
            return torch.zeros(1, device=device)

        def signal(self, given, size, keep):
            return ssmgen.conditions.Signal(vector=self.proj(given.unsqueeze(1)))

    model = build("sisma-debug", conditions={"mask": "label-map", "light": "brightness"}, **SMALL)
    train_and_sample(model, mask=MASK, light=torch.tensor([0.2, 0.9]))


def test_a_hybrid():
    model = build("sisma-debug", mixer=["self-mamba", {"name": "self-attention", "num_heads": 4}], **SMALL)
    assert [hasattr(block, "self_attention") for block in model.blocks] == [False, True, False]
    train_and_sample(model, mask=MASK)


def u_shaped():
    @ssmgen.register("model", "u-debug", mixer="self-mamba", cross={"mask": "cross-mamba"}, **SMALL)
    class UShape(TokenModel):
        def grids(self, grid):
            return [grid, (grid[0] // 2, grid[1] // 2), grid]

        def stack(self, tokens, run, grid):
            fine = run(0, tokens)
            image = rearrange(fine, "b (h w) d -> b d h w", h=grid[0])
            coarse = run(1, rearrange(F.avg_pool2d(image, 2), "b d h w -> b (h w) d"))
            doubled = repeat(coarse, "b (h w) d -> b (h two w too) d", h=grid[0] // 2, two=2, too=2)
            return run(2, fine + doubled)

    return build("u-debug")


def test_a_u_shaped_stack():
    train_and_sample(u_shaped(), mask=MASK)


def test_condition_once_gives_the_same_numbers_on_every_grid():
    model, x, t = randomize(u_shaped()).eval(), torch.randn(2, 3, 8, 8), torch.rand(2)
    assert torch.equal(model(x, t, MASK), model(x, t, cond=model.condition(MASK)))


def test_two_conditions_through_layers_of_one_kind():
    kinds = {"mask": "label-map", "other": {"name": "label-map", "num_classes": 5}}
    model = build("sisma-debug", conditions=kinds, cross=dict.fromkeys(kinds, "cross-mamba"), scale=1, **SMALL)
    assert {"cross_mamba_mask", "cross_mamba_other"} <= set(dict(model.blocks[0].named_children()))
    train_and_sample(model, mask=MASK, other=MASK.flip(0))


def test_an_unconditional_model_and_a_class_conditional_one():
    size = {"dim": 32, "depth": 1, "in_channels": 3}
    plain = build("sisma-debug", conditions={}, cross={}, **size)
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    assert plain(x, t).shape == ssmgen.sample(plain, x, steps=1).shape == x.shape
    labels = {"label": {"name": "class-label", "num_labels": 4}}
    dit = build("dit-debug", conditions=labels, add=(), **size)
    assert torch.equal(dit(x, t, label=[1, 3]), dit(x, t, cond=dit.condition(label=torch.tensor([1, 3]), size=(8, 8))))
    randomize(dit)
    one = ssmgen.sample(dit, x, label=3, steps=1)  # one label for all
    torch.testing.assert_close(one, ssmgen.sample(dit, x, label=torch.tensor([3, 3]), steps=1))


def test_tokens_of_another_length_reach_cross_attention():
    @ssmgen.register("condition", "words")
    class Words(ssmgen.conditions.Condition):
        def null(self, size, device):
            return torch.zeros(1, 5, 32, device=device)

        def signal(self, given, size, keep):
            return ssmgen.conditions.Signal(tokens=given)

    cross = {"mask": "cross-mamba", "text": "cross-attention"}
    model = build("sisma-debug", conditions={"mask": "label-map", "text": "words"}, cross=cross, num_heads=4, **SMALL)
    train_and_sample(model, mask=MASK, text=torch.randn(2, 5, 32))


def test_a_model_made_on_meta_takes_weights():
    """Conditions send their values where the weights are, also where these came last."""
    kinds = {"mask": "label-map", "label": {"name": "class-label", "num_labels": 4}}
    for name, more in (("sisma-debug", {"conditions": kinds}), ("sdm-debug", {})):
        model = randomize(build(name, **more), std=0.05).eval()
        with torch.device("meta"):
            other = build(name, **more).eval()
        other.load_state_dict(model.state_dict(), assign=True)
        x, t, mask = torch.randn(1, 3, 8, 8), torch.rand(1), torch.randint(0, 19, (1, 8, 8))
        assert torch.equal(other(x, t, mask), model(x, t, mask))
        assert torch.equal(other(x, t, mask.numpy()), other(x, t, cond=other.condition(mask.numpy())))
        with pytest.raises(ValueError, match="label 77"):
            other(x, t, torch.full((1, 8, 8), 77))


LABEL = {"name": "class-label", "num_labels": 4}
PLACED = {"name": "placed-sequence", "width": 8, "pooled": True}
STYLED = {"mask": "label-map", "text": "style-image"}
WITH_TEXT = {"mask": "label-map", "text": {"name": "token-sequence", "width": 8}}
POSITIONED = {"name": "cross-attention", "position": True, "num_heads": 4}
READS_GRID = "layer 'cross_mamba' reads tokens on the image's grid, and condition 'text' is a sequence: read it with"
WITH_KIND = {"mask": "label-map", "kind": LABEL}


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"add": ("maks",)}, ValueError, "no condition 'maks'.*'mask'"),
        ({"add": "mask"}, TypeError, r"add is a list of conditions' names, got 'mask'"),
        (
            {"conditions": {"mask": "label-map", "kind": LABEL}, "kind_input": "add"},
            ValueError,
            "'kind' gives no tokens",
        ),
        (
            {"conditions": {"mask": "label-map", "kind": LABEL}, "cross": {"kind": "cross-mamba"}},
            ValueError,
            "no tokens",
        ),
        ({"conditions": {"mask": "label-map", "steps": LABEL}}, ValueError, "cannot be called 'steps'"),
        ({"conditions": {"mask": "label-map", "a.b": LABEL}}, ValueError, "cannot be called 'a.b'"),
        ({"conditions": {"mask": "label-map", "time": LABEL}}, ValueError, "cannot be called 'time'"),
        ({"conditions": {"mask": "label-map", "ffn": LABEL}}, ValueError, "cannot be called 'ffn'"),
        ({"conditions": {"seg": "label-map"}}, ValueError, "no condition 'mask'.*There are: seg"),
        ({"mixer": "cross-mamba"}, ValueError, "'cross-mamba' needs a condition"),
        ({"mixer": "label-map"}, ValueError, "'label-map' is of kind condition, not block"),
        ({"mixer": "self-mmba"}, ValueError, "unknown block 'self-mmba'.*'self-mamba'"),
        ({"mixer": 3}, TypeError, "mixer must be a spec or a list of specs, got 3"),
        ({"cross": {"mask": "self-mamba"}}, ValueError, "'self-mamba' takes no condition"),
        ({"conditions": {"mask": "self-mamba"}}, ValueError, "'self-mamba' is of kind block, not condition"),
        ({"cross": "cross-mamba"}, TypeError, "cross maps a condition's name to a spec, got 'cross-mamba'"),
        ({"conditions": "label-map"}, TypeError, "conditions maps a condition's name to a spec, got 'label-map'"),
        ({"orders": 3}, ValueError, "orders must be a list of at least one scan order.*got 3"),
        ({"mask_dropout": "a"}, ValueError, r"dropout of a condition must be in .* got 'a'"),
        ({"dim": -1}, ValueError, "dim must be a positive whole number, got -1"),
        ({"depth": True}, ValueError, "depth must be a whole number from 1 to 1000, got True"),
        ({"depth": "3"}, ValueError, "depth must be a whole number from 1 to 1000, got '3'"),
        ({"mixer": []}, ValueError, "mixer must be one spec, or up to one for each of the 2 blocks, got 0"),
        ({"mixer": ["self-mamba"] * 3}, ValueError, "for each of the 2 blocks, got 3"),
        ({"orders": "row"}, ValueError, "orders must be a list"),
        ({"orders": ["rwo"]}, ValueError, "unknown scan order 'rwo'.*'row'"),
        ({"mixer": "self-attention", "num_heds": 2}, TypeError, "takes no 'num_heds'.*'num_heads'"),
        ({"conditions": WITH_TEXT, "cross": {"text": "cross-mamba"}, "add": ["mask"]}, ValueError, READS_GRID),
        ({"conditions": STYLED, "cross": {"text": "cross-mamba"}, "add": ["mask"]}, ValueError, READS_GRID),
        (
            {"conditions": WITH_TEXT, "cross": {"text": POSITIONED}, "add": ["mask"]},
            ValueError,
            "'cross_attention' reads tokens on the image",
        ),
        ({"conditions": STYLED}, ValueError, "condition 'text' is not used: give it a layer in cross="),
        ({"conditions": {"mask": "label-map", "text": PLACED}}, ValueError, "condition 'text' is not used"),
        (
            {"conditions": {"mask": "label-map", "text": {"name": "style-image", "placed_by": "mask"}}},
            ValueError,
            "condition 'text' is not used",
        ),
        ({"conditions": {"mask": "one-hot-map"}}, ValueError, "gives tokens of width 19, and the model's have 32"),
        (
            {"conditions": {"mask": "label-map", "text": {**PLACED, "patch_size": 1}}, "add": ("text",)},
            ValueError,
            "condition 'text' has patch_size=1 and the model 2: leave patch_size out of",
        ),
        ({"conditions": {"mask": {"name": "label-map", "dim": 16}}}, ValueError, "'mask' has dim=16 and the model 32"),
        ({"adaln": {"name": "adaln-single", "gates": False}}, ValueError, "adaln has no 'gates' of its own"),
        ({"adaln": {"name": "adaln", "sublayers": 7}}, ValueError, "adaln has no 'sublayers' of its own"),
        ({"adaln": {"name": "adaln", "dim": 7}}, ValueError, "adaln has no 'dim' of its own"),
        ({"mask_input": True}, ValueError, "mask_input must be 'none' or 'add', got True"),
    ],
)
def test_mistakes_of_composing_are_explained(settings, kind, message):
    with pytest.raises(kind, match=message):
        build("sisma-debug", **settings)


def arguments_beside_conditions():
    """The names that a condition's value cannot be passed by, from the signatures of what takes values."""
    calls = (
        *(ssmgen.sample, ssmgen.Sampler.__call__, ssmgen.likelihood.log_likelihood, type(build("flow-matching")).loss),
        *(TokenModel.forward, TokenModel.condition),
    )
    found = {name for call in calls for name in registry.keywords(call)}
    return sorted((found | set(ssmgen.sampling.SETTINGS)) - {"mask"})


@pytest.mark.parametrize(
    "name", [*arguments_beside_conditions(), "class", "None", "keys", "items", "type", "training", "forward", "2nd", ""]
)
def test_a_condition_has_a_name_of_its_own(name):
    with pytest.raises(ValueError, match=f"a condition cannot be called {name!r}.*: choose another name"):
        build("sisma-debug", conditions={"mask": "label-map", name: LABEL})


def test_every_part_that_is_built_is_used():
    """A pooled text needs no layer: its vector passes through all of its weights."""
    pooled = {"name": "token-sequence", "width": 8, "pooled": True}
    model = build("sisma-debug", conditions={"mask": "label-map", "text": pooled})
    text = {"tokens": torch.randn(2, 4, 8), "lengths": torch.tensor([4, 2])}
    kept = torch.tensor([True, False])  # one item is the null
    model.conditions["text"](text, keep=kept).vector.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.conditions["text"].parameters())


def test_what_a_name_fixes_for_other_parts_is_left_out():
    model = build("sisma-debug", conditions={"seg": "label-map"}, cross={"seg": "cross-mamba"})
    assert model.conditions["seg"].scale == 1 and model.num_classes == 19
    assert build("sisma-mini", mixer={"name": "self-attention", "num_heads": 4}, cross={}, mask_input="add").add == (
        "mask",
    )


def test_a_family_may_fix_its_mixer():
    class Fixed(TokenModel):
        def __init__(self, *, levels=1, **rest):
            super().__init__(mixer="self-mamba", cross={"mask": "cross-mamba"}, **rest)
            self.levels = levels

    ssmgen.register("model", "fixed-debug", **SMALL)(Fixed)
    assert build("fixed-debug", levels=2, mask_dropout=0.1).levels == 2


def test_blocks_with_a_scan_take_the_orders_in_turn():
    """Were a block of attention to take one, every second block of a hybrid would scan along rows alone."""
    orders = ["row", "column", "row-reversed"]
    hybrid = ["self-mamba", {"name": "self-attention", "num_heads": 2}]
    model = build("dit-debug", mixer=hybrid, depth=6, orders=orders)
    assert [block.self_mamba.ssm.order for block in model.blocks[::2]] == orders
    both = build("sisma-debug", mixer=hybrid, depth=4, orders=orders)  # the cross layers scan in every block
    assert [block.cross_mamba.ssm.order for block in both.blocks] == [*orders, "row"]


def test_the_simplest_network_adds_the_mask_and_has_no_cross_layer():
    torch.manual_seed(0)
    model = randomize(build("sisma2-debug"))
    assert tuple(model.add) == ("mask",)
    assert all(block.condition_of == {"self_mamba": None, "ffn": None} for block in model.blocks)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([0.5])
    masks = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    masks[1, :, 2:5, 2:5] = 13
    assert not torch.allclose(model(x, t, masks[0]), model(x, t, masks[1]), atol=1e-3)
