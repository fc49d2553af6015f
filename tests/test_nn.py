"""Blocks: their equations, and how bad calls are explained. What holds for all is in test_contracts.py."""

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from examples import small
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmgen import build
from ssmgen.nn import CrossMamba, GatedDelta, Mamba2, Modulation, SelfMamba, Signal, sincos_position
from ssmgen.ops import SCAN_ORDERS, selective_scan

SIZE = (3, 4)


def tokens(batch=2, dim=16, size=SIZE, seed=0):
    return torch.randn(batch, size[0] * size[1], dim, generator=torch.Generator().manual_seed(seed))


def image(channels=8, size=(6, 8)):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(2))


def one_hot(classes, size=(6, 8)):
    labels = torch.randint(0, classes, (2, *size), generator=torch.Generator().manual_seed(3))
    return F.one_hot(labels, classes).movedim(-1, 1).float()


def test_self_mamba_is_its_equation():
    block = SelfMamba(8, d_state=4, order="column")
    x = tokens(dim=8)
    content, z = F.linear(x, block.in_proj.weight).split(16, dim=-1)
    grid = content.transpose(1, 2).reshape(2, 16, *SIZE)
    u = F.silu(F.conv2d(grid, block.ssm.conv.weight, block.ssm.conv.bias, padding=1, groups=16))
    u = u.transpose(2, 3).flatten(2).transpose(1, 2)  # column by column
    dt, B, C = F.linear(u, block.x_proj.weight).split([1, 4, 4], dim=-1)
    y = selective_scan(
        u,
        F.linear(dt, block.ssm.dt_proj.weight),
        -block.ssm.A_log.exp(),
        B,
        C,
        block.ssm.D,
        delta_bias=block.ssm.dt_proj.bias,
        delta_softplus=True,
        backend="reference",
    )
    y = y.transpose(1, 2).reshape(2, 16, SIZE[1], SIZE[0]).transpose(2, 3).flatten(2).transpose(1, 2)
    expected = F.linear(F.layer_norm(y, (16,)) * F.silu(z), block.ssm.out_proj.weight)
    torch.testing.assert_close(block(x, SIZE), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("u", ["mask", "image"])
def test_cross_mamba_is_its_equation(u):
    block = CrossMamba(8, d_state=4, u=u)
    x, e = tokens(dim=8), tokens(dim=8, seed=1)

    def mixed(sequence):
        grid = sequence.transpose(1, 2).reshape(2, 16, *SIZE)
        conv = F.conv2d(grid, block.ssm.conv.weight, block.ssm.conv.bias, padding=1, groups=16)
        return F.silu(conv).flatten(2).transpose(1, 2)

    content, z = F.linear(x, block.in_proj.weight).split(16, dim=-1)
    c, m = mixed(content), mixed(F.linear(e, block.cond_proj.weight))
    dt, B = F.linear(m, block.cond_x_proj.weight).split([1, 4], dim=-1)
    y = selective_scan(
        m if u == "mask" else c,
        F.linear(dt, block.ssm.dt_proj.weight),
        -block.ssm.A_log.exp(),
        B,
        F.linear(c, block.x_proj.weight),
        block.ssm.D,
        delta_bias=block.ssm.dt_proj.bias,
        delta_softplus=True,
        backend="reference",
    )
    expected = F.linear(F.layer_norm(y, (16,)) * F.silu(z), block.ssm.out_proj.weight)
    torch.testing.assert_close(block(x, e, SIZE), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("u", ["mask", "image"])
@pytest.mark.parametrize("order", ["row", "column-boustrophedon-reversed"])
def test_a_condition_is_computed_once_and_serves_any_batch(u, order):
    block = CrossMamba(16, d_state=4, u=u, order=order)
    x, e = tokens(batch=3), tokens(batch=1, seed=1)
    cond = block.condition(e, SIZE)
    out = block(x, cond, SIZE)
    torch.testing.assert_close(out, block(x, e.expand(3, -1, -1), SIZE), rtol=1e-5, atol=1e-6)
    for i in range(3):
        torch.testing.assert_close(out[i : i + 1], block(x[i : i + 1], cond, SIZE), rtol=1e-5, atol=1e-6)


def test_the_condition_steers_the_content():
    block = CrossMamba(16, d_state=4)
    x = tokens()
    assert not torch.allclose(block(x, tokens(seed=1), SIZE), block(x, tokens(seed=2), SIZE))


@pytest.mark.parametrize("mixer", [SelfMamba, Mamba2, GatedDelta])
@pytest.mark.parametrize("order", SCAN_ORDERS)
def test_a_scan_is_causal_in_its_own_order(order, mixer):
    """With a 1x1 convolution, changing the last token of the sequence changes the output there alone."""
    from ssmgen.ops import scan_order

    block = mixer(8, d_state=2, d_conv=1, order=order)
    x = tokens(batch=1, dim=8)
    permutation = scan_order(order, *SIZE)
    last = 11 if permutation is None else int(permutation.forward[-1])
    changed = x.clone()
    changed[0, last] += 1
    differs = (block(changed, SIZE) - block(x, SIZE)).abs().amax(-1)[0] > 1e-6
    assert differs.nonzero().flatten().tolist() == [last]


def test_step_sizes_start_in_mambas_range_and_decay_is_exempt():
    ssm = SelfMamba(64).ssm
    step = F.softplus(ssm.dt_proj.bias)
    assert step.min() >= 1e-3 * 0.999 and step.max() <= 1e-1 * 1.001
    torch.testing.assert_close(-ssm.A_log.exp(), -torch.arange(1.0, 17).expand(128, 16))
    assert ssm.A_log.no_weight_decay and ssm.D.no_weight_decay


def test_mamba2_is_its_equation():
    block = Mamba2(16, d_state=3, head_dim=8, groups=2)
    x = tokens()
    z, mixed, delta = block.in_proj(x).split([32, 32 + 2 * 6, 4], dim=-1)
    grid = mixed.transpose(1, 2).unflatten(2, SIZE)
    u, B, C = F.silu(block.conv(grid)).flatten(2).transpose(1, 2).split([32, 6, 6], dim=-1)
    delta = F.softplus(delta + block.dt_bias)
    y = torch.zeros(2, x.shape[1], 4, 8)
    for head in range(4):
        H, group = torch.zeros(2, 8, 3), slice(3 * (head // 2), 3 * (head // 2) + 3)
        for k in range(x.shape[1]):
            step, u_k = delta[:, k, head, None, None], u[:, k, 8 * head : 8 * head + 8]
            H = torch.exp(-step * block.A_log[head].exp()) * H + step * u_k[:, :, None] * B[:, k, None, group]
            y[:, k, head] = (H @ C[:, k, group, None])[..., 0] + block.D[head] * u_k
    gated = y.flatten(2) * F.silu(z)
    normed = gated * (gated.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * block.out_norm.weight
    torch.testing.assert_close(block(x, SIZE), block.out_proj(normed), rtol=1e-4, atol=1e-5)
    step = F.softplus(block.dt_bias)
    assert step.min() >= 1e-3 * 0.999 and step.max() <= 1e-1 * 1.001 and block.A_log.no_weight_decay


def test_gated_delta_is_its_equation():
    block = GatedDelta(16, head_dim=8, d_state=3, expand=2)
    x = tokens()
    z, mixed, delta, b = block.in_proj(x).split([32, 24 + 32, 4, 4], dim=-1)
    grid = mixed.transpose(1, 2).unflatten(2, SIZE)
    q, k, v = F.silu(block.conv(grid)).flatten(2).transpose(1, 2).split([12, 12, 32], dim=-1)
    step, beta = F.softplus(delta + block.dt_bias), torch.sigmoid(b)
    out = []
    for head in range(4):
        S, keys, values = torch.zeros(2, 8, 3), slice(3 * head, 3 * head + 3), slice(8 * head, 8 * head + 8)
        q_h, k_h = (part[..., keys] / part[..., keys].norm(dim=-1, keepdim=True) for part in (q, k))
        for t in range(x.shape[1]):
            S = torch.exp(-step[:, t, head, None, None] * block.A_log[head].exp()) * S
            wrong = v[:, t, values] - (S @ k_h[:, t, :, None])[..., 0]
            S = S + beta[:, t, head, None, None] * wrong[:, :, None] * k_h[:, t, None]
            out.append((S @ q_h[:, t, :, None])[..., 0])
    y = torch.stack(out, dim=1).unflatten(1, (4, -1)).transpose(1, 2)
    normed = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * block.out_norm.weight
    torch.testing.assert_close(block(x, SIZE), block.out_proj(normed.flatten(2) * F.silu(z)), rtol=1e-4, atol=1e-5)
    assert block.A_log.no_weight_decay and block.dt_bias.no_weight_decay
    with pytest.raises(ValueError, match="head_dim must divide the inner width expand x dim = 16"):
        GatedDelta(16, head_dim=5)


@pytest.mark.parametrize("mixer", [Mamba2, GatedDelta])
def test_sixteen_bits_and_compilation_of_the_matrix_forms(mixer):
    block, x = mixer(16), tokens()
    expected = block(x, SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = block(x, SIZE)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), expected, rtol=0.1, atol=0.02)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, SIZE), expected, rtol=1e-4, atol=1e-5)
    with torch.device("meta"):
        assert mixer(16)(torch.empty(2, 12, 16), SIZE).shape == (2, 12, 16)


def test_heads_of_mamba2_must_fit():
    with pytest.raises(ValueError, match="head_dim must divide the inner width expand x dim = 32"):
        Mamba2(16, head_dim=5)
    with pytest.raises(ValueError, match="groups the number of heads"):
        Mamba2(16, head_dim=8, groups=3)


def test_non_square_grids_are_told_apart():
    block = SelfMamba(16, d_state=4, order="column")
    assert not torch.allclose(block(tokens(), (3, 4)), block(tokens(), (4, 3)))


BAD_CALLS = {
    "tokens that do not fill the grid": (lambda: SelfMamba(16)(tokens(), (3, 5)), r"x must be \(batch, 15, 16\)"),
    "tokens of another width": (lambda: SelfMamba(8)(tokens(), SIZE), r"x must be \(batch, 12, 8\)"),
    "a condition of another batch": (
        lambda: CrossMamba(16)(tokens(batch=3), tokens(batch=2), SIZE),
        "condition was made for batch 2",
    ),
    "an unknown order": (lambda: SelfMamba(16, order="spiral"), "unknown scan order 'spiral'"),
    "an unknown scanned sequence": (lambda: CrossMamba(16, u="masks"), "u must be 'mask', 'image' or 'sum'"),
    "an even kernel": (lambda: SelfMamba(16, d_conv=4), "d_conv odd"),
    "a width sin-cos cannot fill": (lambda: build("position-embedding", dim=6), "multiple of 4"),
    "other channels": (
        lambda: build("patchify", in_channels=3, dim=8)(torch.zeros(1, 4, 4, 4)),
        r"x must be \(batch, 3",
    ),
    "sides that are no multiple": (
        lambda: build("patchify", in_channels=3, dim=8)(torch.zeros(1, 3, 5, 4)),
        "positive multiples of 2",
    ),
    "a time per token": (lambda: build("time-embedding", dim=8)(torch.zeros(2, 1)), r"t must be \(batch,\)"),
    "a conditioning vector of another width": (
        lambda: build("adaln", dim=8)(torch.zeros(2, 9)),
        r"c must be \(batch, 8\)",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_explained(case):
    call, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_adaln_zero_starts_as_the_identity_of_the_residual():
    (modulation,) = build("adaln", dim=16)(torch.randn(2, 16))
    x = tokens()
    torch.testing.assert_close(modulation.residual(x, torch.randn_like(x)), x)
    torch.testing.assert_close(modulation.norm(x), F.layer_norm(x, (16,), eps=1e-6))


def test_modulation_is_its_equation():
    shift, scale, gate = (torch.randn(2, 1, 16) for _ in range(3))
    x, update = tokens(), tokens(seed=1)
    modulation = Modulation(shift, scale, gate)
    torch.testing.assert_close(modulation.norm(x), F.layer_norm(x, (16,), eps=1e-6) * (1 + scale) + shift)
    torch.testing.assert_close(modulation.residual(x, update), x + gate * update)
    torch.testing.assert_close(Modulation(shift, scale, None).residual(x, update), x + update)


@settings(max_examples=20, deadline=None)
@given(channels=st.integers(1, 4), patch=st.integers(1, 3), height=st.integers(1, 4), width=st.integers(1, 4))
def test_unpatchify_undoes_patchify(channels, patch, height, width):
    values = patch**2 * channels
    cut, join = (
        build("patchify", in_channels=channels, dim=values, patch_size=patch),
        build("unpatchify", dim=values, out_channels=channels, patch_size=patch),
    )
    with torch.no_grad():
        for layer in (cut.proj, join.proj):
            layer.weight.copy_(torch.eye(values))
    x = torch.randn(2, channels, height * patch, width * patch)
    torch.testing.assert_close(join(cut(x), (height, width)), x)


def test_mask_encoder_takes_labels_and_one_hot_alike():
    encoder = build("mask-encoder", dim=16, num_classes=5, patch_size=2)
    labels = torch.randint(0, 5, (2, 6, 8))
    one_hot = F.one_hot(labels, 5).movedim(-1, 1).float()
    torch.testing.assert_close(encoder(labels), encoder(one_hot))
    torch.testing.assert_close(encoder(labels.to(torch.uint8)), encoder(labels))


def test_mask_encoder_is_a_convolution_then_patches():
    encoder = build("mask-encoder", dim=16, num_classes=5, patch_size=2, class_dim=3)
    with torch.no_grad():
        encoder.classes.bias.normal_()
    labels = torch.randint(0, 5, (2, 6, 8))
    features = encoder.classes(F.one_hot(labels, 5).movedim(-1, 1).float())
    patches = F.unfold(features, 2, stride=2).transpose(1, 2).unflatten(2, (3, 4)).transpose(2, 3).flatten(2)
    torch.testing.assert_close(encoder(labels), encoder.proj(patches), rtol=1e-4, atol=1e-5)


def test_a_dropped_mask_is_the_all_zero_one_hot():
    encoder = build("mask-encoder", dim=16, num_classes=5, patch_size=2)
    labels = torch.randint(0, 5, (2, 6, 8))
    dropped = encoder(labels, torch.tensor([True, False]))
    torch.testing.assert_close(dropped[0], encoder(labels)[0])
    torch.testing.assert_close(dropped[1:], encoder(torch.zeros(1, 5, 6, 8)))


@settings(max_examples=30, deadline=None)
@given(
    value=st.one_of(st.integers(5, 10**6), st.integers(-(10**6), -1)), row=st.integers(0, 5), column=st.integers(0, 7)
)
def test_a_label_out_of_range_is_located(value, row, column):
    encoder = build("mask-encoder", dim=16, num_classes=5, patch_size=2)
    labels = torch.zeros(1, 6, 8, dtype=torch.int64)
    labels[0, row, column] = value
    with pytest.raises(ValueError, match=rf"label {value}\b.*0\.\.4.*1 pixel.*\({row}, {column}\)"):
        encoder(labels)


def test_masks_of_the_wrong_kind_are_explained():
    encoder = build("mask-encoder", dim=16, num_classes=5, patch_size=2)
    with pytest.raises(TypeError, match="labels.*must be integers"):
        encoder(torch.zeros(1, 6, 8))
    with pytest.raises(TypeError, match="one-hot mask must be floating"):
        encoder(torch.zeros(1, 5, 6, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="model's 5 classes"):
        encoder(torch.zeros(1, 19, 6, 8))
    with pytest.raises(ValueError, match="multiples of 2"):
        encoder(torch.zeros(1, 5, 8, dtype=torch.int64))


def test_positions_are_distinct_and_do_not_depend_on_the_grid():
    small, large = sincos_position(32, 4, 5), sincos_position(32, 6, 7)
    assert len({tuple(row.tolist()) for row in small}) == 20
    torch.testing.assert_close(small.view(4, 5, 32), large.view(6, 7, 32)[:4, :5])


def test_time_embedding_tells_times_apart():
    out = build("time-embedding", dim=16)(torch.linspace(0, 1, 5))
    assert torch.pdist(out).min() > 1e-3


def test_attention_is_softmax_of_scaled_products():
    x, cond = tokens(), tokens(seed=1)
    cross = randomize(build("cross-attention", dim=16, num_heads=2))
    q, (k, v) = cross.q(x), cross.kv(cond).chunk(2, dim=-1)
    heads = []
    for part in (slice(0, 8), slice(8, 16)):
        weights = (q[..., part] @ k[..., part].mT / 8**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    expected = cross.out_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(cross(x, cond, SIZE), expected, rtol=1e-4, atol=1e-5)
    itself = build("self-attention", dim=16, num_heads=2)
    itself.out_proj = cross.out_proj
    with torch.no_grad():
        itself.qkv.weight.copy_(torch.cat([cross.q.weight, cross.kv.weight]))
        itself.qkv.bias.copy_(torch.cat([cross.q.bias, cross.kv.bias]))
    torch.testing.assert_close(itself(x, SIZE), cross(x, x, SIZE), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cross-mamba", "cross-attention"])
def test_several_conditions_serve_parts_of_the_batch(name):
    block = randomize(small(name))
    x, cond = tokens(batch=4), tokens(batch=2, seed=1)
    first, second = block.condition(cond, SIZE), block.condition(cond[:1], SIZE)
    expected = torch.cat([block(x[:2], first, SIZE), block(x[2:], second, SIZE)])
    torch.testing.assert_close(block(x, [first, second], SIZE), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="made for batch 2"):
        block(tokens(batch=3), first, SIZE)


@pytest.mark.parametrize("name", ["self-attention", "cross-attention"])
def test_heads_must_divide_the_width(name):
    with pytest.raises(ValueError, match="num_heads must divide dim, got dim=16, num_heads=3"):
        build(name, dim=16, num_heads=3)


def test_spade_is_a_group_norm_with_maps_from_the_mask():
    spade = randomize(small("spade"))
    x, mask = image(), one_hot(5)
    scale, shift = spade.maps(F.relu(spade.shared(mask))).chunk(2, dim=1)
    groups = x.view(2, 2, -1)
    normed = ((groups - groups.mean(-1, keepdim=True)) / groups.std(-1, keepdim=True, correction=0)).view_as(x)
    torch.testing.assert_close(spade(x, mask), normed * (1 + scale) + shift, rtol=1e-3, atol=1e-4)
    half = spade.condition(mask, (3, 4))
    expected = spade.maps(F.relu(spade.shared(mask[:, :, ::2, ::2])))
    torch.testing.assert_close(torch.cat(half, dim=1), expected)


@pytest.mark.parametrize("batch", [4, 5])
def test_states_that_cannot_share_a_batch_equally_are_refused(batch):
    for name in ("cross-mamba", "cross-attention"):
        layer = build(name, dim=16, **({"num_heads": 2} if name == "cross-attention" else {}))
        states = [layer.condition(tokens()[:1], SIZE)] * 3
        with pytest.raises(ValueError, match=f"3 conditions cannot serve equal parts of a batch of {batch}"):
            layer(tokens()[:1].expand(batch, -1, -1), states, SIZE)


@pytest.mark.parametrize("gates", [True, False])
def test_a_block_is_its_equation(gates):
    fresh = build("sisma-block", dim=16, d_state=4, gates=gates)
    x, c, e = tokens(), tokens(seed=2)[:, 0], tokens(seed=1)
    assert torch.equal(fresh(x, c, {"mask": e}, SIZE), x) == gates  # AdaLN-Zero starts as the identity
    block = randomize(fresh)
    first, second, third = block.adaln(c)
    expected = first.residual(x, block.self_mamba(first.norm(x), SIZE))
    expected = second.residual(expected, block.cross_mamba(second.norm(expected), e, SIZE))
    expected = third.residual(expected, block.ffn(third.norm(expected)))
    for cond in ({"mask": e}, e, [block.condition({"mask": e}, SIZE)]):
        torch.testing.assert_close(block(x, c, cond, SIZE), expected)
    gate = first.gate if gates else 1
    torch.testing.assert_close(first.residual(x, e), x + gate * e)


def test_layers_say_which_conditions_they_can_read():
    with pytest.raises(ValueError, match="needs a condition with tokens, got a vector alone"):
        build("cross-mamba", dim=16).condition(Signal(vector=torch.zeros(1, 16)), (2, 2))
    with pytest.raises(ValueError, match="needs a condition on the image's grid, got tokens without a grid"):
        build("spade", channels=32, num_classes=5).condition(Signal(tokens=torch.zeros(1, 4, 5)), (2, 2))
