"""Layers in which a condition on the grid takes part in the scan itself."""

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from torch.utils.flop_counter import FlopCounterMode

import ssmgen
from ssmgen import build
from ssmgen.conditions.label_map import token_classes
from ssmgen.models import TokenModel
from ssmgen.nn import ConditionedMamba, CrossMamba, SelfMamba, Signal
from ssmgen.nn.class_ordered_mamba import class_order
from ssmgen.ops import scan_order, selective_scan

SIZE = (3, 4)
SMALL = {"dim": 16, "depth": 2, "d_state": 4, "in_channels": 3, "mask_scale": 1, "num_classes": 5, "patch_size": 1}


def tokens(seed=0, batch=2, dim=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, SIZE[0] * SIZE[1], dim, generator=generator, dtype=torch.float64)


def layer(name, **settings):
    torch.manual_seed(0)
    return randomize(build(name, dim=8, d_state=4, **settings).double(), std=0.3)


def mixed(ssm, sequence):
    """SiLU of the convolution over the grid."""
    grid = sequence.transpose(1, 2).unflatten(2, SIZE)
    return F.silu(F.conv2d(grid, ssm.conv.weight, ssm.conv.bias, padding=1, groups=16)).flatten(2).transpose(1, 2)


def scanned(ssm, u, dt, B, C):
    shared = {"delta_bias": ssm.dt_proj.bias, "delta_softplus": True, "backend": "reference"}
    return selective_scan(u, F.linear(dt, ssm.dt_proj.weight), -ssm.A_log.exp(), B, C, ssm.D, **shared)


def finished(ssm, y, z):
    return F.linear(F.layer_norm(y, (16,), ssm.out_norm.weight, ssm.out_norm.bias) * F.silu(z), ssm.out_proj.weight)


def test_conditioned_mamba_is_its_equation():
    block, x, e = layer("conditioned-mamba"), tokens(), tokens(seed=1)
    c, z = (F.linear(x, block.in_proj.weight) + F.linear(e, block.cond_proj.weight)).split(16, dim=-1)
    u = mixed(block.ssm, c)
    maps = F.linear(u, block.x_proj.weight) + F.linear(e, block.cond_x_proj.weight)
    y = scanned(block.ssm, u, *maps.split([1, 4, 4], dim=-1))
    torch.testing.assert_close(block(x, e, SIZE), finished(block.ssm, y, z), rtol=1e-10, atol=1e-12)


def test_cross_mamba_of_the_sum_is_its_equation():
    block, x, e = layer("cross-mamba", u="sum"), tokens(), tokens(seed=1)
    c, z = F.linear(x, block.in_proj.weight).split(16, dim=-1)
    c, m = mixed(block.ssm, c), mixed(block.ssm, F.linear(e, block.cond_proj.weight))
    dt, B = F.linear(m, block.cond_x_proj.weight).split([1, 4], dim=-1)
    y = scanned(block.ssm, m + c, dt, B, F.linear(c, block.x_proj.weight))
    torch.testing.assert_close(block(x, e, SIZE), finished(block.ssm, y, z), rtol=1e-10, atol=1e-12)


def test_at_first_the_condition_is_added_to_what_is_scanned_alone():
    torch.manual_seed(0)
    block = ConditionedMamba(8, d_state=4).double()
    plain = SelfMamba(8, d_state=4).double()
    plain.load_state_dict({key: value for key, value in block.state_dict().items() if not key.startswith("cond_")})
    x, e = tokens(), tokens(seed=1)
    torch.testing.assert_close(block(x, torch.zeros_like(e), SIZE), plain(x, SIZE))
    assert not torch.allclose(block(x, e, SIZE), plain(x, SIZE)), "the content's projection has a term of the condition"
    with torch.no_grad():
        block.cond_proj.weight[:16].zero_()
    torch.testing.assert_close(block(x, e, SIZE), plain(x, SIZE))


GRADIENTS = [("conditioned-mamba", {}), ("cross-mamba", {"u": "sum"}), ("class-ordered-mamba", {"num_classes": 3})]
GRADIENTS += [("joint-mamba", {})]


@pytest.mark.parametrize("settings", [{}, {"directions": 2}, {"order": "column-boustrophedon-reversed"}])
@pytest.mark.parametrize(
    ("name", "own"), [("conditioned-mamba", {}), ("cross-mamba", {"u": "sum"}), ("joint-mamba", {})]
)
def test_a_condition_is_computed_once_and_serves_any_batch(name, own, settings):
    block, x, e = layer(name, **own, **settings), tokens(batch=4), tokens(batch=2, seed=1)
    one, two = (block.condition(e[i : i + 1], SIZE) for i in range(2))
    both = torch.cat([e[:1].expand(2, -1, -1), e[1:].expand(2, -1, -1)])
    torch.testing.assert_close(block(x, [one, two], SIZE), block(x, both, SIZE))
    with pytest.raises(ValueError, match="made for 12 tokens, the content has 20"):
        block(torch.randn(4, 20, 8, dtype=torch.float64), one, (4, 5))


@pytest.mark.parametrize(("name", "own"), GRADIENTS)
def test_gradients_are_those_of_differences(name, own):
    block = layer(name, **own)
    x, e = tokens(batch=1)[:, :6].requires_grad_(), tokens(batch=1, seed=1)[:, :6].requires_grad_()
    torch.autograd.gradcheck(lambda x, e: block(x, e, (2, 3)), (x, e))


def test_a_block_without_a_mixer_has_one_scan():
    model = TokenModel(mixer=None, cross={"mask": "conditioned-mamba"}, mask_dropout=0.1, **SMALL)
    assert [key for key, _ in model.blocks[0].named_children()] == ["adaln", "conditioned_mamba", "ffn"]
    orders = [block.conditioned_mamba.ssm.order for block in model.blocks]
    assert orders == ["row", "column"], "its layers take the orders in turn"
    x, mask = torch.randn(2, 3, 4, 6), torch.randint(0, 5, (2, 4, 6))
    images = ssmgen.sample(randomize(model).eval(), x, mask=mask, steps=2, guidance_scale=2.0)
    others = ssmgen.sample(model, x, mask=mask.flip(0), steps=2, guidance_scale=2.0)
    assert images.isfinite().all() and not torch.allclose(images, others)
    mixed = TokenModel(mixer=["self-mamba", None], cross={"mask": "conditioned-mamba"}, **SMALL)
    assert [hasattr(block, "self_mamba") for block in mixed.blocks] == [True, False]
    with pytest.raises(ValueError, match="mixer=None leaves the image tokens unmixed"):
        TokenModel(dim=16, depth=1, mixer=None, add=("mask",))


def test_a_model_compiles_whole_and_computes_the_condition_once():
    settings = {"mixer": None, "cross": {"mask": "class-ordered-mamba"}, **SMALL, "depth": 1}
    model = randomize(build("sisma-debug", **settings)).eval()
    x, t, mask = torch.randn(2, 3, 4, 6), torch.rand(2), torch.randint(0, 5, (2, 4, 6))
    torch.compiler.reset()
    with torch.no_grad():
        expected = model(x, t, mask)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, t, mask), expected, rtol=1e-4, atol=1e-5)
        cond = model.condition(mask)
        torch.testing.assert_close(model(x, t, cond=cond), expected)
        with FlopCounterMode(display=False) as whole:
            model(x, t, mask)
        with FlopCounterMode(display=False) as rest:
            model(x, t, cond=cond)
    assert rest.get_total_flops() < whole.get_total_flops()


def test_what_is_scanned_is_checked():
    with pytest.raises(ValueError, match=r"u must be 'mask', 'image' or 'sum' \(what is scanned\), got 'summ'.*'sum'"):
        CrossMamba(8, u="summ")


CLASSES = torch.tensor([[0, 1, 1, 0, 2, 0, 0, 2, 0, 1, 0, 0], [3] * 12])  # the second mask is null


@pytest.mark.parametrize("order", ["row", "row-reversed", "column"])
def test_tokens_are_ordered_by_class_and_then_along_the_path(order):
    forward, inverse, starts = class_order(CLASSES, order, SIZE, torch.float64)
    path = list(range(12)) if order == "row" else scan_order(order, *SIZE).forward.tolist()
    for i, classes in enumerate(CLASSES.tolist()):
        expected = sorted(path, key=classes.__getitem__)
        assert forward[i].tolist() == expected
        firsts = {expected[k] for k in range(12) if k == 0 or classes[expected[k]] != classes[expected[k - 1]]}
        assert set(starts[i, :, 0].nonzero().flatten().tolist()) == firsts
    assert torch.equal(forward.gather(1, inverse), torch.arange(12).expand(2, -1))


def test_class_ordered_mamba_is_its_equation():
    block, x, e = layer("class-ordered-mamba", num_classes=3), tokens(), tokens(seed=1)
    out = block(x, [block.condition(Signal(e, SIZE, classes=CLASSES), SIZE)], SIZE)
    c, z = (F.linear(x, block.in_proj.weight) + F.linear(e, block.cond_proj.weight)).split(16, dim=-1)
    u = mixed(block.ssm, c)
    maps = F.linear(u, block.x_proj.weight) + F.linear(e, block.cond_x_proj.weight)
    dts, Bs, Cs = (part.chunk(2, dim=-1) for part in maps.split([2, 8, 8], dim=-1))
    for i in range(2):
        turn = sorted(range(12), key=CLASSES[i].tolist().__getitem__)
        y = torch.zeros(1, 12, 16, dtype=torch.float64)
        for k, sequence in enumerate((list(range(12)), turn)):
            weights = block.ssm.dt_proj.weight.chunk(2)[k], block.ssm.A_log.chunk(2)[k], block.ssm.D.chunk(2)[k]
            delta, C = F.linear(dts[k][i, sequence], weights[0]), Cs[k][i, sequence]
            if k:
                in_turn = CLASSES[i][sequence]
                begins = torch.cat([torch.tensor([True]), in_turn[1:] != in_turn[:-1]])
                delta, C = delta + begins[:, None] * block.reset, C + block.prompts[in_turn]
            scan = selective_scan(
                *(u[i, sequence][None], delta[None], -weights[1].exp(), Bs[k][i, sequence][None], C[None], weights[2]),
                **{"delta_bias": block.ssm.dt_proj.bias.chunk(2)[k], "delta_softplus": True, "backend": "reference"},
            )
            y[:, sequence] += scan
        torch.testing.assert_close(out[i : i + 1], finished(block.ssm, y, z[i : i + 1]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", ["row", "column-reversed"])
def test_joint_mamba_is_its_equation(order):
    block, x, e = layer("joint-mamba", order=order), tokens(), tokens(seed=1)
    c, z = F.linear(x, block.in_proj.weight).split(16, dim=-1)
    u, m = mixed(block.ssm, c), mixed(block.ssm, F.linear(e, block.cond_proj.weight))
    dt, B, C = F.linear(u, block.x_proj.weight).split([1, 4, 4], dim=-1)
    cond_dt, cond_B = F.linear(m, block.cond_x_proj.weight).split([1, 4], dim=-1)
    deltas = [F.linear(each, block.ssm.dt_proj.weight) for each in (cond_dt, dt)]
    deltas[0] = deltas[0] + block.cond_step
    path = list(range(12)) if order == "row" else scan_order(order, *SIZE).forward.tolist()

    def turns(first, second):
        return torch.stack([first[:, path], second[:, path]], dim=2).flatten(1, 2)

    y = torch.empty(2, 12, 16, dtype=torch.float64)
    y[:, path] = selective_scan(
        *(turns(m, u), turns(*deltas), -block.ssm.A_log.exp(), turns(cond_B, B), turns(C, C), block.ssm.D),
        **{"delta_bias": block.ssm.dt_proj.bias, "delta_softplus": True, "backend": "reference"},
    )[:, 1::2]
    torch.testing.assert_close(block(x, e, SIZE), finished(block.ssm, y, z), rtol=1e-10, atol=1e-12)


def test_a_token_has_the_class_of_which_it_holds_the_largest_share():
    mask = torch.zeros(2, 4, 8, dtype=torch.uint8)
    mask[:, 0, 3:5] = 2  # a pixel in each of the two upper middle patches, and most of both is class 0
    mask[:, :, 6:] = 1
    expected = [0, 2, 2, 1, 0, 0, 0, 1]
    assert token_classes(mask, 3, 2).tolist() == [expected] * 2
    one_hot = F.one_hot(mask.long(), 3).movedim(3, 1).float()
    assert token_classes(one_hot, 3, 2, torch.tensor([True, False])).tolist() == [expected, [3] * 8]
    pooled = Signal(torch.zeros(2, 8, 1), (2, 4), classes=token_classes(mask, 3, 2)).on((1, 2))
    assert pooled.classes.tolist() == [[0, 1]] * 2, "the token in the middle, below it and to the right"


def test_a_label_map_says_its_classes_where_a_layer_reads_them():
    model = TokenModel(mixer=None, cross={"mask": "class-ordered-mamba"}, mask_dropout=0.5, **SMALL)
    assert model.conditions["mask"].gives_classes and model.blocks[0].class_ordered_mamba.num_classes == 5
    assert not TokenModel(mixer="self-mamba", cross={"mask": "cross-mamba"}, **SMALL).conditions["mask"].gives_classes
    randomize(model)
    x, t, mask = torch.randn(2, 3, 4, 6), torch.rand(2), torch.randint(0, 5, (2, 4, 6))
    state = model.condition(mask).blocks[0]["class_ordered_mamba"]
    assert not torch.equal(state.forward[0], state.forward[1]), "an order of its own for each image"
    model.train()(x, t, mask).square().mean().backward()
    assert model.blocks[0].class_ordered_mamba.prompts.grad.any()
    with pytest.raises(ValueError, match="has num_classes=3, and condition 'mask' has 5: leave it out"):
        TokenModel(mixer="self-mamba", cross={"mask": {"name": "class-ordered-mamba", "num_classes": 3}}, **SMALL)
    with pytest.raises(ValueError, match="reads the classes of a label map, and condition 'edges' is none"):
        kinds = {"edges": {"name": "dense-map", "channels": 2}}
        TokenModel(mixer=None, conditions=kinds, cross={"edges": "class-ordered-mamba"}, num_classes=5, dim=16, depth=1)


def test_token_modulation_comes_before_every_layer():
    spec = {"name": "token-modulation", "rank": 4}
    model = build("dit-debug", **SMALL_DIT, mask_input="none", modulate={"mask": spec})
    changes = [name for name, _ in model.blocks[0].named_children() if name.endswith("_by_mask")]
    assert changes == ["self_attention_by_mask", "ffn_by_mask"]
    x, t, mask = torch.randn(2, 3, 4, 6), torch.rand(2), torch.randint(0, 5, (2, 4, 6))
    plain = build("dit-debug", **SMALL_DIT)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "_by_mask" not in key})
    plain.add = ()
    torch.testing.assert_close(model.eval()(x, t, mask), plain.eval()(x, t, mask), msg="at first it changes nothing")
    randomize(model)
    cond = model.condition(mask)
    assert not torch.allclose(model(x, t, mask), model(x, t, mask.flip(0)))
    torch.testing.assert_close(model(x, t, cond=cond), model(x, t, mask))
    parts = [model.condition(mask[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(model(x, t, cond=parts), model(x, t, mask))
    h, block = torch.randn(2, 24, 16), model.blocks[0].ffn_by_mask
    scale, shift = cond.blocks[0]["ffn_by_mask"]
    torch.testing.assert_close(block(h, [cond.blocks[0]["ffn_by_mask"]], (4, 6)), h * (1 + scale) + shift)
    with pytest.raises(ValueError, match="no condition 'msk'.*'mask'"):
        build("dit-debug", **SMALL_DIT, modulate={"msk": spec})
    with pytest.raises(ValueError, match="modulate of 'mask': 'self-mamba' takes no condition"):
        build("dit-debug", **SMALL_DIT, modulate={"mask": "self-mamba"})
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        build("token-modulation", dim=8, rank=0)
    with pytest.raises(ValueError, match="DiM works on a padded grid"):
        build("dim-debug", modulate={"mask": spec})
    with pytest.raises(TypeError, match="modulate maps a condition's name to a spec, got 'token-modulation'"):
        build("dit-debug", **SMALL_DIT, modulate="token-modulation")


SMALL_DIT = {key: value for key, value in SMALL.items() if key != "d_state"} | {"num_heads": 2}
