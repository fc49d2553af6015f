"""Models of absurd sizes, in folders from outside and on command lines, are rejected before memory is taken."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

from recipes.sisma.presets import preset
from recipes.sisma.runs import model_arguments, new_model
from ssmgen import MaskToImage, build
from ssmgen.data import CELEBAMASK19
from ssmgen.pipeline import Recipe
from ssmgen.weights import count_values, limit_parameters

SETTINGS = {"in_channels": 3, "mask_scale": 1, "patch_size": 4, "dim": 96, "depth": 1}
ABSURD = [
    *({"dim": 10**7}, {"dim": 10**12}, {"depth": 10**9}, {"patch_size": 10**5}, {"num_classes": 10**9}),
    *({"d_state": 10**8}, {"expand": 10**6}, {"ffn_ratio": 1e9}, {"in_channels": 10**8}, {"d_conv": 10**5 + 1}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("models") / "model"
    recipe = Recipe("sisma-debug", SETTINGS, "identity", 16, CELEBAMASK19, {"solver": "euler", "steps": 2})
    MaskToImage(build("sisma-debug", **SETTINGS), build("identity"), recipe).save_pretrained(where)
    return where


def kilobytes(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.fixture(scope="module")
def imported():
    """torch imports what a model on the meta device needs when one is built first."""
    new_model(preset("quick"), build("identity"))


@pytest.fixture
def cheaply(imported):
    """Fails where a test took more than 5 s of processor time, or 200 MB."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux to say how much memory was taken")
    before, started = kilobytes("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")
    yield
    assert time.process_time() - started < 5
    assert kilobytes("VmHWM") - before < 200_000  # torch takes 120 MB once, for the meta device


@pytest.mark.filterwarnings("ignore:width 96")
@pytest.mark.parametrize("absurd", ABSURD, ids=lambda a: "-".join(map(str, *a.items())))
def test_a_folder_of_absurd_sizes_is_rejected(folder, absurd, cheaply):
    text = (folder / "config.json").read_text()
    content = json.loads(text)
    content["model_args"] |= absurd
    (folder / "config.json").write_text(json.dumps(content))
    try:
        with pytest.raises(ValueError, match="config.json") as caught:
            MaskToImage.from_pretrained(folder)
    finally:
        (folder / "config.json").write_text(text)
    held = count_values(folder / "model.safetensors")
    too_many = f"more parameters than the {held:,} values in {folder / 'model.safetensors'}"
    assert ("depth must be a whole number from 1 to 1000" if "depth" in absurd else too_many) in str(caught.value)


def test_a_picture_of_absurd_size_is_rejected():
    with pytest.raises(ValueError, match="image_size must be 1 to 16384 pixels, got 1000000"):
        Recipe("sisma-debug", SETTINGS, "identity", 10**6, CELEBAMASK19)


def test_an_autoencoder_of_absurd_width_is_rejected(tiny, tmp_path, cheaply):
    pytest.importorskip("diffusers", reason="autoencoders are those of diffusers")
    folder = shutil.copytree(tiny, tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    config |= {name: [10**6] * len(config[name]) for name in config if name.endswith("block_out_channels")}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"cannot be loaded into .*more parameters than the"):
        build("autoencoder-tiny", source=str(folder))


@pytest.mark.parametrize("absurd", [{"dim": 10**7}, {"depth": 1000, "dim": 4096}])  # the first took 186 s and 11 GB
def test_training_at_an_absurd_size_is_rejected(absurd, cheaply):
    config = preset("quick")
    config.model_args = {**config.model_args, **absurd}
    with pytest.raises(ValueError, match=r"does not fit this machine: .* 16 bytes a parameter, and [\d.,]+ GiB"):
        new_model(config, build("identity"))


def test_looking_at_the_size_first_changes_no_weight():
    config, models = preset("quick"), []
    for make in (new_model, lambda config, _: build(config.model, **model_arguments(config, build("identity")))):
        torch.manual_seed(0)
        models.append(make(config, build("identity")))
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_the_limit_is_exact_and_ends(folder):
    count = sum(p.numel() for p in build("sisma-debug", **SETTINGS).parameters())
    with limit_parameters(count, "too large"):
        build("sisma-debug", **SETTINGS)
    with pytest.raises(ValueError, match="^too large$"), limit_parameters(count - 1, "too large"):
        build("sisma-debug", **SETTINGS)
    build("sisma-debug", **SETTINGS)
    MaskToImage.from_pretrained(folder)
