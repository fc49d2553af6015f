"""Mixers against plain loops in float64: directions of a scan, rotary attention, convolution; and hybrids of them."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from hypothesis import given, settings
from hypothesis import strategies as st

import ssmgen
from ssmgen import build
from ssmgen.models import TokenModel
from ssmgen.nn import CrossMamba, SelfAttention, SelfMamba
from ssmgen.ops import HILBERT_ORDERS, ZIGZAG_ORDERS, scan_directions, scan_order

SIZES = [(3, 5), (1, 7), (5, 2)]
each_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")

#: What each mixer is built with, small.
MIXERS = {
    "self-mamba": dict(d_state=4, order="hilbert"),
    "bidirectional-mamba": dict(d_state=4, order="column-boustrophedon"),
    "cross-scan-mamba": dict(d_state=4, order="window-2"),
    "mamba2": dict(d_state=4, order="random-3"),
    "self-attention": dict(num_heads=2, qk_norm=True),
    "rotary-attention": dict(num_heads=2),
    "convolution": dict(kernel=3),
}
each_mixer = pytest.mark.parametrize("name", MIXERS)


def tokens(size, batch=2, dim=16, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, size[0] * size[1], dim, generator=generator, dtype=dtype)


def mixer(name, dim=16):
    torch.manual_seed(0)
    return randomize(build(name, dim=dim, **MIXERS[name])).double()


def on_grid(x, size):
    return x.transpose(1, 2).unflatten(2, size)


def convolved(x, conv, size):
    """SiLU of the convolution, tap by tap over a padded image."""
    weight, reach = conv.weight, conv.weight.shape[-1] // 2
    padded = F.pad(on_grid(x, size), (reach,) * 4)
    height, width = size
    taps = [
        weight[:, 0, i, j, None, None] * padded[:, :, i : i + height, j : j + width]
        for i in range(2 * reach + 1)
        for j in range(2 * reach + 1)
    ]
    return F.silu(sum(taps) + conv.bias[:, None, None]).flatten(2).transpose(1, 2)


def scanned(u, delta, A, B, C, D, path):
    """The recurrence (Mamba, algorithm 2), token by token along a path."""
    y, state = torch.zeros_like(u), u.new_zeros(len(u), u.shape[2], A.shape[1])
    for k in path:
        step = delta[:, k, :, None]
        state = torch.exp(step * A) * state + step * u[:, k, :, None] * B[:, k, None]
        y[:, k] = (state * C[:, k, None]).sum(-1) + D * u[:, k]
    return y


def summed_scans(ssm, u, dt, B, C, size):
    """Every direction with its own rows of the stacked parameters."""
    result, inner, n, r = 0, ssm.d_inner, ssm.d_state, ssm.dt_rank
    for k, name in enumerate(scan_directions(ssm.order, ssm.directions)):
        order = scan_order(name, *size)
        path = range(u.shape[1]) if order is None else order.forward.tolist()
        own = slice(k * inner, (k + 1) * inner)
        states = slice(k * n, (k + 1) * n)
        delta = F.softplus(dt[..., k * r : (k + 1) * r] @ ssm.dt_proj.weight[own].T + ssm.dt_proj.bias[own])
        result = result + scanned(u, delta, -ssm.A_log[own].exp(), B[..., states], C[..., states], ssm.D[own], path)
    return result


def finished(ssm, y, z):
    return (F.layer_norm(y, (ssm.d_inner,), ssm.out_norm.weight, ssm.out_norm.bias) * F.silu(z)) @ ssm.out_proj.weight.T


@each_size
@pytest.mark.parametrize("order", ["row", "column-hilbert"])
@pytest.mark.parametrize("directions", [1, 2, 4])
def test_directions_are_summed_scans_each_with_its_own_weights(directions, order, size):
    block = randomize(SelfMamba(8, d_state=3, dt_rank=2, order=order, directions=directions)).double()
    x = tokens(size, dim=8)
    content, z = (x @ block.in_proj.weight.T).chunk(2, dim=-1)
    u = convolved(content, block.ssm.conv, size)
    dt, B, C = (u @ block.x_proj.weight.T).split([2 * directions, 3 * directions, 3 * directions], dim=-1)
    expected = finished(block.ssm, summed_scans(block.ssm, u, dt, B, C, size), z)
    torch.testing.assert_close(block(x, size), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("u", ["mask", "image"])
@pytest.mark.parametrize("directions", [2, 4])
def test_a_condition_has_directions_too(directions, u):
    size = (3, 5)
    block = randomize(CrossMamba(8, u=u, d_state=3, dt_rank=2, directions=directions)).double()
    x, cond = tokens(size, dim=8), tokens(size, dim=8, seed=1)
    content, z = (x @ block.in_proj.weight.T).chunk(2, dim=-1)
    c, m = (convolved(part, block.ssm.conv, size) for part in (content, cond @ block.cond_proj.weight.T))
    dt, B = (m @ block.cond_x_proj.weight.T).split([2 * directions, 3 * directions], dim=-1)
    y = summed_scans(block.ssm, m if u == "mask" else c, dt, B, c @ block.x_proj.weight.T, size)
    for told in (cond, block.condition(cond, size)):
        torch.testing.assert_close(block(x, told, size), finished(block.ssm, y, z), rtol=1e-10, atol=1e-10)
    states = [block.condition(cond[:1], size), block.condition(cond[1:], size)]
    torch.testing.assert_close(block(x, states, size), block(x, cond, size), rtol=1e-10, atol=1e-10)


def test_parameters_of_the_directions():
    """At width 1024, as counted from the code of MambaST, MoE-Mamba and U-Shape Mamba."""

    def count(name, **arguments):
        with torch.device("meta"):
            return sum(p.numel() for p in build(name, dim=1024, **arguments).parameters())

    assert [count("self-mamba", directions=k) for k in (1, 2, 4)] == [6_680_576, 7_045_120, 7_774_208]
    assert (count("bidirectional-mamba"), count("cross-scan-mamba")) == (7_045_120, 7_774_208)
    assert [count("cross-mamba", directions=k) for k in (1, 2, 4)] == [8_777_728, 9_142_272, 9_871_360]


def test_names_of_the_directions():
    assert scan_directions("row", 4) == ("row", "column", "row-reversed", "column-reversed")
    assert scan_directions("column-reversed", 2) == ("column-reversed", "column")
    assert scan_directions("hilbert-top-right", 4)[1::2] == (
        "column-hilbert-top-right",
        "column-hilbert-top-right-reversed",
    )
    assert scan_directions("window-3", 1) == ("window-3",)
    for name in (*ZIGZAG_ORDERS, *HILBERT_ORDERS, "row-window-2", "random-1-reversed"):
        paths = [scan_order(each, 4, 6) for each in scan_directions(name, 4)]
        assert len({tuple(path.forward.tolist()) for path in paths}) == 4
        assert torch.equal(paths[2].forward, paths[0].forward.flip(0))
    for count in (0, 3, 8):
        with pytest.raises(ValueError, match=r"directions must be 1, 2 .* or 4 .*, got"):
            SelfMamba(16, directions=count)


def test_two_directions_reach_every_token():
    """With a 1 x 1 convolution, changing one token changes the output everywhere; one direction reaches those after."""
    x = tokens((3, 4), batch=1)
    changed = x.clone()
    changed[0, 5] += 1
    for directions, reached in ((1, range(5, 12)), (2, range(12)), (4, range(12))):
        block = SelfMamba(16, d_state=2, d_conv=1, directions=directions).double()
        differs = (block(changed, (3, 4)) - block(x, (3, 4))).abs().amax(-1)[0] > 1e-12
        assert differs.nonzero().flatten().tolist() == list(reached)


@each_size
@pytest.mark.parametrize("qk_norm", [False, True])
def test_rotary_attention_is_softmax_of_rotated_products(qk_norm, size):
    block = randomize(SelfAttention(16, num_heads=2, rotary=True, qk_norm=qk_norm)).double()
    x = tokens(size)
    q, k, v = (part.unflatten(-1, (2, 8)) for part in block.qkv(x).chunk(3, dim=-1))
    if qk_norm:
        q = q * (q.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * block.q_norm.weight
        k = k * (k.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * block.k_norm.weight
    places = torch.tensor([(i, j) for i in range(size[0]) for j in range(size[1])], dtype=torch.float64)
    angles = torch.cat([places[:, :1] * torch.tensor([1, 0.01]), places[:, 1:] * torch.tensor([1, 0.01])], dim=1)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # a pair of channels is a complex number

    def turned(x):
        a, b, c, d = x.chunk(4, dim=-1)
        return torch.complex(torch.cat([a, c], -1), torch.cat([b, d], -1)) * turn

    products = torch.einsum("binp,bjnp->bnij", turned(q), turned(k).conj()).real
    mixed = torch.einsum("bnij,bjnk->bink", (products / 8**0.5).softmax(-1), v)
    # The table of sines is in float32.
    torch.testing.assert_close(block(x, size), block.out_proj(mixed.flatten(2)), rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(down=st.integers(0, 3), right=st.integers(0, 4), height=st.integers(1, 3), width=st.integers(1, 3))
def test_rotary_products_depend_on_the_distance_alone(down, right, height, width):
    """Attention among the tokens of a patch is the same wherever the patch lies."""
    from ssmgen.nn.attention import rotated

    q, k = (torch.randn(1, 2, height * width, 8, dtype=torch.float64) for _ in range(2))
    size = height + down, width + right

    def shifted(x):
        whole = x.new_zeros(1, 2, *size, 8)
        whole[:, :, down:, right:] = x.unflatten(2, (height, width))
        return rotated(whole.flatten(2, 3), size).unflatten(2, size)[:, :, down:, right:].flatten(2, 3)

    near = rotated(q, (height, width)) @ rotated(k, (height, width)).mT
    torch.testing.assert_close(shifted(q) @ shifted(k).mT, near, rtol=1e-4, atol=1e-5)


def test_positions_reach_rotary_attention_only():
    x, places = tokens((3, 4)), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for rotary in (False, True):
        block = SelfAttention(16, num_heads=2, rotary=rotary).double()
        same = torch.allclose(block(x[:, places], (3, 4)), block(x, (3, 4))[:, places], atol=1e-6)
        assert same != rotary
        assert torch.allclose(block(x, (3, 4)), block(x, (4, 3)), atol=1e-6) != rotary


def test_heads_must_be_wide_enough_to_rotate():
    with pytest.raises(ValueError, match="heads of a width that is a multiple of 4, got 2: dim=16, num_heads=8"):
        build("rotary-attention", dim=16, num_heads=8)


@each_size
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_a_convolution_mixer_is_its_equation(kernel, size):
    block = randomize(build("convolution", dim=8, kernel=kernel)).double()
    x = tokens(size, dim=8)
    u, z = (x @ block.in_proj.weight.T).chunk(2, dim=-1)
    normed = F.layer_norm(convolved(u, block.conv, size), (16,), block.out_norm.weight, block.out_norm.bias)
    expected = (normed * F.silu(z)) @ block.out_proj.weight.T
    torch.testing.assert_close(block(x, size), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(block.float()(x.float(), size), expected.float(), rtol=1e-4, atol=1e-4)


def test_bad_sizes_of_a_convolution():
    for arguments in (dict(kernel=4), dict(kernel=0), dict(expand=0)):
        with pytest.raises(ValueError, match="must be positive and kernel odd, got dim=16"):
            build("convolution", dim=16, **arguments)


@each_mixer
def test_images_are_independent_of_their_batch(name):
    block, x = mixer(name), tokens((3, 5), batch=3)
    for i in range(3):
        alone = block(x[i : i + 1], (3, 5))
        torch.testing.assert_close(block(x, (3, 5))[i : i + 1], alone, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"x must be \(batch, 12, 16\)"):
        block(x, (3, 4))


@each_mixer
def test_gradients_are_those_of_finite_differences(name):
    torch.manual_seed(0)
    block = randomize(build(name, **{"dim": 8, **MIXERS[name]})).double()
    x = tokens((2, 3), batch=1, dim=8).requires_grad_()
    eps, tolerance = (1e-6, 1e-5) if name != "rotary-attention" else (1e-4, 1e-4)
    assert torch.autograd.gradcheck(lambda x: block(x, (2, 3)), x, eps=eps, atol=tolerance, rtol=1e-3)


@each_mixer
def test_mixers_run_in_16_bits(name):
    block, x = mixer(name), tokens((3, 5))
    expected = block(x, (3, 5))
    block, x = block.float(), x.float().requires_grad_()
    torch.testing.assert_close(block(x, (3, 5)).double(), expected, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        got = block(x, (3, 5))
    assert got.dtype == torch.bfloat16
    assert (got.double() - expected).norm() < 0.05 * expected.norm()
    got.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in (x, *block.parameters()))
    whole = block.to(torch.bfloat16)(x.detach().bfloat16(), (3, 5))
    assert whole.dtype == torch.bfloat16 and (whole.double() - expected).norm() < 0.1 * expected.norm()


def hybrid(**changes):
    torch.manual_seed(0)
    layers = [{"name": name, **arguments} for name, arguments in MIXERS.items()]
    small = {"dim": 24, "depth": len(layers), "in_channels": 3, "mask_scale": 1, "num_classes": 5}
    return randomize(TokenModel(mixer=layers, **{**small, **changes})).eval()


def inputs(height=6, width=10, batch=2):
    generator = torch.Generator().manual_seed(1)
    mask = torch.randint(0, 5, (batch, height, width), generator=generator)
    return torch.randn(batch, 3, height, width, generator=generator), torch.rand(batch, generator=generator), mask


def test_a_hybrid_of_all_mixers_samples_and_conditions_once():
    model = hybrid(cross={"mask": "cross-mamba"}, cross_mamba_directions=2)
    keys = [next(iter(block.condition_of)) for block in model.blocks]
    assert keys == [name.replace("-", "_") for name in MIXERS]
    assert {block.cross_mamba.ssm.directions for block in model.blocks} == {2}
    x, t, mask = inputs()
    with torch.no_grad():
        out = model(x, t, mask)
        assert torch.equal(model(x, t, cond=model.condition(mask)), out)
        for i in range(2):
            alone = model(x[i : i + 1], t[i : i + 1], mask[i : i + 1])
            torch.testing.assert_close(out[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    image = ssmgen.sample(model, x, mask, steps=2)
    assert image.shape == x.shape and image.isfinite().all()


def test_blocks_take_any_orders_in_turn():
    orders = ["hilbert", "column-window-3", "random-1", ZIGZAG_ORDERS[5]]
    small = {"dim": 24, "depth": 4, "in_channels": 3, "mask_scale": 1, "num_classes": 5, "d_state": 4}
    torch.manual_seed(0)
    mixed = ["self-mamba", "mamba2", "cross-scan-mamba", "bidirectional-mamba"]
    model = randomize(TokenModel(mixer=mixed, cross={"mask": "cross-mamba"}, orders=orders, **small))
    assert [block.cross_mamba.ssm.order for block in model.blocks] == orders
    assert model.blocks[1].mamba2.order == orders[1]
    assert model.blocks[2].cross_scan_mamba.ssm.orders == scan_directions("random-1", 4)
    x, t, mask = inputs(4, 8)
    model(x, t, mask).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_hybrid_compiles_as_one_graph():
    model = hybrid(add=["mask"])
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, t, mask = inputs()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, t, mask), model(x, t, mask), rtol=1e-4, atol=1e-5)


def test_the_parameters_in_the_docs_are_counted():
    page = (Path(__file__).parents[1] / "docs" / "compose.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)`.*\| ([\d,]+) \|$", page, re.MULTILINE)
    assert dict(rows).keys() >= MIXERS.keys()
    for name, count in rows:
        heads = {"num_heads": 4} if "attention" in name else {}
        counted = sum(p.numel() for p in build(name, dim=256, **heads).parameters())
        assert count == f"{counted:,}", name
