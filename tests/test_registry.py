import pytest

import ssmgen
from ssmgen import registry


@pytest.fixture
def scratch(monkeypatch):
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))


def test_registered_names_cover_the_documented_ones():
    assert {"self-mamba", "cross-mamba", "adaln", "patchify", "unpatchify", "mask-encoder"} <= set(
        ssmgen.names("block")
    )
    sizes = ["b", "debug", "l", "s", "xl"]
    for family in ("sisma", "sisma-attn", "dit"):
        assert {f"{family}-{size}" for size in sizes} <= set(ssmgen.list_models())
    assert {"euler", "midpoint", "heun", "rk4", "dopri5"} <= set(ssmgen.names("solver"))
    assert {"flow-matching", "v", "x0", "eps"} <= set(ssmgen.names("objective"))
    assert ssmgen.names("autoencoder") == ["autoencoder-kl", "autoencoder-tiny", "identity"]


def test_unknown_name_offers_the_closest():
    with pytest.raises(ValueError, match=r"unknown name 'sisma-xxl'.*'sisma-xl'"):
        ssmgen.build("sisma-xxl")


def test_overrides_reach_the_parts():
    """A stack hands ``**settings`` to its parts: their names are checked, and offered, all the same."""
    assert ssmgen.build("sisma-debug", mask_dropout=0.5).conditions["mask"].dropout == 0.5
    with pytest.raises(TypeError, match=r"takes no 'mask_dropuot'.*'mask_dropout'"):
        ssmgen.build("sisma-debug", mask_dropuot=0.5)
    with pytest.raises(TypeError, match="takes no 'd_sate'.*'d_state'"):
        ssmgen.build("self-mamba", dim=8, d_sate=4)


def test_unknown_override_offers_the_closest():
    with pytest.raises(TypeError, match=r"takes no 'dept'.*'depth'"):
        ssmgen.build("sisma-debug", dept=3)


def test_missing_argument_says_how_to_give_it():
    with pytest.raises(TypeError, match=r"build\('cross-mamba', dim=\.\.\.\)"):
        ssmgen.build("cross-mamba")


def test_unknown_kind():
    with pytest.raises(ValueError, match="unknown kind 'models'.*'model'"):
        ssmgen.names("models")


def test_name_taken_twice_names_both_places(scratch):
    @ssmgen.register("block", "my-mixer")
    class First: ...

    with pytest.raises(
        ValueError, match=r"'my-mixer' is taken twice.*First.*test_registry.py.*Second.*test_registry.py"
    ):

        @ssmgen.register("solver", "my-mixer")
        class Second: ...


def test_defining_the_same_class_again_replaces_it(scratch):
    def define(value):
        @ssmgen.register("block", "notebook-cell")
        class Cell:
            number = value

    define(1)
    define(2)
    assert ssmgen.build("notebook-cell").number == 2


def test_a_size_cannot_be_redefined(scratch):
    with pytest.raises(ValueError, match="'sisma-xl' is taken twice"):
        ssmgen.register("model", "sisma-xl", dim=64, depth=1)(ssmgen.models.TokenModel)


def test_a_size_is_one_line(scratch):
    ssmgen.register("model", "sisma-tiny", mixer="self-mamba", add=("mask",), num_classes=3, dim=32, depth=1)(
        ssmgen.models.TokenModel
    )
    assert len(ssmgen.build("sisma-tiny").blocks) == 1
    with pytest.raises(TypeError, match="takes no 'deep'"):
        ssmgen.register("model", "sisma-bad", mixer="self-mamba", deep=1)(ssmgen.models.TokenModel)


@pytest.fixture
def layers(scratch):
    @ssmgen.register("block", "layer", width=4)
    class Layer:
        def __init__(self, dim, width, order="row"):
            self.given = (dim, width, order)

    @ssmgen.register("block", "wrapper")
    class Wrapper:
        @registry.passes_on(Layer, "order")
        def __init__(self, dim, *, depth=1, **layer):
            self.depth, self.layer = depth, Layer(dim, order="column", **layer)


def test_a_part_gets_what_it_takes_of_what_is_offered(layers):
    made = registry.make("layer", dim=8, order="column", backend="cpu")
    assert made.given == (8, 4, "column")
    assert registry.make({"name": "layer", "order": "row"}, dim=8, order="column").given == (8, 4, "row")
    assert registry.make("layer", dim=8, width=5).given == (8, 5, "row")
    with pytest.raises(TypeError, match="'layer' takes no 'wdth'.*'width'"):
        registry.make({"name": "layer", "wdth": 5}, dim=8)
    for spec in (3, {"width": 5}, {"name": 3}, None):
        with pytest.raises(TypeError, match="a spec is a registered name or"):
            registry.make(spec)


def test_arguments_that_are_passed_on_are_checked_by_name(layers):
    assert registry.takes("wrapper") == ["dim", "depth", "width"]
    assert ssmgen.build("wrapper", dim=2, width=3).layer.given == (2, 3, "column")
    for name in ("widht", "order"):
        with pytest.raises(TypeError, match=f"'wrapper' takes no '{name}'.*It takes: dim, depth, width"):
            ssmgen.build("wrapper", dim=2, **{name: 3})
    assert {"d_state", "order", "backend"} <= set(registry.takes("self-mamba"))


def test_settings_of_a_stack_are_those_of_its_parts():
    takes = registry.takes("sisma-debug")
    assert {"dim", "depth", "d_state", "u", "ffn_ratio", "mask_dropout", "mask_input", "num_classes"} <= set(takes)
    assert "num_heads" not in takes and "num_heads" in registry.takes("dit-debug")
    hybrid = {"name": "sisma-debug", "mixer": ["self-mamba", "self-attention"]}
    assert {"num_heads", "d_state"} <= set(registry.takes(hybrid))
    with pytest.raises(TypeError, match="'sisma-debug' takes no 'num_heads'"):
        ssmgen.build("sisma-debug", num_heads=2)
    with pytest.raises(ValueError, match="unknown block 'self-mabma'.*'self-mamba'"):
        ssmgen.build("sisma-debug", mixer="self-mabma")
