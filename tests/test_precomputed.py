"""What a sampler computes before the first step: kept states, constants of scans, and joined conditions."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from conftest import randomize

import ssmgen
from ssmgen import Sampler, build, sample
from ssmgen.nn import CrossMamba, KeptStates, SelectiveSSM, SelfMamba
from ssmgen.nn.parts import joined
from ssmgen.precomputed import with_states

SIZE, BF16 = (3, 5), torch.bfloat16


@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize(("told", "batch"), [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 0.02)]
)
def test_what_is_read_from_kept_states_is_what_is_scanned(directions, told, batch, dtype, tolerance):
    torch.manual_seed(0)
    layer = randomize(CrossMamba(8, d_state=3, directions=directions, order="column")).to(dtype)
    with torch.no_grad():
        cond = layer.condition(torch.randn(told, 15, 8, dtype=dtype), SIZE)
        kept = layer.keep(cond, SIZE)
        assert kept.h.shape == (told, 15, directions * 3, 16) and kept.h.dtype == dtype
        assert kept.h.numel() * kept.h.element_size() == layer.kept_bytes(cond)
        x = torch.randn(batch, 15, 8, dtype=dtype)
        expected = layer(x, cond, SIZE)
        torch.testing.assert_close(layer(x, kept, SIZE), expected, rtol=tolerance, atol=tolerance)
        other = layer.keep(layer.condition(torch.randn(told, 15, 8, dtype=dtype), SIZE), SIZE)
        both = torch.cat([expected, layer(x, other, SIZE)])
        out = layer(torch.cat([x, x]), [kept, other], SIZE)
        torch.testing.assert_close(out, both, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("u", ["image", "sum"])
def test_states_that_depend_on_the_content_are_not_kept(u):
    layer = CrossMamba(8, u=u)
    cond = layer.condition(torch.randn(1, 15, 8), SIZE)
    assert layer.kept_bytes(cond) == 0 and layer.keep(cond, SIZE) is cond


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.0, "guidance_start": 0.4}])
@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize("name", ["sisma-debug", "told-twice"])
def test_a_sampler_that_keeps_states_gives_the_same_images(monkeypatch, name, masks, settings):
    torch.manual_seed(0)
    model = randomize(built(name), std=0.1)
    x0, mask = torch.randn(2, 3, 8, 12), torch.randint(0, 19, (masks, 8, 12))
    expected = sample(model, x0, mask, steps=3, keep_states=False, **settings)
    reads = []
    read = ssmgen.nn.mamba.read_states
    monkeypatch.setattr("ssmgen.nn.mamba.read_states", lambda states, C: reads.append(len(states)) or read(states, C))
    torch.testing.assert_close(sample(model, x0, mask, steps=3, keep_states=True, **settings), expected)
    assert reads
    reads.clear()
    sample(model, x0, mask, steps=1, **settings)
    assert not reads  # "auto" keeps none on a CPU


def built(name):
    if name == "sisma-debug":
        return build("sisma-debug", mask_dropout=0.1, depth=1)
    words = {"name": "token-sequence", "width": 8, "dropout": 0.1}
    kinds = {"conditions": {"mask": {"name": "label-map", "dropout": 0.1}, "text": words}}
    cross = {"mask": "cross-mamba", "text": "cross-mamba-sequence"}
    return build("sisma-debug", **kinds, cross=cross, depth=1)


def test_states_that_do_not_fit_into_a_gpu_are_an_error_before_any_step(monkeypatch):
    model, mask = build("sisma-debug", depth=1), torch.randint(0, 19, (1, 8, 12))
    with torch.no_grad():
        cond = model.condition(mask)
    needed = 4 * 24 * 16 * 64  # float32, tokens, states, channels
    assert model.kept_bytes(cond) == needed
    monkeypatch.setattr("ssmgen.precomputed.free_memory", lambda device: needed)
    assert isinstance(with_states({"m": cond}, model, torch.device("cuda"))["m"].blocks[0]["cross_mamba"], KeptStates)
    with pytest.raises(ValueError, match=r"take 0.0 GB, and 0.0 GB of the GPU's memory are free: sample fewer masks"):
        with_states({"m": cond, "n": cond}, model, torch.device("cuda"))


def test_keeping_states_is_checked_before_anything_runs():
    for wanted in ("yes", 1, None):
        with pytest.raises(ValueError, match=f"keep_states must be True or False, got {wanted!r}"):
            Sampler(build("sisma-debug"), keep_states=wanted)
    with pytest.raises(ValueError, match="keep_states=True needs a Cross-Mamba with u='mask'"):
        Sampler(build("sdm-debug"), keep_states=True)
    x0, mask = torch.randn(1, 3, 8, 12), torch.randint(0, 19, (1, 8, 12))
    sequence = {"cross": {"mask": "cross-mamba-sequence"}}  # reads a state already
    for model in (build("dit-debug"), build("sisma-debug", u="image"), build("sisma-debug", **sequence)):
        with pytest.raises(ValueError, match="keep_states=True needs a Cross-Mamba with u='mask'"):
            Sampler(model, keep_states=True)(x0, mask, steps=1)
    with pytest.raises(ValueError, match="compile must be True, False or 'max-autotune', got 'fast'"):
        Sampler(build("sisma-debug"), compile="fast")


def test_kept_states_are_for_sampling_and_for_all_conditions():
    model, mask = build("sisma-debug", depth=1), torch.randint(0, 19, (1, 8, 12))
    x, t = torch.randn(2, 3, 8, 12), torch.rand(2)
    with torch.no_grad():
        cond = model.condition(mask)
        kept = model.keep_states(cond)
        for conds in ([kept, cond], [cond, kept]):
            with pytest.raises(TypeError, match="some conditions have kept states and others have none"):
                model(x, t, cond=conds)
    with pytest.raises(RuntimeError, match="no gradients for the scan's weights: read them under torch.no_grad"):
        model(x, t, cond=kept)


def test_a_sampler_runs_each_layer_once_for_all_conditions():
    model, seen = build("sisma-debug", depth=1, mask_dropout=0.1), []
    sampler = Sampler(model)
    step = sampler.step
    sampler.step = lambda x, t, *, cond, **given: seen.append((len(x), len(cond))) or step(x, t, cond=cond, **given)
    sampler(torch.randn(1, 3, 8, 12), torch.randint(0, 19, (1, 8, 12)), steps=2, guidance_scale=2.0)
    assert seen and set(seen) == {(2, 1)}


def test_only_tensors_are_joined():
    one, other = ({"a": torch.zeros(1, 2), "b": (torch.ones(1, 3), None)} for _ in range(2))
    assert joined([one, other], 1)["b"][0].shape == (2, 3)
    for odd in (3, "word", SimpleNamespace(x=torch.zeros(1))):
        assert joined([one | {"c": odd}, other | {"c": odd}], 1) is None, "a layer's own kind of state stays in a list"
    assert joined([one, other], 2) is None and joined([one, other | {"a": torch.zeros(1, 3)}], 1) is None


def test_a_block_that_takes_no_constants_is_given_none(monkeypatch):
    monkeypatch.setattr(SelfMamba, "forward", lambda self, x, size: x)  # as that of a user's block
    model = build("sisma-debug", depth=1)
    assert not model.blocks[0].with_constants
    sample(model, torch.randn(1, 3, 8, 12), torch.randint(0, 19, (1, 8, 12)), steps=1)


def test_a_step_of_sampling_computes_no_constants(monkeypatch):
    """The sampled step computes neither -exp(A_log) nor an order, and training does both as before."""
    model, calls = randomize(build("sisma-debug", depth=2), std=0.1), []
    x, mask = torch.randn(2, 3, 8, 12), torch.randint(0, 19, (1, 8, 12))
    with torch.no_grad():
        cond = model.condition(mask)
    constants = SelectiveSSM.constants
    monkeypatch.setattr(SelectiveSSM, "constants", lambda ssm, size: calls.append(size) or constants(ssm, size))
    with torch.no_grad():
        model(x, torch.rand(2), cond=[cond, cond])
    assert not calls
    model(x, torch.rand(2), cond=cond).sum().backward()  # a condition made without gradients hides none of A_log's
    assert len(calls) == 4 and all(block.self_mamba.ssm.A_log.grad.abs().sum() > 0 for block in model.blocks)


#: Models of one block whose only scan is that of a layer.
WITH_SCAN = {
    "mamba": {"mixer": "mamba", "cross": {}, "add": ("mask",)},
    "conditioned-mamba": {"mixer": None, "cross": {"mask": "conditioned-mamba"}},
    "class-ordered-mamba": {"mixer": None, "cross": {"mask": "class-ordered-mamba"}},
    "joint-mamba": {"mixer": None, "cross": {"mask": "joint-mamba"}},
}


@pytest.mark.parametrize("layer", WITH_SCAN)
def test_each_layer_computes_its_constants_once_for_a_call(monkeypatch, layer):
    """Neither -exp(A_log) nor an order depends on the steps, and the images are those of steps that compute both."""
    torch.manual_seed(0)
    model = randomize(build("sisma-debug", depth=1, mask_dropout=0.1, **WITH_SCAN[layer]), std=0.1)
    x0, mask = torch.randn(1, 3, 8, 12), torch.randint(0, 19, (1, 8, 12))
    calls, constants = [], SelectiveSSM.constants
    monkeypatch.setattr(SelectiveSSM, "constants", lambda ssm, size: calls.append("A") or constants(ssm, size))
    for name in ("mamba", "causal", "joint_mamba", "class_ordered_mamba"):
        module = importlib.import_module(f"ssmgen.nn.{name}")
        order = module.scan_order
        counted = lambda *given, order=order, **options: calls.append("order") or order(*given, **options)  # noqa: E731
        monkeypatch.setattr(module, "scan_order", counted)

    def images(steps):
        calls.clear()
        return sample(model, x0, mask, steps=steps, solver="euler", guidance_scale=2.0)

    images(1)
    once = calls.copy()
    found = images(4)
    assert calls == once and once.count("A") == 2  # of the mask, and of none
    monkeypatch.setattr(ssmgen.nn.block.Block, "condition", without_constants(ssmgen.nn.block.Block.condition))
    assert torch.equal(images(4), found)
    assert calls.count("A") >= 4 and calls.count("order") >= 4


def without_constants(condition):
    """`Block.condition` as before: each state computes its constants again."""

    def leaves_them_out(block, *given):
        made = condition(block, *given)
        kept = {key: state for key, state in made.items() if key not in block.with_constants}
        return {key: state._replace(constants=None) for key, state in kept.items()}

    return leaves_them_out


@pytest.mark.parametrize("keep", [True, False])
def test_weights_that_change_between_calls_count(keep):
    torch.manual_seed(0)
    model = randomize(build("sisma-debug", depth=1), std=0.1)
    x0, mask = torch.randn(1, 3, 8, 12), torch.randint(0, 19, (1, 8, 12))
    sampler = Sampler(model, keep_states=keep)
    images = [sampler(x0, mask, steps=2)]
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n.endswith("A_log")], lr=1e3)
    model(x0, torch.rand(1), mask).square().sum().backward()
    loaded = {n: p + 0.5 if n.endswith("A_log") else p for n, p in model.state_dict().items()}
    for change in (optimizer.step, lambda: model.load_state_dict(loaded)):
        change()
        images.append(sampler(x0, mask, steps=2))
        assert not torch.allclose(images[-1], images[-2])
        assert torch.equal(images[-1], sample(model, x0, mask, steps=2, keep_states=keep))


def test_conditions_are_joined_where_nothing_is_repeated():
    model = build("sisma-debug", mask_dropout=0.1, depth=1)
    with torch.no_grad():
        one, two, null = (model.condition(given, size=(8, 12)) for given in (labels(1), labels(2), None))
    (both,) = model.join([one, null], 2)
    assert both.batch == 2 and both.grid == one.grid
    for part, cond in enumerate((one, null)):
        found, wanted = both.blocks[0]["cross_mamba"], cond.blocks[0]["cross_mamba"]
        assert torch.equal(found.B[part], wanted.B[0]) and torch.equal(found.constants.A, wanted.constants.A)
    assert [cond.batch for cond in model.join([two, two], 4)] == [4]
    for conds, batch in (([one, null], 4), ([two, null], 4), ([one], 1)):
        assert model.join(conds, batch) is conds
    assert joined([{"a": torch.ones(1, 3)}, {"a": torch.ones(1, 4)}], 1) is None
    assert joined([{"a": torch.ones(1, 3)}, {"b": torch.ones(1, 3)}], 1) is None
    assert joined([{"a": torch.ones(1, 3)}, {"a": None}], 1) is None


def labels(batch):
    return torch.randint(0, 19, (batch, 8, 12))


def test_a_layer_given_its_constants_gives_the_same():
    layer = SelfMamba(8, order="column-boustrophedon")
    x = torch.randn(2, 15, 8)
    with torch.no_grad():
        assert torch.equal(layer(x, SIZE, layer.constants(SIZE)), layer(x, SIZE))
