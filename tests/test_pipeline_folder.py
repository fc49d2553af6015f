"""The folder of a MaskToImage: saved, loaded, damaged, shipped with the package, and on the hub."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from pipelines import ARGS, random_pipe
from safetensors.torch import load_file

import ssmgen
from ssmgen import MaskToImage
from ssmgen.data import LabelSet, draw_face, write_png
from ssmgen.pipeline import Recipe, packaged

GOLDEN = Path(__file__).parent / "golden"
#: Mean red, green and blue of two pictures of the packaged model.
MEANS = torch.tensor([[0.3543, 0.2388, 0.1707], [0.7826, 0.5635, 0.3773]])


@pytest.fixture(scope="module")
def face():
    return draw_face(2, 64)[1]


@pytest.fixture(scope="module")
def pipe():
    return random_pipe({"solver": "euler", "steps": 3}, "A test.")


def test_what_is_saved_is_read_back(pipe, face, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert (
        json.loads((tmp_path / "saved" / "config.json").read_text())["format"] == 2
    )  # an older ssmgen says to upgrade
    again = MaskToImage.from_pretrained(tmp_path / "saved")
    assert again.recipe == pipe.recipe and again.card == pipe.card
    assert torch.equal(again(face, output_type="pt"), pipe(face, output_type="pt"))


def test_the_objective_travels_with_the_model(tmp_path):
    pipe = random_pipe()
    pipe = MaskToImage(pipe.model, pipe.autoencoder, replace(pipe.recipe, objective={"name": "x0", "smallest": 0.01}))
    pipe.save_pretrained(tmp_path / "saved")
    again = MaskToImage.from_pretrained(tmp_path / "saved")
    assert (again.objective.prediction, again.objective.smallest) == ("data", 0.01)
    mask = torch.zeros(32, 32, dtype=torch.uint8)
    settings = {"output_type": "latent", "solver": "euler", "steps": 2}
    expected = ssmgen.sample(
        pipe.model,
        ssmgen.initial_noise([0], (3, 32, 32)),
        mask[None],
        objective=pipe.objective,
        solver="euler",
        steps=2,
    )
    assert torch.equal(again(mask, **settings), expected)
    assert not torch.allclose(random_pipe()(mask, **settings), expected)
    with pytest.raises(ValueError, match="unknown objective 'x1'.*'x0'"):
        replace(pipe.recipe, objective="x1")


def test_a_folder_records_shared_noise_where_it_is_used(pipe, tmp_path):
    """Earlier versions do not know the setting and read a folder without it."""
    for used in (False, True):
        recipe = replace(pipe.recipe, sampling=pipe.recipe.sampling.replaced(shared_noise=used))
        MaskToImage(pipe.model, pipe.autoencoder, recipe).save_pretrained(tmp_path / str(used))
        stored = json.loads((tmp_path / str(used) / "config.json").read_text())["sampling"]
        assert stored.get("shared_noise", False) == used and ("shared_noise" in stored) == used
        assert MaskToImage.from_pretrained(tmp_path / str(used)).recipe.sampling.shared_noise == used


def test_a_folder_of_the_first_format_gives_the_same_pictures():
    """Written by commit 79f6f51, before objectives, conditions and their names of today, and sampled by it."""
    folder = GOLDEN / "first-pipeline"
    assert json.loads((folder / "config.json").read_text())["format"] == 1
    expected = load_file(GOLDEN / "first-pipeline-images.safetensors")
    latents = MaskToImage.from_pretrained(folder)(expected["mask"], seed=3, num_images=2, output_type="latent")
    torch.testing.assert_close(latents, expected["latents"], rtol=1e-4, atol=1e-4)


def test_the_packaged_model_gives_the_pictures_of_its_release():
    images = MaskToImage.from_pretrained("drawn-faces")(draw_face(10**6)[1], seed=3, num_images=2, output_type="pt")
    torch.testing.assert_close(images.mean((2, 3)), MEANS, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_compiled_model_is_saved_as_the_model(pipe, tmp_path, dtype):
    compiled = MaskToImage(torch.compile(pipe.model, backend="eager"), pipe.autoencoder, pipe.recipe)
    for one, name in ((compiled, "compiled"), (pipe, "plain")):
        one.save_pretrained(tmp_path / name, dtype=dtype)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("compiled", "plain")]
    assert weights[0] == weights[1]
    MaskToImage.from_pretrained(tmp_path / "compiled")


def test_a_configuration_with_a_byte_order_mark_is_read(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert MaskToImage.from_pretrained(tmp_path).recipe == pipe.recipe


def test_home_is_found_in_every_path(pipe, face, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pipe.save_pretrained("~/saved")
    assert (tmp_path / "saved/config.json").is_file()
    write_png("~/mask.png", face)
    again = MaskToImage.from_pretrained("~/saved")
    assert torch.equal(again("~/mask.png", output_type="pt"), pipe(face, output_type="pt"))


def test_saving_again_replaces_its_own_files_alone(pipe, face, tmp_path):
    other = MaskToImage(ssmgen.build("sisma-debug", **ARGS), pipe.autoencoder, pipe.recipe, card="# Mine")
    other.save_pretrained(tmp_path)
    tmp_path.joinpath("notes.txt").write_text("keep")
    again = MaskToImage.from_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path)
    assert tmp_path.joinpath("notes.txt").read_text() == "keep"
    assert torch.equal(MaskToImage.from_pretrained(tmp_path)(face, output_type="pt"), pipe(face, output_type="pt"))
    again.save_pretrained(tmp_path)
    assert tmp_path.joinpath("README.md").read_text() == "# Mine", "a card goes with its model"


@pytest.mark.parametrize("when", ["write", "replace"])
def test_an_interrupted_save_is_never_a_mixture(pipe, tmp_path, monkeypatch, when):
    """Broken off while writing, the old model is whole; while replacing, the folder is refused."""
    pipe.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    original = os.replace

    def stop(source="", target=""):
        if when == "write" or Path(target).parent == tmp_path:  # its files, not those of the folder beside them
            raise OSError("disk full")
        original(source, target)

    if when == "write":
        monkeypatch.setattr(MaskToImage, "card", property(lambda self: stop(), lambda self, card: None), raising=False)
        broken = MaskToImage(ssmgen.build("sisma-debug", **ARGS), pipe.autoencoder, pipe.recipe)
    else:
        broken = MaskToImage(ssmgen.build("sisma-debug", **ARGS), pipe.autoencoder, pipe.recipe)
        monkeypatch.setattr("ssmgen.pipeline.folder.os.replace", stop)
    with pytest.raises(OSError, match="disk full"):
        broken.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob(".partial-*"))
    if when == "write":
        MaskToImage.from_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").read_bytes() == before
    else:
        with pytest.raises(FileNotFoundError, match="config.json: not found"):
            MaskToImage.from_pretrained(tmp_path)


def test_labels_need_not_be_faces(tmp_path):
    labels = LabelSet("street", ("road", "sky", "car"), ((0, 0, 0), (0, 0, 255), (255, 0, 0)))
    args = ARGS | {"num_classes": 3}
    recipe = Recipe("sisma-debug", args, "identity", 32, labels, {"solver": "euler", "steps": 1})
    MaskToImage(ssmgen.build("sisma-debug", **args), ssmgen.build("identity"), recipe).save_pretrained(tmp_path)
    again = MaskToImage.from_pretrained(tmp_path)
    assert again.recipe.labels == labels
    with pytest.raises(ValueError, match="label"):
        again(torch.full((32, 32), 3, dtype=torch.uint8))


def test_weights_saved_in_16_bits_are_half_as_large_and_nearly_the_same(pipe, face, tmp_path):
    pipe.save_pretrained(tmp_path / "full")
    pipe.save_pretrained(tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    again = MaskToImage.from_pretrained(tmp_path / "half")
    assert all(p.dtype == torch.float32 for p in again.model.parameters())
    assert 0 < (again(face, output_type="pt") - pipe(face, output_type="pt")).abs().max() < 0.02


def damage_labels(folder):
    content = json.loads(folder.joinpath("config.json").read_text())
    content["labels"]["mirrored"] = [[2, 70]]
    folder.joinpath("config.json").write_text(json.dumps(content))


def damage_config(folder):
    folder.joinpath("config.json").write_text("{}")


def newer_format(folder):
    content = json.loads(folder.joinpath("config.json").read_text()) | {"format": 4}
    folder.joinpath("config.json").write_text(json.dumps(content))


def other_model(folder):
    content = json.loads(folder.joinpath("config.json").read_text())
    content["model_args"]["depth"] = 1
    folder.joinpath("config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda f: f.joinpath("config.json").unlink(), FileNotFoundError, "config.json: not found"),
        (lambda f: f.joinpath("model.safetensors").unlink(), FileNotFoundError, "model.safetensors: not found"),
        (lambda f: f.joinpath("model.safetensors").write_bytes(b"123"), ValueError, "model.safetensors: is no safet"),
        (damage_labels, ValueError, r"config.json: not a MaskToImage configuration .*mirrored.*got \(2, 70\)"),
        (damage_config, ValueError, "config.json: not a MaskToImage configuration"),
        (newer_format, ValueError, "config.json.*newer ssmgen"),
        (other_model, ValueError, r"model.safetensors: \d+ tensor.* do not fit"),
    ],
)
def test_a_damaged_folder_is_named(pipe, tmp_path, damage, kind, message):
    pipe.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(kind, match=message):
        MaskToImage.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["./nothing", "nothing", "a/b/c", Path("owner/name"), "https://hub/a/b", "../a/b"])
def test_what_is_neither_folder_nor_packaged_nor_hub_id(name):
    with pytest.raises(FileNotFoundError, match="no such folder, no packaged model .there are: .*, and not a hub id"):
        MaskToImage.from_pretrained(name)


def test_a_packaged_model_is_loaded_by_its_name(pipe, face, tmp_path, monkeypatch):
    """Whatever folder lies in the package's ``pretrained`` is one; a folder of that name in sight comes first."""
    monkeypatch.setattr("ssmgen.pipeline.folder._PACKAGED", tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    assert packaged() == []
    pipe.save_pretrained(tmp_path / "pretrained" / "small-one")
    assert packaged() == ["small-one"]
    again = MaskToImage.from_pretrained("small-one")
    assert torch.equal(again(face, output_type="pt"), pipe(face, output_type="pt"))
    with pytest.raises(FileNotFoundError, match="no packaged model .there are: small-one."):
        MaskToImage.from_pretrained("small-two")
    with pytest.raises(ValueError, match="revision='v1' is for repositories on the hub"):
        MaskToImage.from_pretrained("small-one", revision="v1")
    (tmp_path / "small-one").mkdir()
    with pytest.raises(FileNotFoundError, match="small-one/config.json: not found"):
        MaskToImage.from_pretrained("small-one")


def test_the_hub_is_asked_for_what_was_said(pipe, face, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path)
    asked = {}

    def download(name, **settings):
        asked.update(settings, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    again = MaskToImage.from_pretrained("owner/name", revision="v1", local_files_only=True)
    assert asked.pop("allow_patterns") == ["config.json", "model.safetensors", "autoencoder/*", "README.md"]
    assert asked == {"name": "owner/name", "revision": "v1", "local_files_only": True, "local_dir": None}
    assert torch.equal(again(face, output_type="pt"), pipe(face, output_type="pt"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("off")))
    with pytest.raises(FileNotFoundError, match="owner/name: no such folder here, .* from the hub: off"):
        MaskToImage.from_pretrained("owner/name")


def test_what_was_never_downloaded_is_not_fetched_behind_ones_back(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="owner/name: .*could not be fetched from the hub"):
        MaskToImage.from_pretrained("owner/name", local_files_only=True)


def test_what_is_pushed_can_be_loaded(pipe, face, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *_, **__: None)

    def upload(*, repo_id, folder_path):
        shutil.copytree(folder_path, tmp_path / "hub", dirs_exist_ok=True)
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    assert pipe.push_to_hub("owner/name") == "https://hub/owner/name"
    card = (tmp_path / "hub/README.md").read_text()
    assert 'from_pretrained("owner/name")' in card and "A test." in card and "13 hair" in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "ssmgen" and metadata["pipeline_tag"] == "image-to-image"
    pipe.push_to_hub("owner/name", card="# A card of OWNER/NAME")
    assert (tmp_path / "hub/README.md").read_text() == "# A card of owner/name"
    again = MaskToImage.from_pretrained(tmp_path / "hub")
    assert torch.equal(again(face, output_type="pt"), pipe(face, output_type="pt"))


def test_a_recipe_of_another_model_is_not_saved(pipe, tmp_path):
    recipe = replace(pipe.recipe, model_args=pipe.recipe.model_args | {"depth": 3})
    other = MaskToImage(pipe.model, pipe.autoencoder, recipe)
    with pytest.raises(ValueError, match="another model than the one to be saved: blocks.2.*absent here"):
        other.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_model_without_a_mask_is_no_pipeline(pipe):
    label = {"kind": {"name": "class-label", "num_labels": 3}}
    model = ssmgen.build("sisma-debug", conditions=label, cross={})
    with pytest.raises(ValueError, match="no condition called 'mask', only kind"):
        MaskToImage(model, pipe.autoencoder, pipe.recipe)
