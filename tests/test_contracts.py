"""What holds for everything registered. A new name joins by itself; tests/examples.py says how a part is called."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from conftest import OWN, randomize
from examples import BATCH, cast, inputs, item, leaves, repeated, small, value
from safetensors.torch import load_file, save_file

import ssmgen
from ssmgen import MaskToImage, build, registry
from ssmgen.data import CELEBAMASK19
from ssmgen.nn import Signal
from ssmgen.pipeline import Recipe
from ssmgen.values import mapped
from ssmgen.weights import REPLACED, limit_parameters

ROOT = Path(__file__).parents[1]


def own(kind):
    return [name for name in ssmgen.names(kind) if name in OWN]


BLOCKS, MODELS, CONDITIONS = own("block"), own("model"), own("condition")
FAMILIES = [name for name in MODELS if name.endswith("-debug")]
CROSS = [name for name in BLOCKS if hasattr(registry.find(name).builder, "condition")]
DOCS = "\n".join(page.read_text() for page in sorted((ROOT / "docs").rglob("*.md")))
#: The parameters of each size, as docs/api/models.md tables them.
PARAMETERS = dict(re.findall(r"^\| `([\w-]+)` \| ([\d,]+) \|", (ROOT / "docs/api/models.md").read_text(), re.MULTILINE))

#: Weights that get no gradient: name of the part or model, then a pattern of the weights, then the reason.
UNUSED: dict[str, dict[str, str]] = {}


def close(got, expected, rtol=1e-4, atol=1e-5):
    for one, other in zip(leaves(got), leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def relative_error(got, expected):
    return max(
        ((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-3)).item()
        for one, other in zip(leaves(got), leaves(expected), strict=True)
    )


def score(out):
    """A number that depends on all of an output."""
    return sum(leaf.square().mean() for leaf in leaves(out) if leaf.is_floating_point())


def without_gradient(name, module):
    gradients = {key: weight.grad for key, weight in module.named_parameters()}
    dead = [key for key, g in gradients.items() if g is None or not g.isfinite().all() or not g.any()]
    return [key for key in dead if not any(re.fullmatch(pattern, key) for pattern in UNUSED.get(name, {}))]


def saved_and_loaded(module, fresh, file):
    save_file({key: tensor.contiguous() for key, tensor in module.state_dict().items()}, file)
    fresh.load_state_dict(load_file(file))
    return fresh


class Example:
    """A block, condition or model with weights that hide nothing, and what it is called with by name."""

    def __init__(self, name, size=(3, 5)):
        self.name, self.kind = name, registry.find(name).kind
        self.module = randomize(self.built(), std=0.1 if self.kind == "model" else 0.2)
        if self.kind == "model":
            self.size = (size[0] * self.module.multiple, size[1] * self.module.multiple)
            self.given = {key: value(each, self.size) for key, each in self.module.conditions.items()}
            x = torch.randn(BATCH, self.module.in_channels, *self.size)
            self.inputs = {"x": x, "t": torch.rand(BATCH), **self.given}
        elif self.kind == "condition":
            self.inputs = {"given": value(self.module, (4, 6)), "size": (4, 6)}
        else:
            self.inputs = inputs(name, self.module)

    def built(self):
        return build(self.name) if self.kind == "model" else small(self.name)

    def __call__(self, module=None, **inputs):
        return (self.module if module is None else module)(**(self.inputs | inputs))


@pytest.fixture(params=[*BLOCKS, *CONDITIONS, *FAMILIES])
def example(request):
    return Example(request.param)


def test_outputs_are_finite_and_every_weight_learns(example):
    more = {"keep": torch.tensor([True, False, True])} if example.kind == "condition" else {}  # the null learns, too
    out = example(**more)
    assert leaves(out) and all(leaf.shape[0] == BATCH and leaf.isfinite().all() for leaf in leaves(out))
    if list(example.module.parameters()):
        score(out).backward()
    dead = without_gradient(example.name, example.module)
    assert not dead, f"no gradient; if that is meant, list it in UNUSED with the reason: {dead}"


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-4), (torch.bfloat16, 0.06)])
def test_weights_of_other_dtypes_give_close_outputs_of_that_dtype(example, dtype, error):
    expected, low = example(), example.module.to(dtype)
    out = example(low, **{key: cast(given, dtype) for key, given in example.inputs.items()})
    if list(low.parameters()):
        assert {leaf.dtype for leaf in leaves(out) if leaf.is_floating_point()} == {dtype}
    assert relative_error(out, expected) < error


def test_autocast_stays_close(example):
    expected = example()
    with torch.autocast("cpu", torch.bfloat16):
        out = example()
    assert relative_error(out, expected) < 0.06


def test_an_image_does_not_depend_on_its_batch(example):
    example.module.eval()
    whole = example()
    for i in range(BATCH):
        close(example(**{key: item(given, i) for key, given in example.inputs.items()}), item_of(whole, i))


def item_of(out, i):
    return [leaf[i : i + 1] for leaf in leaves(out)]


def test_saved_weights_give_the_same_bits(example, tmp_path):
    fresh = saved_and_loaded(example.module, example.built(), tmp_path / "weights.safetensors").eval()
    expected = example(example.module.eval())
    assert all(map(torch.equal, leaves(example(fresh)), leaves(expected)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_pipeline_gives_the_same_images(name, tmp_path):
    model = randomize(build(name, num_classes=19))
    recipe = Recipe(name, {"num_classes": 19}, "identity", 32, CELEBAMASK19, {"steps": 1, "solver": "euler"})
    pipe, mask = MaskToImage(model, build("identity"), recipe), torch.randint(0, 19, (1, 32, 32))
    pipe.save_pretrained(tmp_path / name)
    loaded = MaskToImage.from_pretrained(tmp_path / name)
    assert torch.equal(loaded(mask, output_type="latent"), pipe(mask, output_type="latent"))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_registers_no_more_than_a_reader_of_its_weights_allows(name):
    """Constructors may replace what others made; `limit_parameters` lets through some of that."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build(name, num_classes=19).parameters())
        with limit_parameters(REPLACED * count, "more than that"):
            build(name, num_classes=19)


def test_a_seed_gives_the_same_bits(example):
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        module = randomize(example.built())
        out = example(module)
        if list(module.parameters()):
            score(out).backward()
        results.append([*leaves(out), *(p.grad for p in module.parameters() if p.grad is not None)])
    assert all(map(torch.equal, *results)) and len(results[0]) == len(results[1])


@torch.no_grad()
def test_it_compiles_into_one_graph(example):
    torch.compiler.reset()
    expected = example(example.module.eval())
    backend = "aot_eager" if example.kind == "model" else "eager"
    close(example(torch.compile(example.module, backend=backend, fullgraph=True)), expected)


@pytest.mark.parametrize("name", CROSS)
def test_what_a_block_makes_of_a_condition_is_computed_once(name):
    example = Example(name)
    block, x, cond = example.module, example.inputs["x"], example.inputs["cond"]
    signal = {"mask": cond} if isinstance(block, ssmgen.nn.Block) else cond
    size = example.inputs.get("size", x.shape[-2:])
    close(example(cond=states(block, signal, size)), example(), rtol=1e-5, atol=1e-6)
    once = states(block, mapped(lambda tensor: tensor[:1], signal), size)
    close(example(cond=once), example(cond=repeated(cond, BATCH)))


def states(block, signal, size):
    return [block.condition(signal, size)]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_model_makes_of_conditions_is_computed_once(name):
    example = Example(name)
    model, x, t = example.module.eval(), example.inputs["x"], example.inputs["t"]
    cond = model.condition(**example.given, size=example.size)
    assert torch.equal(model(x, t, cond=cond), example())
    single = {key: item(given, 0) for key, given in example.given.items()}
    many = {key: repeated(given, BATCH) for key, given in example.given.items()}
    close(model(x, t, cond=model.condition(**single, size=example.size)), example(**many))
    parts = [model.condition(**example.given, size=example.size), model.condition(**single, size=example.size)]
    expected = torch.cat([model(x, t, cond=part) for part in parts])
    if all(part.vector is None for part in parts):
        close(model(x.repeat(2, 1, 1, 1), None, cond=parts, modulation=model.modulation(t.repeat(2))), expected)
    close(model(x.repeat(2, 1, 1, 1), t.repeat(2), cond=parts), expected)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(5, 3), (1, 7), (2, 1)])
def test_a_model_takes_any_rectangle(name, size):
    example = Example(name, size)
    out = example(example.module.eval())
    assert out.shape == example.inputs["x"].shape and out.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_time_position_and_every_condition_matter(name):
    example = Example(name)
    model, out = example.module.eval(), example()
    assert not torch.allclose(out, example(t=example.inputs["t"] * 0.5))
    for key in example.given:
        assert not torch.allclose(out, example(**{key: None})), key
    plain = model(torch.ones_like(example.inputs["x"]), example.inputs["t"])
    same_place = plain[..., :: model.patch_size, :: model.patch_size]  # of a patch
    assert same_place.flatten(2).std(-1).max() > 1e-4, "positions are invisible"


@pytest.mark.parametrize("name", MODELS)
def test_every_size_has_its_parameters_and_keeps_the_shape(name):
    with torch.device("meta"):
        model = build(name)
        x, given = torch.zeros(2, model.in_channels, 32, 64), {}
        for key, condition in model.conditions.items():
            given[key] = mapped(lambda each: each[:2], value(condition, (32, 64)))
        assert model(x, torch.zeros(2), **given).shape == x.shape
    counted = f"{sum(p.numel() for p in model.parameters()):,}"
    row = f"| `{name}` | {counted} |"
    assert PARAMETERS.get(name) == counted, f"if that is meant, table it in docs/api/models.md: {row}"
    assert isinstance(model.blocks, torch.nn.ModuleList)


def test_every_tabled_size_exists():
    assert PARAMETERS.keys() == set(MODELS)


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_signal_has_what_the_condition_gives(name):
    signal = Example(name)()
    assert isinstance(signal, Signal) and signal.batch == BATCH
    assert registry.find(name).builder.gives == tuple(f for f in ("tokens", "vector") if getattr(signal, f) is not None)
    if signal.grid is not None:
        assert signal.tokens.shape[1] == signal.grid[0] * signal.grid[1]


def meant(signal):
    """Tokens and vector of a signal."""
    return [part for part in (signal.tokens, signal.vector) if part is not None]


@pytest.mark.parametrize("name", CONDITIONS)
def test_the_null_is_what_a_dropped_item_becomes(name):
    example = Example(name)
    null, kept = example(given=None), example()
    dropped = example(keep=torch.tensor([True, False, True]))
    for nothing, everything, some in zip(meant(null), meant(kept), meant(dropped), strict=True):
        assert nothing.shape[0] == 1
        torch.testing.assert_close(some[1:2], nothing)
        torch.testing.assert_close(some[::2], everything[::2])
        assert not torch.allclose(everything[1:2], nothing)


@pytest.mark.parametrize("name", CONDITIONS)
def test_dropout_acts_in_training_only(name):
    condition, size = randomize(small(name, dropout=0.5)), (4, 6)
    many = repeated(value(condition, size), 400)
    nothing, full = (meant(condition.eval()(given, size))[0][:1] for given in (None, many))
    trained = meant(condition.train()(many, size))[0]
    null = torch.isclose(trained, nothing, atol=1e-6).flatten(1).all(1)
    assert 150 < null.sum() < 250 and torch.allclose(trained[~null], full, atol=1e-6)
    rarely = small(name, dropout=0.1).train()
    rarely.load_state_dict(condition.state_dict())
    dropped = torch.isclose(meant(rarely(many, size))[0], nothing, atol=1e-6).flatten(1).all(1)
    assert 20 < dropped.sum() < 64
    with pytest.raises(ValueError, match=r"dropout of a condition must be in \[0, 1\), got 1"):
        small(name, dropout=1)


@pytest.mark.parametrize("name", own("solver"))
def test_solvers_keep_dtype_bits_and_images_apart(name):
    solver, start = build(name), torch.randn(BATCH, 2, 3, 5)

    def solved(x0):
        return solver.solve(lambda t, x: torch.sin(x) - t, x0, torch.linspace(0, 1, 5, dtype=x0.dtype))

    end = solved(start)
    assert end.dtype == start.dtype and end.shape == start.shape and torch.equal(end, solved(start))
    precise = solved(start.double())
    assert precise.dtype == torch.float64
    if not solver.stochastic:  # whose noise follows from the bits of the start
        close(precise.float(), end)
    close(torch.cat([solved(start[i : i + 1]) for i in range(BATCH)]), end, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", own("objective"))
def test_objectives_keep_dtype_bits_and_images_apart(name):
    objective = build(name)
    for dtype in (torch.float32, torch.float64):
        x1, x0 = torch.randn(2, BATCH, 2, 3, 5, dtype=dtype)
        t = torch.tensor([0.2, 0.5, 0.9], dtype=dtype)

        def loss(rows, dtype=dtype, x1=x1, x0=x0, t=t):
            return objective.loss(lambda x, t: x.sin(), x1[rows], noise=x0[rows], t=t[rows])

        whole = loss(slice(None))
        assert whole.dtype == dtype and torch.equal(whole, loss(slice(None)))
        close(torch.stack([loss(slice(i, i + 1)) for i in range(BATCH)]).mean(), whole)
        for found in (objective.velocity(x0, x1, t), objective.data(x0, x1, t)):
            assert found.dtype == dtype and found.shape == x1.shape


@pytest.mark.parametrize("name", sorted(OWN))
def test_every_name_is_in_the_docs(name):
    assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", DOCS), f"no page of docs/ mentions {name!r}"


@pytest.mark.parametrize("name", [*BLOCKS, *CONDITIONS])
def test_parts_say_what_they_are(name):
    assert len(inspect.getdoc(registry.find(name).builder) or "") > 20
