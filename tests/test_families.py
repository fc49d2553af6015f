"""What each model family promises: its published size up to named items, its structure, parity with other code."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize

import ssmgen
from ssmgen import build
from ssmgen.nn import AdaLNSingle, AdaLNZero, Mamba, PlainNorm, sincos_position
from ssmgen.ops import ZIGZAG_ORDERS

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
LABELS = {"conditions": {"y": {"name": "class-label", "num_labels": 1000}}, "add": ()}

#: Parameters without those of the conditions, which docs/families.md quotes.
COUNTS = {
    "zigma-s": 31_305_028,
    "zigma-b": 133_837_828,
    "zigma-m": 266_880_004,
    "zigma-l": 472_494_084,
    "zigma-h": 1_058_703_364,
    "usm-s": 24_224_260,
    "usm-b": 169_136_644,
    "usm-l": 560_588_804,
    "usm-xl": 818_553_604,
    "dim-l": 383_721_488,
    "dim-h": 858_894_352,
}


def count(module):
    return sum(p.numel() for p in module.parameters())


def on_meta(name, **overrides):
    with torch.device("meta"):
        return build(name, **overrides)


def linear(inputs, outputs, bias=True):
    return inputs * outputs + bias * outputs


def mamba(dim, conv):
    """Parameters of the original Mamba block, of its module in state-spaces/mamba."""
    inner, rank = 2 * dim, -(-dim // 16)
    projections = linear(dim, 2 * inner, bias=False) + linear(inner, dim, bias=False)
    selection = linear(inner, rank + 32, bias=False) + linear(rank, inner)
    return projections + selection + inner * (conv + 1) + inner * 16 + inner


def timesteps(dim):
    return linear(256, dim) + linear(dim, dim)


@pytest.mark.parametrize("name", COUNTS)
def test_sizes_are_pinned(name):
    model = on_meta(name)
    assert count(model) - count(model.conditions) == COUNTS[name]
    assert f"{COUNTS[name]:,}" in PAGE.read_text()


@pytest.mark.parametrize(
    ("name", "dim", "theirs", "published"),
    [
        ("dit-s", 384, 32_963_360, 33),
        ("dit-b", 768, 130_512_416, 130),
        ("dit-l", 1024, 458_102_816, 458),
        ("dit-xl", 1152, 675_129_632, 675),
    ],
)
def test_dit_has_the_published_size_up_to_named_items(name, dim, theirs, published):
    depth = len(on_meta(name).blocks)
    block = 4 * linear(dim, dim) + linear(dim, 4 * dim) + linear(4 * dim, dim) + linear(dim, 6 * dim)
    ends = linear(16, dim) + timesteps(dim) + 1001 * dim + linear(dim, 2 * dim) + linear(dim, 32)
    assert depth * block + ends + 256 * dim == theirs and abs(theirs / 1e6 - published) < 0.6
    positions = 256 * dim  # DiT stores the fixed table; here it is computed
    variance = linear(dim, 32) - linear(
        dim, 16
    )  # the head's channels of learn_sigma, which flow matching does not need
    ours = count(on_meta(name, **LABELS))
    assert ours + positions + variance == theirs
    assert f"{ours:,}" in PAGE.read_text() and f"{theirs:,}" in PAGE.read_text()


def test_zigma_b_has_the_size_of_its_code_up_to_the_table_of_positions():
    dim, depth = 768, 24
    block = mamba(dim, conv=4) + dim + linear(dim, 3 * dim)
    rest = linear(4, dim) + timesteps(dim) + dim + linear(dim, 4)
    assert depth * block + rest == COUNTS["zigma-b"]
    assert COUNTS["zigma-b"] + 1024 * dim == 134_624_260  # with use_pe=2: a learned table for 32 x 32 tokens


@pytest.mark.parametrize(("name", "dim", "theirs"), [("dim-l", 1024, 386_063_376), ("dim-h", 1536, 862_407_184)])
def test_dim_has_the_size_of_its_code_up_to_its_extra_tokens(name, dim, theirs):
    blocks = 49 * (mamba(dim, conv=3) + dim + 3 * dim) + 24 * 2 * linear(dim, dim)  # two maps where a skip joins
    shared = timesteps(dim) + linear(dim, 3 * dim)
    labels, positions, separator = 2 * 1001 * dim, 258 * dim, 3 * dim
    smooth, pads, head = 2 * 10 * dim, 3 * dim, dim + linear(dim, 2 * dim) + linear(dim, 16)
    assert blocks + shared + labels + positions + separator + smooth + pads + head + linear(16, dim) == theirs
    ours = count(on_meta(name, **LABELS))
    assert theirs - ours == 1001 * dim + 258 * dim + 3 * dim + 24 * dim
    assert f"{ours:,}" in PAGE.read_text() and f"{theirs:,}" in PAGE.read_text()


@pytest.mark.parametrize(("name", "dim", "depth"), [("usm-s", 384, 13), ("usm-b", 768, 25), ("usm-l", 1024, 49)])
def test_usm_is_its_code_with_our_mixer(name, dim, depth):
    mixer = count(on_meta("self-mamba", dim=dim))
    blocks = depth * (mixer + linear(dim, 3 * dim)) + depth // 2 * linear(2 * dim, dim)
    resizing = 6 * (4 * dim * dim + dim)
    ends = linear(4, dim) + timesteps(dim) + linear(dim, 2 * dim) + linear(dim, 4)
    assert blocks + resizing + ends == COUNTS[name]
    unused = 1024 * dim + linear(768, dim) + depth * 3 * dim  # positions, texts, a scale and a norm in each block
    assert f"{COUNTS[name] + unused:,}" in PAGE.read_text()


@pytest.mark.parametrize("rms", [False, True])
def test_adaln_is_its_equation(rms):
    layer = randomize(AdaLNZero(16, sublayers=2, norm="rms" if rms else "layer"))
    c, x = torch.randn(2, 16), torch.randn(2, 6, 16)
    weights = torch.ones(2, 16)
    if rms:
        torch.nn.init.normal_(layer.norm_weight)
        weights = layer.norm_weight.view(2, 16)
    values = layer.linear(F.silu(c)).chunk(6, dim=-1)
    for i, own in enumerate(layer(c)):
        shift, scale, gate = (value.unsqueeze(1) for value in values[3 * i : 3 * i + 3])
        normed = F.rms_norm(x, (16,), weights[i], eps=1e-5) if rms else F.layer_norm(x, (16,), eps=1e-6)
        torch.testing.assert_close(own.norm(x), normed * (1 + scale) + shift, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own.residual(x, x), x + gate * x)


def test_blocks_with_a_shared_adaln_add_their_offsets():
    layer = AdaLNSingle(8, sublayers=1)
    shift, scale, gate = (layer.offsets.view(3, 8) + torch.arange(3).unsqueeze(1)).unbind()
    (own,) = layer(torch.arange(3.0).repeat_interleave(8).unsqueeze(0))
    assert torch.equal(own.shift[0, 0], shift) and torch.equal(own.scale[0, 0], scale)
    assert torch.equal(own.gate[0, 0], gate)
    model = build("dim-debug")
    assert model.shared_adaln is not None and not [n for n, _ in model.blocks.named_parameters() if "linear" in n]


def test_any_model_takes_another_adaln_and_no_feed_forward():
    for adaln in ("adaln-single", {"name": "adaln", "norm": "rms"}):
        model = randomize(build("sisma-debug", adaln=adaln, ffn=None))
        assert not hasattr(model.blocks[0], "ffn")
        out = model(torch.randn(2, 3, 4, 6), torch.rand(2), torch.zeros(2, 4, 6, dtype=torch.uint8))
        out.square().sum().backward()
        assert not [name for name, p in model.named_parameters() if not p.grad.any()]
    with pytest.raises(ValueError, match="adaln must be 'adaln' or 'adaln-single'"):
        build("sisma-debug", adaln="mamba")
    with pytest.raises(ValueError, match="norm must be 'layer' or 'rms', got 'rsm'"):
        build("sisma-debug", adaln={"name": "adaln", "norm": "rsm"})
    with pytest.raises(TypeError, match="takes no 'ffn_ratio'"):
        build("sisma-debug", ffn=None, ffn_ratio=2)


@pytest.mark.parametrize("order", ["row", "column-boustrophedon-top-right"])
def test_the_mamba_block_is_its_recurrence(order):
    """Step by step in float64, after the equations of the paper and on its sequence alone."""
    layer, size = Mamba(8, d_state=4, order=order).double(), (3, 5)
    x = torch.randn(2, 15, 8, dtype=torch.float64)
    walk = ssmgen.ops.scan_order(order, *size)
    path = torch.arange(15) if walk is None else walk.forward
    content, z = layer.in_proj(x[:, path]).chunk(2, dim=-1)
    ssm, out = layer.ssm, torch.empty_like(x)
    A, state = -ssm.A_log.exp(), torch.zeros(2, 16, 4, dtype=torch.float64)
    for i, place in enumerate(path):
        seen = [content[:, i - back] * ssm.conv.weight[:, 0, 3 - back] for back in range(4) if i >= back]
        u = F.silu(sum(seen) + ssm.conv.bias)
        dt, B, C = layer.x_proj(u).split([1, 4, 4], dim=-1)
        delta = F.softplus(ssm.dt_proj(dt)).unsqueeze(-1)
        state = torch.exp(delta * A) * state + delta * B.unsqueeze(1) * u.unsqueeze(-1)
        y = (state * C.unsqueeze(1)).sum(-1) + ssm.D * u
        out[:, place] = ssm.out_proj(y * F.silu(z[:, i]))
    torch.testing.assert_close(layer(x, size), out)


def test_dit_is_the_one_of_diffusers():
    """The whole model in float64, with the weights copied: patches, blocks, head. Time and labels are ours."""
    from diffusers import DiTTransformer2DModel

    label = {"conditions": {"y": {"name": "class-label", "num_labels": 10}}, "add": ()}
    ours = randomize(build("dit-debug", **label)).double().eval()
    shape = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    shape |= {"in_channels": 3, "out_channels": 3, "num_embeds_ada_norm": 10, "norm_eps": 1e-6}
    theirs = DiTTransformer2DModel(**shape).double().eval()
    x, t, y = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.rand(2), torch.tensor([3, 7])
    vector = ours.time_embedding(t) + ours.condition(y=y, size=(8, 8)).vector

    class Given(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return vector

    with torch.no_grad():
        theirs.pos_embed.proj.weight.copy_(ours.patchify.proj.weight.view(32, 2, 2, 3).permute(0, 3, 1, 2))
        theirs.pos_embed.proj.bias.copy_(ours.patchify.proj.bias)
        theirs.pos_embed.pos_embed.copy_(sincos_position(32, 4, 4))
        for own, other in zip(ours.blocks, theirs.transformer_blocks, strict=True):
            other.norm1.emb = Given()
            for name, part in zip(("to_q", "to_k", "to_v"), own.self_attention.qkv.weight.chunk(3), strict=True):
                getattr(other.attn1, name).weight.copy_(part)
            for name, part in zip(("to_q", "to_k", "to_v"), own.self_attention.qkv.bias.chunk(3), strict=True):
                getattr(other.attn1, name).bias.copy_(part)
            other.attn1.to_out[0].load_state_dict(own.self_attention.out_proj.state_dict())
            other.norm1.linear.load_state_dict(own.adaln.linear.state_dict())
            other.ff.net[0].proj.load_state_dict(own.ffn.up.state_dict())
            other.ff.net[2].load_state_dict(own.ffn.down.state_dict())
        theirs.proj_out_1.load_state_dict(ours.head_adaln.linear.state_dict())
        theirs.proj_out_2.load_state_dict(ours.head.proj.state_dict())
        expected = theirs(x, timestep=t, class_labels=y).sample
        torch.testing.assert_close(ours(x, t, y=y), expected)


def test_zigma_scans_in_zigzag_and_its_head_does_not_see_the_time():
    model = randomize(build("zigma-debug", depth=9)).eval()
    assert tuple(block.mamba.order for block in model.blocks) == (*ZIGZAG_ORDERS, ZIGZAG_ORDERS[0])
    x, t = torch.randn(1, 3, 4, 6), torch.rand(1)
    assert isinstance(model.head_adaln, PlainNorm) and model.widths[-1] == 0
    normed = F.rms_norm(torch.randn(1, 5, 32), (32,), eps=1e-5)
    torch.testing.assert_close(model.head_adaln.norm(normed), F.layer_norm(normed, (32,)), rtol=1e-3, atol=1e-4)
    for block in model.blocks:
        torch.nn.init.zeros_(block.adaln.linear.weight)
    assert torch.equal(model(x, t), model(x, t / 2)), "the time still reaches the image"


def test_a_u_shape_halves_and_mirrors():
    model = on_meta("usm-b")
    assert [model.level(i) for i in range(25)] == [0] * 4 + [1] * 4 + [2] * 4 + [3] + [2] * 4 + [1] * 4 + [0] * 4
    rest = on_meta("usm-xl")  # 28 blocks on either side are not divisible by 3: one of them joins the middle
    assert [rest.level(i) for i in (8, 9, 26, 27, 28, 29, 30, 47, 48)] == [0, 1, 2, 3, 3, 3, 2, 1, 0]
    assert model.grids((32, 16))[12] == (4, 2) and model.multiple == 8
    with pytest.raises(ValueError, match="height and width of x must be positive multiples of 8"):
        model(torch.zeros(1, 4, 12, 16, device="meta"), torch.zeros(1, device="meta"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 4}, "depth must be odd"),
        ({"depth": "5"}, "depth must be a whole number from 1 to 1000, got '5'"),
        ({"levels": 3}, "levels must be from 1 to the 2 blocks before the middle one, got 3"),
        ({"levels": "2"}, "levels must be from 1 to the 2 blocks before the middle one, got '2'"),
    ],
)
def test_a_shape_that_cannot_be_is_rejected_before_its_blocks_are_built(settings, message, monkeypatch):
    monkeypatch.setattr("ssmgen.models.token_model.Block", lambda *_: pytest.fail("a block was built"))
    with pytest.raises(ValueError, match=message):
        build("usm-debug", **settings)


def test_skips_carry_the_first_half_past_the_middle():
    model = randomize(build("usm-debug")).eval()
    x, t = torch.randn(1, 3, 4, 8), torch.rand(1)
    before = model(x, t)
    for skip in model.skips:
        skip.weight.data[:, 32:] = 0  # what the skip brings
    assert not torch.allclose(before, model(x, t))
    with torch.no_grad():
        for layer in model.up:  # the coarse grids are cut off: the image then comes through the skips alone
            layer.weight.zero_()
            layer.bias.zero_()
        assert torch.equal(model(x, t), model(x + 1, t))


def test_a_u_shape_reads_a_condition_on_every_grid():
    model = randomize(build("usm-debug", add=(), cross={"mask": "cross-mamba"})).eval()
    x, t, mask = torch.randn(1, 3, 4, 8), torch.rand(1), torch.randint(0, 19, (1, 4, 8))
    assert [state["cross_mamba"].B.shape[1] for state in model.condition(mask).blocks] == [32, 8, 2, 8, 32]
    assert torch.equal(model(x, t, mask), model(x, t, cond=model.condition(mask)))
    assert not torch.allclose(model(x, t, mask), model(x, t, (mask + 1) % 19))


def test_dim_pads_the_lines_with_tokens_that_matter():
    model = randomize(build("dim-debug")).eval()
    x, t = torch.randn(1, 3, 4, 8), torch.rand(1)
    before = model(x, t)
    assert model.grids((2, 4))[0] == (5, 7) and before.shape == x.shape
    with torch.no_grad():
        model.pad_tokens.add_(1)
    assert not torch.allclose(before, model(x, t))
    with pytest.raises(ValueError, match="DiM works on a padded grid and has no layers that read conditions"):
        build("dim-debug", cross={"mask": "cross-mamba"})
    with pytest.raises(ValueError, match="pad must be at least 1, got 0"):
        build("dim-debug", pad=0)


@pytest.mark.parametrize("name", ["zigma-debug", "usm-debug", "dim-debug"])
def test_dtypes_autocast_and_activation_checkpoints(name):
    model = randomize(build(name), std=0.1)
    x, t, mask = torch.randn(2, 3, 4, 8), torch.rand(2), torch.randint(0, 19, (2, 4, 8))
    out = model(x, t, mask)
    plain = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    model.checkpoint_activations = True
    kept = torch.autograd.grad(model(x, t, mask).square().sum(), list(model.parameters()))
    for first, second in zip(plain, kept, strict=True):
        torch.testing.assert_close(first, second)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, t, mask)
    low = model.eval().bfloat16()(x.bfloat16(), t, mask)
    assert low.dtype == torch.bfloat16
    for other in (mixed, low):
        assert (other.float() - out).norm() / out.norm() < 0.05
    double = model.double()(x.double(), t, mask)
    assert double.dtype == torch.float64


@pytest.mark.parametrize("name", ["usm-debug", "dim-debug"])
def test_a_block_after_the_middle_reads_its_counterpart(name):
    model = randomize(build(name)).eval()
    made, read = {}, {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, given, out, i=i: made.update({i: out}))
    for i, skip in enumerate(model.skips):
        skip.register_forward_pre_hook(lambda module, given, i=i: read.update({i: given[0]}))
    model(torch.randn(1, 3, 4, 8), torch.rand(1))
    assert sorted(read) == [0, 1]
    for i, given in read.items():
        assert torch.equal(given[..., 32:], made[1 - i])  # blocks 3 and 4 read those of 1 and 0


def test_the_tokens_of_dim_lie_at_the_ends_of_lines():
    model = randomize(build("dim-debug")).eval()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(torch.randn(2, 3, 4, 8), torch.rand(2))
    grid = seen[0].unflatten(1, (5, 7))
    assert torch.equal(grid[:, :2, 4:], model.pad_tokens.expand(2, 2, 3, 32))
    assert torch.equal(grid[:, 2:], model.pad_tokens.view(1, 3, 1, 32).expand(2, 3, 7, 32))
