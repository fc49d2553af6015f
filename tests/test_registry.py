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
