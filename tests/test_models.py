"""What SISMA and its rivals promise beyond what holds for every model, see test_contracts.py."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize

from ssmgen import build
from ssmgen.models.summary import summarize
from ssmgen.ops import SCAN_ORDERS

COMPONENTS = {"self_mamba": 6_680_576, "cross_mamba": 8_777_728, "ffn": 8_393_728, "adaln": 9_446_400}


def debug(name="sisma-debug", **overrides):
    return randomize(build(name, **overrides), std=0.1)


def inputs(model, batch=2, size=(8, 12)):
    scale = model.mask_scale
    x = torch.randn(batch, model.in_channels, *size)
    mask = torch.randint(0, model.num_classes, (batch, size[0] * scale, size[1] * scale))
    return x, torch.rand(batch), mask


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_papers_parameter_count():
    with torch.device("meta"):
        model = build("sisma-xl")
    assert count(model.blocks) == 799_162_368
    assert len(model.blocks) == 24
    for name, parameters in COMPONENTS.items():
        assert count(getattr(model.blocks[0], name)) == parameters, name
    outside = count(model) - count(model.blocks) - count(model.conditions.mask.encoder)
    assert outside == 1_312_768 + 17_408 + 2_099_200 + 16_400


@pytest.mark.parametrize("mask_input", ["none", "add"])
@pytest.mark.parametrize("u", ["mask", "image"])
@pytest.mark.parametrize("gates", [True, False])
def test_every_weight_is_trained(mask_input, u, gates):
    model = debug(mask_input=mask_input, u=u, gates=gates)
    x, t, mask = inputs(model)
    model(x, t, mask).square().mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


def test_a_fresh_model_predicts_zero_and_still_learns():
    model = build("sisma-debug")
    x, t, mask = inputs(model)
    assert not model(x, t, mask).any()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = (model(x, t, mask) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("mask_input", ["none", "add"])
@pytest.mark.parametrize("u", ["mask", "image"])
def test_condition_once_gives_the_same_numbers(mask_input, u):
    model = debug(mask_input=mask_input, u=u).eval()
    x, t, mask = inputs(model)
    assert torch.equal(model(x, t, mask), model(x, t, cond=model.condition(mask)))


@pytest.mark.parametrize("mixer", ["mamba2", {"name": "self-attention", "num_heads": 2}])
def test_any_mixer_fits_the_slot_and_gives_the_same_images_in_any_batch(mixer):
    model = debug(mixer=mixer, cross={"mask": "cross-mamba"})
    x, t, mask = inputs(model)
    out = model(x, t, mask)
    out.square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    torch.testing.assert_close(model(x[1:], t[1:], mask[1:]), out[1:], rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, mask), out, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, t, mask).isfinite().all()


def test_rivals_have_the_sizes_they_claim():
    with torch.device("meta"):
        equal = count(build("sisma-attn-xl", ffn_ratio=7.365).blocks)
        published = {"dit-s": 33e6, "dit-b": 130e6, "dit-l": 458e6, "dit-xl": 675e6}  # DiT, table 1, patch 2
        dits = {name: build(name) for name in published}  # ours have a mask encoder where DiT has a class table
    assert equal == pytest.approx(799_162_368, rel=1e-3)
    for name, parameters in published.items():
        assert count(dits[name]) - count(dits[name].conditions) == pytest.approx(parameters, rel=0.02), name
    with torch.device("meta"):
        assert count(build("sdm")) == 652_998_403  # SISMA's paper: 653 M
    with pytest.raises(ValueError, match="condition 'mask' is not used: give it a layer"):
        build("dit-debug", mask_input="none")


def test_one_hot_labels_and_labels_at_latent_size():
    model = randomize(build("sisma-s", dim=64, depth=1, mask_scale=4)).eval()
    x, t, mask = inputs(model, size=(4, 6))
    one_hot = F.one_hot(mask, 19).movedim(-1, 1).float()
    torch.testing.assert_close(model(x, t, mask), model(x, t, one_hot), rtol=1e-4, atol=1e-5)
    coarse = mask[:, ::4, ::4]
    repeated = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(model(x, t, coarse), model(x, t, repeated))


def test_small_parts_are_seen_at_image_resolution():
    model = randomize(build("sisma-s", dim=64, depth=1)).eval()
    x, t, mask = inputs(model, batch=1, size=(4, 4))
    changed = mask.clone()
    changed[0, 5, 9] = (mask[0, 5, 9] + 1) % 19  # one pixel, which sampling every eighth would skip
    assert not torch.equal(model(x, t, mask), model(x, t, changed))


def test_no_mask_is_the_all_zero_one_hot():
    model = debug().eval()
    x, t, mask = inputs(model)
    zero = torch.zeros(1, 19, *mask.shape[1:])
    torch.testing.assert_close(model(x, t), model(x, t, cond=model.condition(zero)))
    torch.testing.assert_close(model(x, t), model(x, t, cond=model.condition(None, size=(8, 12))))


def test_mask_dropout_acts_in_training_only():
    model = debug(mask_dropout=0.5)
    x, t, mask = inputs(model, batch=64)
    mask = mask[:1].expand(64, -1, -1)
    x, t = x[:1].expand(64, -1, -1, -1), t[:1].expand(64)
    null, full = model.eval()(x[:1], t[:1]), model(x[:1], t[:1], mask[:1])
    dropped = torch.isclose(model.train()(x, t, mask), null, atol=1e-5).flatten(1).all(1)
    kept = torch.isclose(model(x, t, mask), full, atol=1e-5).flatten(1).all(1)
    assert 15 < dropped.sum() < 49 and 15 < kept.sum() < 49
    assert torch.isclose(model.eval()(x, t, mask), full, atol=1e-5).all()


def test_layers_cycle_through_the_orders():
    with torch.device("meta"):
        model = build("sisma-xl")
    assert [block.self_mamba.ssm.order for block in model.blocks] == list(SCAN_ORDERS) * 3
    assert [block.cross_mamba.ssm.order for block in model.blocks] == list(SCAN_ORDERS) * 3
    assert {b.self_mamba.ssm.order for b in build("sisma-debug", orders=["column"]).blocks} == {"column"}


def test_a_narrow_model_is_warned_about():
    with pytest.warns(UserWarning, match="width 32 is under twice the 48 values"):
        build("sisma-debug", patch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build("sisma-debug")


BAD = {
    "both mask and cond": (lambda m, x, t, k: m(x, t, k, cond=m.condition(k)), ValueError, "either mask or cond"),
    "time of another batch": (lambda m, x, t, k: m(x, t[:1].expand(3), k), ValueError, r"t must be \(2,\)"),
    "channels": (lambda m, x, t, k: m(x[:, :2], t, k), ValueError, r"x must be \(batch, 3"),
    "mask of another size": (lambda m, x, t, k: m(x, t, k[:, :4]), ValueError, "takes a mask of 8 x 12"),
    "condition of another size": (
        lambda m, x, t, k: m(x[..., :8], t, cond=m.condition(k)),
        ValueError,
        r"made for \(4, 6\)",
    ),
    "condition of another batch": (
        lambda m, x, t, k: m(torch.cat([x, x]), torch.cat([t, t]), cond=m.condition(k)),
        ValueError,
        "made for batch 2",
    ),
    "modulation of another model": (
        lambda m, x, t, k: m(x, None, k, modulation=torch.zeros(1, 7)),
        ValueError,
        r"modulation must be \(2, 640\)",
    ),
    "no time": (lambda m, x, t, k: m(x, None, k), ValueError, r"t must be \(2,\).*got None"),
    "conditions for unequal parts": (
        lambda m, x, t, k: m(x, t, cond=[m.condition(k[:1])] * 3),
        ValueError,
        "3 conditions cannot serve equal parts of a batch of 2",
    ),
    "label out of range": (lambda m, x, t, k: m(x, t, k + 1), ValueError, r"label 19 .*outside 0\.\.18"),
    "float labels": (lambda m, x, t, k: m(x, t, k.float()), TypeError, "must be integers"),
    "null without size": (lambda m, x, t, k: m.condition(None), ValueError, r"size=\(height, width\)"),
    "more masks than images": (
        lambda m, x, t, k: build("sisma-debug", mask_input="add")(x[:1], t[:1], k),
        ValueError,
        "made for batch 2, x has batch 1",
    ),
    "x of another dtype": (
        lambda m, x, t, k: m(x.double(), t, k),
        TypeError,
        "x is torch.float64 but the model's weights",
    ),
    "mask_input": (lambda m, x, t, k: build("sisma-debug", mask_input="sum"), ValueError, "'none' or 'add'"),
    "mask_dropout": (lambda m, x, t, k: build("sisma-debug", mask_dropout=1.0), ValueError, r"in \[0, 1\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_explained(case):
    call, error, message = BAD[case]
    model = debug()
    x, t, mask = inputs(model)
    mask[0, 0, 0] = 18
    with pytest.raises(error, match=message):
        call(model, x, t, mask)


def test_summary_counts_the_products_of_attention():
    model = summarize("dit-s", size=32)
    linear = 2 * 256 * (12 * 12 * 384**2)  # qkv, output and feed-forward hold 12 d^2 weights in each of 12 blocks
    attention = 2 * 2 * 256**2 * 384 * 12
    assert model.matrix_flops == pytest.approx(linear + attention, rel=0.05)
    assert model.scan_flops == 0 and model.activation_bytes > 0


def test_summary_adds_up():
    summary = summarize("sisma-xl")
    assert sum(v for k, v in summary.parameters.items() if k.startswith("blocks / ")) == 799_162_368
    text = "\n".join(summary.lines())
    assert "799,162,368" in text and "TFLOP" in text
    # Twice the multiply-adds of every matrix that acts on 256 tokens, per block; AdaLN acts once on the vector.
    per_token = 2 * (COMPONENTS["self_mamba"] + COMPONENTS["cross_mamba"] + COMPONENTS["ffn"]) * 24 * 256
    assert 0.95 * per_token < summary.matrix_flops < 1.1 * per_token


@pytest.mark.slow
def test_sisma_xl_takes_a_forward_step_in_memory():
    model = build("sisma-xl").eval()
    x, t, mask = inputs(model, batch=1, size=(32, 32))
    with torch.no_grad():
        torch.nn.init.normal_(model.head.proj.weight, std=0.02)
        out = model(x, t, mask)
    assert out.shape == x.shape and torch.isfinite(out).all() and out.any()


def test_cross_attention_is_told_where_a_label_is():
    cond = build("sisma-attn-debug").condition(torch.zeros(1, 8, 8, dtype=torch.uint8))
    keys = cond.blocks[0]["cross_attention"].k[0, 0]
    assert (keys[0] - keys[1]).abs().max() > 1e-3, "tokens of one label differ by their places"
