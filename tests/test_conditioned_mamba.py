"""Layers in which a condition on the grid takes part in the scan itself."""

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from torch.utils.flop_counter import FlopCounterMode

import ssmgen
from ssmgen import build
from ssmgen.models import TokenModel
from ssmgen.nn import ConditionedMamba, CrossMamba, SelfMamba
from ssmgen.ops import selective_scan

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


@pytest.mark.parametrize("settings", [{}, {"directions": 2}, {"order": "column-boustrophedon-reversed"}])
@pytest.mark.parametrize(("name", "own"), [("conditioned-mamba", {}), ("cross-mamba", {"u": "sum"})])
def test_a_condition_is_computed_once_and_serves_any_batch(name, own, settings):
    block, x, e = layer(name, **own, **settings), tokens(batch=4), tokens(batch=2, seed=1)
    one, two = (block.condition(e[i : i + 1], SIZE) for i in range(2))
    both = torch.cat([e[:1].expand(2, -1, -1), e[1:].expand(2, -1, -1)])
    torch.testing.assert_close(block(x, [one, two], SIZE), block(x, both, SIZE))
    with pytest.raises(ValueError, match="made for 12 tokens, the content has 20"):
        block(torch.randn(4, 20, 8, dtype=torch.float64), one, (4, 5))


@pytest.mark.parametrize(("name", "own"), [("conditioned-mamba", {}), ("cross-mamba", {"u": "sum"})])
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
    model = randomize(build("sisma-debug", mixer=None, cross={"mask": "conditioned-mamba"}, **SMALL | {"depth": 1})).eval()
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
