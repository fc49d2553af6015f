"""Attention between the regions of a mask."""

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize

import ssmgen
from ssmgen import build
from ssmgen.models import TokenModel
from ssmgen.nn import RegionAttention, Signal

SIZE = (2, 3)
CLASSES = torch.tensor([[0, 2, 0, 1, 2, 0], [3] * 6])  # the second mask is null
SMALL = {"dim": 32, "depth": 2, "d_state": 4, "in_channels": 3, "mask_scale": 1, "num_classes": 5, "patch_size": 1}


def layer():
    torch.manual_seed(0)
    return randomize(RegionAttention(8, 3, num_heads=2).double(), std=0.3)


def tokens(seed=0):
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signal(classes=CLASSES):
    return Signal(torch.zeros(len(classes), 6, 8, dtype=torch.float64), SIZE, classes=classes)


def by_hand(block, x, classes):
    """The output for one image ``(l, d)``, region by region."""
    present = sorted(set(classes.tolist()))
    regions = torch.stack([x[classes == k].mean(0) + block.embedding[k] for k in present])
    heads = []
    for q, k, v in zip(*(part.chunk(2, dim=-1) for part in block.qkv(regions).chunk(3, dim=-1)), strict=True):
        heads.append(torch.softmax(q @ k.T / 2, dim=-1) @ v)  # 2 is the root of a head's width
    learned = torch.cat(heads, dim=-1)
    own = torch.stack([learned[present.index(k)] for k in classes.tolist()])
    return block.out_proj(own * F.silu(block.gate(x)))


def test_it_is_attention_between_the_means_of_regions():
    block, x = layer(), tokens()
    out = block(x, block.condition(signal(), SIZE), SIZE)
    expected = torch.stack([by_hand(block, *each) for each in zip(x, CLASSES, strict=True)])
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def test_what_one_region_shows_reaches_another_and_stays_in_its_image():
    block, x = layer(), tokens().requires_grad_()
    out = block(x, block.condition(signal(), SIZE), SIZE)
    (gradient,) = torch.autograd.grad(out[0, 3].sum(), x)  # the only token of class 1
    assert (gradient[0, [1, 4]].abs() > 1e-6).all() and not gradient[1].any()


def test_a_state_serves_its_part_of_a_batch_and_plain_tokens_are_one_region():
    block, x = layer(), tokens()
    states = [block.condition(signal(CLASSES[i : i + 1]), SIZE) for i in range(2)]
    torch.testing.assert_close(block(x, states, SIZE), block(x, block.condition(signal(), SIZE), SIZE))
    torch.testing.assert_close(block(x, tokens(1), SIZE)[1], block(x, states[1], SIZE)[1])
    with pytest.raises(ValueError, match="made for 6 tokens, the content has 9"):
        block(tokens()[:, [0, 1, 2] * 3], states, (3, 3))


def test_mirrored_classes_are_one_region():
    block, x = layer(), tokens()
    pairs = randomize(RegionAttention(8, 3, num_heads=2, mirrored=[(1, 2)]).double(), std=0.3)
    pairs.load_state_dict(block.state_dict())
    together = signal(torch.where(CLASSES == 2, 1, CLASSES))
    torch.testing.assert_close(
        pairs(x, pairs.condition(signal(), SIZE), SIZE), block(x, block.condition(together, SIZE), SIZE)
    )
    model = TokenModel(mixer="self-mamba", cross={"mask": "region-attention"}, mirrored=[[3, 4]], **SMALL)
    assert [block.region_attention.mirrored for block in model.blocks] == [[(3, 4)]] * 2


def test_gradients_are_those_of_differences():
    block = layer()
    state = block.condition(signal(), SIZE)
    torch.autograd.gradcheck(lambda x: block(x, state, SIZE), tokens().requires_grad_())


def test_several_layers_read_one_condition():
    cross = {"mask": ["conditioned-mamba", "region-attention"]}
    model = TokenModel(mixer=None, cross=cross, mask_dropout=0.1, **SMALL)
    names = [key for key, _ in model.blocks[0].named_children()]
    assert names == ["adaln", "conditioned_mamba", "region_attention", "ffn"]
    x, mask = torch.randn(2, 3, 4, 6), torch.randint(0, 5, (2, 4, 6))
    images = ssmgen.sample(randomize(model).eval(), x, mask=mask, steps=2, guidance_scale=2.0)
    others = ssmgen.sample(model, x, mask=mask.flip(0), steps=2, guidance_scale=2.0)
    assert images.isfinite().all() and not torch.allclose(images, others)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        t = torch.rand(2)
        torch.testing.assert_close(compiled(x, t, mask), model(x, t, mask), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="num_heads must divide dim, got dim=8, num_heads=3"):
        RegionAttention(8, 3, num_heads=3)
    for pair in ((1, 1), (0, 3), (-1, 0), (0, 1, 2), 1):
        with pytest.raises(ValueError, match=r"mirrored holds pairs of classes from 0 to 2, got [(1]"):
            RegionAttention(8, 3, mirrored=[pair])
    with pytest.raises(ValueError, match="mirrored has the class 1 in two pairs"):
        RegionAttention(8, 3, mirrored=[(0, 1), (2, 1)])
    with pytest.raises(ValueError, match="condition 'mask' is not used"):
        TokenModel(mixer="self-mamba", cross={"mask": []}, **SMALL)
    with pytest.raises(TypeError, match="cross of 'mask' must be a spec or a list of specs, got 3"):
        TokenModel(mixer="self-mamba", cross={"mask": 3}, **SMALL)
    with pytest.raises(ValueError, match="every layer needs a key of its own"):
        TokenModel(mixer=None, cross={"mask": ["conditioned-mamba"] * 2}, **SMALL)
    with pytest.raises(ValueError, match="mixer=None leaves the image tokens unmixed"):
        build("sisma-debug", mixer=None, cross={"mask": []}, add=["mask"])
