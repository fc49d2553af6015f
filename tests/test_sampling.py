"""Sampling: a model, an objective and a solver together, with guidance and what is computed once."""

import math
import shutil

import pytest
import torch
from conftest import randomize

import ssmgen
from ssmgen import Sampler, Sampling, build, initial_noise, sample
from ssmgen.guidance import plan
from ssmgen.precision import Choice
from ssmgen.solvers import Solver, shifted_grid

FIXED = [n for n in ssmgen.names("solver") if not (build(n).adaptive or build(n).stochastic)]
ADAPTIVE = [name for name in ssmgen.names("solver") if build(name).adaptive]


class Known(torch.nn.Module):
    """A model whose velocity is known: (mean of the mask) - x, so that x -> m + (x0 - m) / e."""

    dropout = 0.1

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.conditioned = 0

    def condition(self, mask, size=None):
        self.conditioned += 1
        return torch.zeros(1, 1, 1, 1) if mask is None else mask.float().mean((1, 2)).view(-1, 1, 1, 1)

    def forward(self, x, t, mask=None, *, cond=None):
        assert not self.training and not torch.is_grad_enabled()
        return (cond - x) * self.weight


@pytest.mark.parametrize("solver", [*FIXED, *ADAPTIVE])
def test_sampling_follows_the_ode(solver):
    model, x0 = Known().train(), torch.randn(3, 2, 4, 4)
    mask = torch.stack([torch.full((4, 4), k) for k in (1, 2, 3)])
    out = sample(model, x0, mask, solver=solver, steps=40)
    m = mask.float().mean((1, 2)).view(-1, 1, 1, 1)
    torch.testing.assert_close(out, m + (x0 - m) / math.e, rtol=0.02, atol=0.02)
    assert model.training and model.conditioned == (3 if solver in ADAPTIVE else 1)


def test_guidance_extrapolates_from_the_null_condition():
    model, x0 = Known(), torch.randn(2, 2, 4, 4)
    mask = torch.full((1, 4, 4), 3)
    out = sample(model, x0, mask, solver="rk4", steps=10, guidance_scale=2.0)
    torch.testing.assert_close(out, 6 + (x0 - 6) / math.e, rtol=1e-4, atol=1e-4)


def test_guidance_starts_where_it_is_told():
    x0, mask = torch.randn(2, 2, 4, 4), torch.full((1, 4, 4), 3)
    expected = x0
    for target in (3, 3, 6, 6):  # Euler's four steps, from 0, 0.25, 0.5 and 0.75
        expected = expected + 0.25 * (target - expected)
    out = sample(Known(), x0, mask, solver="euler", steps=4, guidance_scale=2.0, guidance_start=0.5)
    torch.testing.assert_close(out, expected)
    adaptive = sample(Known(), x0, mask, solver="dopri5", guidance_scale=2.0, guidance_start=0.5)
    halfway = 3 + (x0 - 3) / math.e**0.5
    torch.testing.assert_close(adaptive, 6 + (halfway - 6) / math.e**0.5, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("start", [-0.1, 1.1, math.nan])
def test_a_start_of_guidance_is_a_time(start):
    with pytest.raises(ValueError, match=r"guidance_start must be a time in \[0, 1\]"):
        sample(build("sisma-debug", mask_dropout=0.1), torch.randn(1, 3, 8, 8), guidance_start=start)


def test_guidance_needs_mask_dropout_in_training():
    model = build("sisma-debug")
    x0, mask = torch.randn(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="trained with dropout of 'mask'.*mask_dropout=0"):
        sample(model, x0, mask, guidance_scale=1.5)
    sample(build("sisma-debug", mask_dropout=0.1), x0, mask, guidance_scale=1.5, steps=1)
    with pytest.raises(ValueError, match="needs a value for the guided condition"):
        sample(build("sisma-debug", mask_dropout=0.1), x0, guidance_scale=1.5)


@pytest.mark.parametrize("solver", ["midpoint", "dopri5"])
def test_an_image_depends_on_its_own_seed_and_mask(solver):
    model = randomize(build("sisma-debug"), std=0.05)
    seeds = [5, 6, 7]
    masks = torch.randint(0, 19, (3, 8, 8))
    together = sample(model, initial_noise(seeds, (3, 8, 8)), masks, solver=solver, steps=4)
    for i, seed in enumerate(seeds):
        alone = sample(model, initial_noise([seed], (3, 8, 8)), masks[i : i + 1], solver=solver, steps=4)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1])


def test_noise_wants_lists():
    for arguments in (dict(seeds=3, shape=(3, 8, 8)), dict(seeds=[3], shape=8)):
        with pytest.raises(TypeError, match="seeds is a list, one for each image, and shape is"):
            initial_noise(**arguments)


def test_bad_sampling_arguments_are_explained():
    model, x0 = build("sisma-debug"), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="steps must be a positive"):
        sample(model, x0, steps=0)
    with pytest.raises(ValueError, match="3 values for 2 images"):
        sample(model, x0, torch.zeros(3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="unknown solver 'eulr'.*'euler'"):
        sample(model, x0, solver="eulr")
    with pytest.raises(ValueError, match="'sisma-debug' is of kind model, not solver"):
        sample(model, x0, solver="sisma-debug")


def test_a_solver_object_is_taken_as_it_is():
    solver = build("heun")
    assert isinstance(solver, Solver)
    sample(build("sisma-debug"), torch.randn(1, 3, 8, 8), solver=solver, steps=3)
    assert solver.evaluations == 6


class Plain:
    """A SISMA without `modulation`: `Sampler` then calls it once per condition, with times."""

    def __init__(self, model):
        self.model, self.calls = model, []
        self.condition, self.parameters, self.train = model.condition, model.parameters, model.train
        self.conditions, self.training = model.conditions, model.training

    def __call__(self, x, t, *, cond):
        self.calls.append(tuple(x.shape))
        return self.model(x, t, cond=cond)


@pytest.mark.parametrize("solver", ["midpoint", "ab3"])
@pytest.mark.parametrize("mask_input", ["none", "add"])
@pytest.mark.parametrize(("masks", "guidance"), [(1, (1.0, 0.0)), (2, (1.0, 0.0)), (1, (2.0, 0.4)), (2, (2.0, 0.0))])
def test_what_is_computed_once_changes_nothing(solver, mask_input, masks, guidance):
    model = randomize(build("sisma-debug", mask_dropout=0.1, mask_input=mask_input), std=0.1)
    x0, mask = torch.randn(2, 3, 8, 8), torch.randint(0, 19, (masks, 8, 8))
    settings = dict(solver=solver, steps=4, guidance_scale=guidance[0], guidance_start=guidance[1])
    expected = sample(Plain(model), x0, mask, **settings)
    torch.testing.assert_close(sample(model, x0, mask, **settings), expected, rtol=1e-5, atol=1e-5)


def test_a_sampler_computes_conditions_and_modulations_once(monkeypatch):
    model = build("sisma-debug", mask_dropout=0.1)
    calls = {"condition": 0, "modulation": 0, "time_embedding": 0, "forward": []}
    for name in ("condition", "modulation"):
        counted(monkeypatch, model, name, calls)
    model.time_embedding.register_forward_hook(lambda *_: calls.update(time_embedding=calls["time_embedding"] + 1))
    model.register_forward_pre_hook(lambda _, args: calls["forward"].append(args[0].shape[0]))
    x0, mask = torch.randn(3, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)
    sample(model, x0, mask, solver="midpoint", steps=5, guidance_scale=2.0)
    assert calls == {"condition": 2, "modulation": 1, "time_embedding": 1, "forward": [6] * 10}
    calls["forward"].clear()
    sample(model, x0, mask, solver="midpoint", steps=5, guidance_scale=2.0, guidance_start=0.35)
    assert calls["forward"] == [3] * 4 + [6] * 6  # midpoint asks at 0, 0.1, 0.2, 0.3, 0.4, ...


def counted(monkeypatch, model, name, calls):
    original = getattr(model, name)

    def call(*args, **kwargs):
        calls[name] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(model, name, call)


def test_a_sampler_in_bfloat16_stays_close_and_leaves_the_model_alone():
    model = randomize(build("sisma-debug"), std=0.05)
    x0, mask = torch.randn(2, 3, 8, 8), torch.randint(0, 19, (1, 8, 8))
    sampler = Sampler(model, dtype=torch.bfloat16)
    dtypes = {p.dtype for p in model.parameters()}
    assert dtypes == {torch.float32}
    ssm = sampler.model.blocks[0].self_mamba.ssm
    assert ssm.A_log.dtype == ssm.D.dtype == ssm.dt_proj.bias.dtype == torch.float32
    assert ssm.dt_proj.weight.dtype == ssm.out_norm.weight.dtype == torch.bfloat16
    out, expected = sampler(x0, mask, steps=4), sample(model, x0, mask, steps=4)
    assert out.dtype == torch.float32
    assert 0 < (out - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("taken", ["no", "bf16"])
def test_a_sampler_takes_the_dtype_that_pays(monkeypatch, taken):
    monkeypatch.setattr("ssmgen.precision.choose_precision", lambda asked, device: Choice(taken, ""))
    model = randomize(build("sisma-debug"), std=0.05)
    x0 = torch.randn(1, 3, 8, 8)
    out = sample(model, x0, None, steps=2, dtype="auto")
    assert torch.equal(out, sample(model, x0, None, steps=2, dtype=torch.bfloat16 if taken == "bf16" else None))
    assert (Sampler(model, dtype="auto").model is model) == (taken == "no")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_sampler_gives_the_same_images():
    model = randomize(build("sisma-debug", mask_dropout=0.1, depth=1, orders=("column",)), std=0.05)
    x0, mask = torch.randn(2, 3, 8, 8), torch.randint(0, 19, (1, 8, 8))
    sampler = Sampler(model, compile=True)
    for settings in (dict(solver="ab2"), dict(guidance_scale=2.0)):
        expected = sample(model, x0, mask, steps=4, **settings)
        torch.testing.assert_close(sampler(x0, mask, steps=4, **settings), expected, rtol=1e-4, atol=1e-5)


def test_texts_of_any_length_are_compiled_for_few(monkeypatch):
    torch.manual_seed(0)
    words = {"name": "token-sequence", "width": 8}
    kinds = {"conditions": {"mask": "label-map", "text": words}, "cross": {"text": "cross-attention"}}
    model = randomize(build("dit-debug", **kinds, add=("mask",), depth=1), std=0.05)
    x0, mask = torch.randn(2, 3, 8, 8), torch.randint(0, 19, (2, 8, 8))
    graphs = count_graphs(monkeypatch)
    sampler, settings = Sampler(model, compile=True), {"solver": "euler", "steps": 1}
    for length in (1, 3, 16, 17, 30):
        text = {"tokens": torch.randn(2, length, 8), "lengths": torch.tensor([length, 1])}
        for given in (text, text["tokens"]):
            out = sampler(x0, mask, text=given, **settings)
            torch.testing.assert_close(out, sample(model, x0, mask, text=given, **settings), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2
    with pytest.raises(ValueError, match="item 0 has length 12 of 10 tokens"):
        sampler(x0, mask, text={"tokens": torch.randn(2, 10, 8), "lengths": torch.tensor([12, 1])}, **settings)


def count_graphs(monkeypatch):
    """The compiled graphs, which run as they are, from now on."""
    graphs, compiled = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def compile(f, *, mode, **given):
        return compiled(f, backend=backend, **given)

    monkeypatch.setattr(torch, "compile", compile)
    torch.compiler.reset()
    return graphs


def test_more_shapes_are_compiled_than_torch_keeps_of_one_function(monkeypatch):
    graphs, net = count_graphs(monkeypatch), Known()
    sampler, mask = Sampler(net, compile=True), torch.full((1, 4, 4), 3)
    with torch.compiler.config.patch(recompile_limit=1):
        for _ in range(2):  # the second time they are found again
            for batch in range(1, 11):
                x0 = torch.randn(batch, 2, 4, 4)
                out = sampler(x0, mask, solver="euler", steps=2)
                torch.testing.assert_close(out, 3 + (x0 - 3) / 4)
        assert len(graphs) == 10
        other = Sampler(net, compile=True)
        monkeypatch.setattr("ssmgen.compiled.shape_of", lambda value: None)
        other(torch.randn(1, 2, 4, 4), mask, steps=1)
        with pytest.raises(RuntimeError, match=r"compiled 1 times for x \(2, 2, 4, 4\).*recompile_limit"):
            other(torch.randn(2, 2, 4, 4), mask, steps=1)


def test_the_grid_is_shifted():
    model, times = Known(), []
    model.register_forward_pre_hook(lambda _, args: times.append(args[1].item()))
    sample(model, torch.randn(1, 2, 4, 4), torch.full((1, 4, 4), 3), solver="euler", steps=4, shift=3.0)
    torch.testing.assert_close(torch.tensor(times), shifted_grid(4, shift=3.0)[:-1])


def test_settings_are_one_object():
    settings = Sampling(solver="euler", steps=5).replaced(steps=None, shift=2.0)
    assert settings == Sampling(solver="euler", steps=5, shift=2.0)
    x0 = torch.randn(1, 3, 8, 8)
    model = randomize(build("sisma-debug"), std=0.05)
    assert torch.equal(sample(model, x0, sampling=settings), sample(model, x0, solver="euler", steps=5, shift=2.0))
    with pytest.raises(TypeError, match="takes no 'stesp'.*'steps'"):
        settings.replaced(stesp=3)
    with pytest.raises(TypeError, match="takes no 'maks'.*'mask'"):
        sample(model, x0, maks=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "eulr"}, "unknown solver 'eulr'.*'euler'"),
        ({"steps": 0}, "steps must be a positive whole number, got 0"),
        ({"steps": 2.5}, "steps must be a positive whole number, got 2.5"),
        ({"shift": 0}, "shift must be a number above 0, got 0"),
        ({"guidance_scale": -1}, "guidance_scale must be a number at least 0"),
        ({"guidance_scale": {"mask": math.nan}}, "guidance_scale must be a number at least 0"),
        ({"guidance_start": 2}, r"guidance_start must be a time in \[0, 1\]"),
    ],
)
def test_settings_out_of_range_are_explained(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


class Dropped:
    dropout = 0.1


@pytest.mark.parametrize(
    ("scale", "known", "scales"),
    [
        (1.0, [["mask", "label"]], []),
        (2.0, [[], ["mask", "label"]], [2.0]),
        ({"mask": 2.0}, [["label"], ["label", "mask"]], [2.0]),
        ({"mask": 2.0, "label": 2.0}, [[], ["mask", "label"]], [2.0]),
        ({"mask": 2.0, "label": 4.0}, [[], ["mask"], ["mask", "label"]], [2.0, 4.0]),
    ],
)
def test_guidance_is_planned_by_condition(scale, known, scales):
    found = plan(scale, ["mask", "label"], {"mask": Dropped, "label": Dropped})
    assert (found.known, found.scales) == (known, scales)


class Placed(Dropped):
    placed_by = "mask"


@pytest.mark.parametrize(
    ("scales", "known", "steps"),
    [
        ({"mask": 2, "text": 1}, [[], ["mask"], ["mask", "text"]], [2, 1]),
        ({"mask": 2, "text": 2}, [[], ["mask", "text"]], [2]),
        ({"mask": 1, "text": 4}, [["mask"], ["mask", "text"]], [4]),
        ({"mask": 1, "text": 1}, [["mask", "text"]], []),
        ({"mask": 2, "text": 1, "label": 1}, [["label"], ["label", "mask"], ["label", "mask", "text"]], [2, 1]),
        ({"mask": 2, "text": 4, "label": 2}, [[], ["mask", "label"], ["mask", "label", "text"]], [2, 4]),
    ],
)
def test_what_is_placed_is_added_after_what_places_it(scales, known, steps):
    conditions = {"text": Placed, "mask": Dropped, "label": Dropped}
    found = plan(scales, [name for name in conditions if name in scales], conditions)
    assert (found.known, found.scales) == (known, steps)
    if len(steps) < 2:
        return
    conditions["text"] = type("Kept", (Placed,), {"dropout": 0})
    with pytest.raises(ValueError, match="needs a model trained with dropout of 'text'"):  # an evaluation is without
        plan(scales, [name for name in conditions if name in scales], conditions)


def test_guidance_by_condition_is_its_formula():
    model, x, values = told_twice()
    t = torch.full((1,), 0.5)
    v0, vm, v = (model(x, t, **each) for each in ({}, {"mask": values["mask"]}, values))
    settings = dict(solver="euler", times=torch.tensor([0.5, 1.0]), guidance_scale={"mask": 2.0, "label": 3.0})
    expected = x + 0.5 * (v0 + 2 * (vm - v0) + 3 * (v - vm))
    torch.testing.assert_close(sample(model, x, **values, **settings), expected, rtol=1e-4, atol=1e-5)


def test_guidance_for_what_is_not_there_is_explained():
    model, x, values = told_twice()
    with pytest.raises(ValueError, match="names no condition 'lable'.*'label'"):
        sample(model, x, **values, guidance_scale={"lable": 2.0})
    with pytest.raises(ValueError, match="needs a value for the guided condition"):
        sample(model, x, mask=values["mask"], guidance_scale={"label": 2.0})


def test_a_model_of_two_conditions_compiles_as_one_graph():
    model, x, values = told_twice()
    t, cond = torch.rand(2), model.condition(**values)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, **values), model(x, t, **values), rtol=1e-4, atol=1e-5)
    rows = model.modulation(t[:1], cond.vector)[0]
    expected = model(x, t[:1], cond=cond)
    torch.testing.assert_close(compiled(x, None, cond=[cond], modulation=rows), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("most", [0, 2**40])
def test_vectors_give_the_same_images_with_rows_made_at_once_and_per_step(monkeypatch, most):
    model, x, values = told_twice()
    expected = sample(model, x, **values, solver="heun", steps=3, guidance_scale=2.0)
    monkeypatch.setattr("ssmgen.precomputed._MOST_ROW_BYTES", most)
    calls = {"modulation": 0}
    counted(monkeypatch, model, "modulation", calls)
    out = sample(model, x, **values, solver="heun", steps=3, guidance_scale=2.0)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert calls["modulation"] == (2 if most else 12)


def test_rows_belong_to_times_and_not_to_the_order_of_calls():
    """A solver that asks for a time twice, or in another order than it says, still gets that time's rows."""

    class Restless(ssmgen.solvers.RungeKutta):
        def times(self, ts):
            return super().times(ts).flip(0)

    model = randomize(build("sisma-debug"), std=0.1)
    x0, heun = torch.randn(1, 3, 8, 8), build("heun")
    restless = Restless(heun.order, heun.nodes, heun.matrix, heun.weights)
    torch.testing.assert_close(sample(model, x0, solver=restless, steps=3), sample(model, x0, solver="heun", steps=3))


def told_twice():
    """A model with a mask and a label, and values of both for two images."""
    kinds = {
        "mask": {"name": "label-map", "dropout": 0.1},
        "label": {"name": "class-label", "num_labels": 4, "dropout": 0.1},
    }
    model = randomize(build("sisma-debug", conditions=kinds), std=0.1).eval()
    values = {"mask": torch.randint(0, 19, (1, 8, 8)), "label": torch.tensor([1, 3])}
    return model, torch.randn(2, 3, 8, 8), values
