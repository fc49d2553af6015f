"""Sequences of another length than the image's: padding is never read, and the layers that read them."""

import math

import pytest
import torch

import ssmgen
from ssmgen import build
from ssmgen.nn import CrossMamba, SequenceCrossMamba, Signal

SIZE, WIDTH = (4, 6), 16
LAYERS = ("cross-attention", "cross-mamba-sequence")
GUIDED = {"steps": 2, "guidance_scale": {"mask": 2, "text": 4}}
LENGTHS = torch.tensor([7, 3, 1])


def made(**more):
    torch.manual_seed(0)
    return build("token-sequence", dim=8, width=WIDTH, **more)


def tokens(batch=3, length=7):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1))


def padded(vectors, more, value=0.0):
    return torch.cat([vectors, torch.full((len(vectors), more, WIDTH), value)], dim=1)


def model(layer, **more):
    """As small as it gets, and its heads are not zero: a new model predicts zero whatever it is told."""
    torch.manual_seed(0)
    text = {"name": "token-sequence", "width": WIDTH, **more}
    net = build(
        "sisma-debug", conditions={"mask": "label-map", "text": text}, cross={"mask": "cross-mamba", "text": layer},
        dim=32, depth=2, num_classes=5, scale=1, dropout=0.1,
    )  # fmt: skip
    for parameter in net.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


def test_padding_changes_nothing_whatever_it_holds():
    condition, vectors = made(pooled=True), tokens()
    signal = condition({"tokens": vectors, "lengths": LENGTHS})
    assert signal.valid.sum(dim=1).tolist() == [7, 3, 1] and signal.grid is None
    more = condition({"tokens": padded(vectors, 2, math.nan), "lengths": LENGTHS})
    torch.testing.assert_close(more.vector, signal.vector)
    for item, length in enumerate(LENGTHS.tolist()):
        alone = condition(vectors[item : item + 1, :length])
        for one in (signal, more):
            torch.testing.assert_close(one.tokens[item, :length], alone.tokens[0])
            torch.testing.assert_close(one.vector[item], alone.vector[0])


def test_the_null_is_one_learned_token():
    condition = made(pooled=True)
    null = condition(None)
    assert null.tokens.shape == (1, 1, 8) and null.batch == 1
    torch.testing.assert_close(null.tokens[0, 0], condition.nothing)
    dropped = condition(tokens(), keep=torch.tensor([True, False, True]))
    assert dropped.valid.sum(dim=1).tolist() == [7, 1, 7]
    torch.testing.assert_close(dropped.tokens[1, 0], null.tokens[0, 0])
    torch.testing.assert_close(dropped.vector[1], null.vector[0])


def test_dropout_acts_in_training_only_on_whole_items():
    condition, vectors = made(dropout=0.5), tokens(1, 3).expand(64, 3, WIDTH)
    assert condition.eval()(vectors).valid is None
    signal = condition.train()(vectors)
    lengths = signal.valid.sum(dim=1)
    dropped = lengths == 1
    assert 15 < int(dropped.sum()) < 49 and bool((lengths[~dropped] == 3).all())
    torch.testing.assert_close(signal.tokens[dropped, 0], condition.nothing.expand(int(dropped.sum()), 8))


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (torch.zeros(2, 7, 15), ValueError, r"must be \(batch, length, 16\), got \(2, 7, 15\)"),
        (torch.zeros(2, 16), ValueError, "must be"),
        (torch.zeros(2, 0, 16), ValueError, "must be"),
        (torch.zeros(2, 7, 16, dtype=torch.long), TypeError, "floating point, got torch.int64: give features, not ids"),
        (
            {"tokens": tokens(), "lengths": [7, 8, 1]},
            ValueError,
            "beyond the sequence: item 1 has length 8 of 7 tokens",
        ),
        ({"tokens": tokens(), "lengths": [7, 0, 1]}, ValueError, "item 1 has length 0: give at least one token"),
        ({"tokens": tokens(), "lengths": [7, -2, 1]}, ValueError, "item 1 has length -2"),
        ({"tokens": tokens(), "lengths": [7.0, 1.0, 2.0]}, TypeError, "lengths must be integers"),
        ({"tokens": tokens(), "lengths": [[7], [1], [2]]}, ValueError, r"lengths must be \(3,\), one per item"),
        ({"tokens": tokens(), "length": [7, 1, 2]}, TypeError, "takes no 'length'. Did you mean 'lengths'"),
        ({"lengths": [7]}, TypeError, "needs tokens"),
        (torch.full((1, 7, 16), math.inf), ValueError, "token 0 of item 0 holds values that are not finite"),
    ],
)
def test_what_is_no_such_sequence_is_rejected(value, error, said):
    with pytest.raises(error, match=said):
        made()(value)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_layer_reads_no_padding(layer, dtype):
    torch.manual_seed(0)
    block = build(layer, dim=32).to(dtype)
    x, given = torch.randn(3, 24, 32, dtype=dtype), torch.randn(3, 7, 32, dtype=dtype)
    valid = torch.arange(7) < LENGTHS[:, None]
    out = block(x, [block.condition(Signal(given, valid=valid), SIZE)], SIZE)
    close = {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else {}
    for item, length in enumerate(LENGTHS.tolist()):
        one = slice(item, item + 1)
        alone = block(x[one], [block.condition(Signal(given[one, :length]), SIZE)], SIZE)
        torch.testing.assert_close(out[one], alone, **close)
        assert length == 7 or not torch.allclose(block(x[one], given[one], SIZE), alone, atol=1e-3)


def recurrence(block, u, delta, B):
    """The last state, step by step."""
    A, h = -block.ssm.A_log.exp(), 0.0
    for k in range(u.shape[1]):
        step = torch.nn.functional.softplus(delta[:, k] + block.ssm.dt_proj.bias)
        h = torch.exp(step[..., None] * A) * h + (step * u[:, k])[..., None] * B[:, k, None]
    return h


def test_the_state_is_that_of_the_recurrence_in_both_directions():
    torch.manual_seed(0)
    block = SequenceCrossMamba(16).double()
    given, x = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 24, 16, dtype=torch.float64)
    u = block.ssm.mix_locally(block.cond_proj(given), (1, 5))
    dt, B = block.cond_x_proj(u).split([block.ssm.dt_rank, block.ssm.d_state], dim=-1)
    delta = block.ssm.step_size(dt)
    h = recurrence(block, u, delta, B) + recurrence(block, u.flip(1), delta.flip(1), B.flip(1))
    state = block.condition(given, SIZE)
    torch.testing.assert_close(state.h, h)
    content, z = block.in_proj(x).chunk(2, dim=-1)
    C = block.x_proj(block.ssm.mix_locally(content, SIZE))
    y = torch.einsum("bln,ben->ble", C, h) + (block.ssm.D * u.mean(dim=1)).unsqueeze(1)
    torch.testing.assert_close(block(x, [state], SIZE), block.ssm.finish(y, z))


def test_the_order_of_the_tokens_matters():
    torch.manual_seed(0)
    block, given, x = SequenceCrossMamba(16), torch.randn(1, 5, 16), torch.randn(1, 24, 16)
    assert not torch.allclose(block(x, given, SIZE), block(x, given[:, [1, 0, 2, 3, 4]], SIZE), atol=1e-4)


def test_parameters_are_those_of_cross_mamba_and_all_have_a_gradient():
    torch.manual_seed(0)
    block = SequenceCrossMamba(16)
    assert {n: p.shape for n, p in block.named_parameters()} == {
        n: p.shape for n, p in CrossMamba(16).named_parameters()
    }
    block(torch.randn(2, 24, 16), torch.randn(2, 5, 16), SIZE).square().sum().backward()
    assert all(bool(p.grad.any()) for p in block.parameters())


def test_gradients_of_the_state():
    torch.manual_seed(0)
    block = SequenceCrossMamba(2, d_state=2, d_conv=1).double()
    x, given = (torch.randn(1, n, 2, dtype=torch.float64, requires_grad=True) for n in (6, 3))
    valid = torch.tensor([[True, True, False]])
    torch.autograd.gradcheck(
        lambda x, given: block(x, [block.condition(Signal(given, valid=valid), (2, 3))], (2, 3)), (x, given)
    )


@pytest.mark.parametrize("layer", ["cross-mamba", {"name": "cross-attention", "position": True}])
def test_layers_on_the_grid_refuse_a_sequence(layer):
    with pytest.raises(ValueError, match="'text' is a sequence: read it with 'cross-mamba-sequence'"):
        model(layer)
    alone = ssmgen.registry.make(layer, dim=8)
    with pytest.raises(ValueError, match="sequence of its own length: read it with 'cross-mamba-sequence'"):
        alone.condition(ssmgen.conditions.Signal(torch.randn(1, 6, 8)), (2, 3))  # as many tokens as the grid has


def test_a_sequence_decides_what_it_is_scanned_in():
    for name, value in (("directions", 2), ("order", "column"), ("u", "image")):
        with pytest.raises(TypeError, match=f"'cross-mamba-sequence' takes no {name}: it scans"):
            SequenceCrossMamba(32, **{name: value})
    text = {"name": "token-sequence", "width": WIDTH}
    layers = {"mask": "cross-mamba", "text": "cross-mamba-sequence"}
    net = build("sisma-debug", conditions={"mask": "label-map", "text": text}, cross=layers, directions=2, scale=1)
    assert net(torch.randn(1, 3, *SIZE), torch.tensor([0.5]), text=tokens(1)).shape == (1, 3, *SIZE)
    cores = [module for module in net.modules() if isinstance(module, CrossMamba)]
    assert {(type(core), core.ssm.directions) for core in cores} == {(CrossMamba, 2), (SequenceCrossMamba, 1)}
    with pytest.raises(TypeError, match="directions"):
        build("sisma-debug", conditions={"text": text}, cross={"text": {"name": layers["text"], "directions": 2}})


def test_a_sequence_is_not_added_at_the_input():
    kinds = {"mask": "label-map", "text": {"name": "token-sequence", "width": 4}}
    with pytest.raises(ValueError, match="'text' is a sequence and lies on no grid: give it a layer in cross="):
        build("sisma-debug", conditions=kinds, add=("text",))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_model_samples_mixed_lengths_as_each_alone(layer):
    net, noise = model(layer, pooled=True), ssmgen.initial_noise(seeds=[0, 1, 2], shape=(3, *SIZE))
    mask, vectors = torch.randint(0, 5, (3, *SIZE), generator=torch.Generator().manual_seed(2)), tokens()
    text = {"tokens": vectors, "lengths": LENGTHS}
    images = ssmgen.sample(net, noise, mask, text=text, **GUIDED)
    more = {"tokens": padded(vectors, 3, math.nan), "lengths": LENGTHS}
    torch.testing.assert_close(ssmgen.sample(net, noise, mask, text=more, **GUIDED), images, atol=1e-5, rtol=1e-4)
    for i, length in enumerate(LENGTHS.tolist()):
        one = slice(i, i + 1)
        alone = ssmgen.sample(net, noise[one], mask[one], text=vectors[one, :length], **GUIDED)
        torch.testing.assert_close(images[one], alone, atol=1e-5, rtol=1e-4)
    other = ssmgen.sample(net, noise, mask, text=-vectors, **GUIDED)
    assert float((other - images).abs().mean()) > 1e-3


@pytest.mark.parametrize("layer", LAYERS)
def test_an_adaptive_solver_takes_each_images_own_part(layer):
    net, noise = model(layer), ssmgen.initial_noise(seeds=[0, 1, 2], shape=(3, *SIZE))
    text = {"tokens": tokens(), "lengths": LENGTHS}
    images = ssmgen.sample(net, noise, text=text, solver="dopri5")
    alone = ssmgen.sample(net, noise[1:2], text=tokens()[1:2, :3], solver="dopri5")
    torch.testing.assert_close(images[1:2], alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("layer", LAYERS)
def test_conditions_made_once_give_the_same_numbers(layer):
    net, x, t = model(layer), torch.randn(3, 3, *SIZE), torch.rand(3)
    text = {"tokens": tokens(), "lengths": LENGTHS}
    assert torch.equal(net(x, t, cond=net.condition(text=text, size=SIZE)), net(x, t, text=text))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_whole_model_compiles(layer):
    net, x, t = model(layer), torch.randn(3, 3, *SIZE), torch.rand(3)
    text = {"tokens": tokens(), "lengths": LENGTHS}
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, t, text=text), net(x, t, text=text))
