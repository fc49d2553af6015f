"""Files and folders from outside run no code, read nothing else, and are named when they are refused."""

import json
import shutil

import pytest
from hostile_folders import linked, odd_settings, payloads, pickled_weights, shards, with_code_keys
from pipelines import random_pipe
from safetensors.torch import load_file, save_file

from ssmgen import MaskToImage, build
from ssmgen.data import CELEBAMASK19
from ssmgen.data.images import read_image, read_mask
from ssmgen.latents import autoencoder_at
from ssmgen.weights import read_weights

HINT = "can run code"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipe"
    random_pipe().save_pretrained(folder)
    return folder


@pytest.fixture
def canary(tmp_path):
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists(), "code of a file was run"


def outcome(read, folder):
    """What a reader raises, which must be an error about the folder; None if it read it."""
    try:
        read(folder)
    except (ValueError, OSError) as error:
        assert str(folder) in str(error), error
        return str(error)
    return None


def variants(base, changes, tmp_path):
    """Copies of a folder, each with one change."""
    for number, (name, change) in enumerate(changes):
        folder = tmp_path / f"case-{number}"
        assert not folder.is_relative_to(base), "a copy inside itself never ends"
        shutil.copytree(base, folder)
        change(folder)
        yield name, folder
        shutil.rmtree(folder)


def read_autoencoder(folder):
    return build(autoencoder_at(str(folder)), source=str(folder))


def read_parser(file):
    from recipes.sisma.parser import load_parser

    return load_parser(file)


READERS = {
    "weights": (read_weights, "model.safetensors"),
    "parser": (read_parser, "parser.safetensors"),
    "image": (read_image, "image.png"),
    "mask": (lambda file: read_mask(file, CELEBAMASK19), "mask.png"),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_file_is_unpickled_whatever_its_name(reader, tmp_path, canary):
    if reader == "parser":
        pytest.importorskip("omegaconf", reason="the commands need ssmgen[train]")
    read, name = READERS[reader]
    for payload, content in payloads(canary).items():
        file = tmp_path / name
        file.write_bytes(content)
        message = outcome(read, file)
        assert message is not None, payload
        if reader in ("weights", "parser") and payload.endswith((".pkl", ".pt")):
            assert HINT in message and "save_file" in message, (payload, message)


def test_pickles_beside_weights_are_ignored_and_in_their_place_explained(saved, tmp_path, canary):
    for stem in ("model", "pytorch_model", "model.safetensors"):
        for name, folder in variants(saved, pickled_weights(canary, stem), tmp_path / stem):
            assert outcome(MaskToImage.from_pretrained, folder) is None, name
        alone = pickled_weights(canary, stem, remove="model.safetensors")
        for name, folder in variants(saved, alone, tmp_path / f"{stem}-alone"):
            message = outcome(MaskToImage.from_pretrained, folder)
            assert message and "model.safetensors: not found" in message and HINT in message, name


def test_an_autoencoders_pickles_are_ignored_or_explained(tiny, tmp_path, canary):
    file = "diffusion_pytorch_model.safetensors"
    for stem in ("diffusion_pytorch_model", "taesd_encoder"):
        for name, folder in variants(tiny, pickled_weights(canary, stem), tmp_path / stem):
            assert outcome(read_autoencoder, folder) is None, name
        for name, folder in variants(tiny, pickled_weights(canary, stem, remove=file), tmp_path / f"{stem}-alone"):
            message = outcome(read_autoencoder, folder)
            assert message and HINT in message, name


def test_no_setting_names_code(saved, tiny, tmp_path, canary):
    for name, folder in variants(saved, with_code_keys("config.json", canary), tmp_path / "pipe"):
        assert outcome(MaskToImage.from_pretrained, folder) is not None, name
    for _, folder in variants(tiny, with_code_keys("config.json", canary), tmp_path / "of-tiny"):
        outcome(read_autoencoder, folder)


def test_odd_settings_are_errors_about_their_file(saved, tiny, tmp_path, canary):
    for _, folder in variants(saved, odd_settings("config.json", 40), tmp_path / "pipe"):
        outcome(MaskToImage.from_pretrained, folder)
    for _, folder in variants(tiny, odd_settings("config.json", 12), tmp_path / "of-tiny"):
        outcome(read_autoencoder, folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"format": 1e999}', "\ufeff\ufeff{}", "\x00"])
def test_a_configuration_that_is_none_is_named(saved, tiny, tmp_path, text):
    for base, read in ((saved, MaskToImage.from_pretrained), (tiny, read_autoencoder)):
        folder = shutil.copytree(base, tmp_path / f"copy-of-{base.name}")
        folder.joinpath("config.json").write_text(text)
        assert "config.json" in (outcome(read, folder) or "")


def test_links_out_of_a_folder_are_not_followed_to_text(saved, tiny, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("open sesame")
    for file in ("README.md", "config.json"):
        _, folder = next(variants(saved, [(file, linked(file, secret))], tmp_path / file))
        message = outcome(MaskToImage.from_pretrained, folder)
        assert message and "is a link to a file outside" in message and "sesame" not in message
    _, folder = next(variants(tiny, [("", linked("config.json", secret))], tmp_path / "tiny-link"))
    assert "is a link to a file outside" in (outcome(read_autoencoder, folder) or "")


def test_links_of_the_hubs_cache_are_followed(saved, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in saved.iterdir():
        shutil.copy(file, blobs / file.name.lower())
        snapshot.joinpath(file.name).symlink_to(f"../../blobs/{file.name.lower()}")
    assert MaskToImage.from_pretrained(snapshot).card


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "evil.bin", "a/../../outside.safetensors"])
def test_an_index_names_safetensors_of_its_own_folder(tiny, tmp_path, canary, name):
    weights = load_file(tiny / "diffusion_pytorch_model.safetensors")
    save_file(weights, tmp_path / "outside.safetensors")
    _, folder = next(variants(tiny, [("", shards([name], canary))], tmp_path / "shards"))
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"weight_map": dict.fromkeys(weights, name)}))
    message = outcome(read_autoencoder, folder)
    assert message and "index.json" in message and "its own folder" in message


def test_a_link_to_itself_is_named(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "loop")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    assert "config.json: is a link that leads nowhere" in outcome(MaskToImage.from_pretrained, folder)
