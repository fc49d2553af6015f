"""MaskToImage: what goes in, what comes out, and what is written and read back."""

import hashlib
import itertools
import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from PIL import Image

import ssmgen
from ssmgen import MaskToImage
from ssmgen.data import BISENET19, CELEBAMASK19, LabelSet, draw_face, remap, write_png
from ssmgen.data.images import to_pil
from ssmgen.pipeline import Recipe, packaged
from ssmgen.precision import Choice
from ssmgen.training import derived_seed

ARGS = {"in_channels": 3, "mask_scale": 1, "patch_size": 4, "mask_dropout": 0.1, "dim": 96}


@pytest.fixture(scope="module")
def face():
    return draw_face(2, 64)[1]


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    model = ssmgen.build("sisma-debug", **ARGS)
    for parameter in model.parameters():  # an untrained head is zero and would hide every fault
        torch.nn.init.normal_(parameter, std=0.05)
    recipe = Recipe("sisma-debug", ARGS, "identity", 32, CELEBAMASK19, {"solver": "euler", "steps": 3}, "A test.")
    return MaskToImage(model, ssmgen.build("identity"), recipe)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_tensor_of_label_maps_is_a_list_of_masks(pipe, face, count):
    masks = [face, face.flip(-1), face.flip(0)][:count]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pipe(masks, seed=4, num_images=2, output_type="pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no order of classes is suggested
        found = pipe(torch.stack(masks).long(), seed=4, num_images=2, output_type="uint8")
    assert found.dtype == torch.uint8 and torch.equal(found, (expected * 255).round().to(torch.uint8))


def test_every_output_type_is_the_same_image(pipe, face):
    latents = pipe(face, output_type="latent")
    tensor, array, images = (pipe(face, output_type=kind) for kind in ("pt", "np", "pil"))
    assert tensor.shape == (1, 3, 32, 32) and array.shape == (1, 32, 32, 3) and images[0].size == (32, 32)
    assert torch.equal(tensor, (latents / 2 + 0.5).clamp(0, 1)) and tensor.std() > 0.02
    assert torch.equal(torch.from_numpy(array).movedim(-1, 1), tensor)
    assert images[0].getpixel((5, 9)) == tuple((tensor[0, :, 9, 5] * 255).round().int().tolist())


def test_each_kind_of_mask_gives_the_same_image(pipe, face, tmp_path):
    colours = CELEBAMASK19.colorize(face)
    write_png(tmp_path / "ids.png", face)
    write_png(tmp_path / "rgb.png", colours)
    palette = to_pil(face).copy()
    palette.putpalette([value for colour in CELEBAMASK19.palette for value in colour])
    palette.save(tmp_path / "palette.png")
    expected = pipe(face, output_type="pt")
    kinds = [*(tmp_path / f"{kind}.png" for kind in ("ids", "rgb", "palette")), str(tmp_path / "ids.png")]
    kinds += [face.long(), face.numpy(), colours, colours.movedim(0, -1).numpy(), to_pil(face), to_pil(colours)]
    kinds += [Image.open(tmp_path / "palette.png"), to_pil(colours).convert("RGBA"), to_pil(face).convert("LA")]
    kinds += [face.numpy().astype(kind) for kind in ("uint16", "int32", ">i8")] + [
        face.numpy()[:, ::-1].copy()[:, ::-1]
    ]
    kinds += [face.to(torch.uint16), face.int()]
    for kind in kinds:
        assert torch.equal(pipe(kind, output_type="pt"), expected), kind


def test_other_orders_are_renamed_when_said(pipe, face):
    theirs = remap(face, CELEBAMASK19, BISENET19)
    expected = pipe(face, output_type="pt")
    assert torch.equal(pipe(theirs, remap="bisenet19", output_type="pt"), expected)
    assert torch.equal(pipe(BISENET19.colorize(theirs), palette="bisenet19", output_type="pt"), expected)
    with pytest.warns(UserWarning, match="look like the order bisenet19.*say remap='bisenet19'"):
        wrong = pipe(theirs, output_type="pt")
    assert not torch.equal(wrong, expected)


def test_a_palette_that_disagrees_with_its_colours_is_refused(pipe, face):
    """A picture's palette says what its indices mean, in a file as in memory."""
    theirs = to_pil(remap(face, CELEBAMASK19, BISENET19))
    theirs.putpalette([value for colour in BISENET19.palette for value in colour])
    with pytest.raises(ValueError, match="the two disagree"):
        pipe(theirs)
    assert torch.equal(pipe(theirs, palette="bisenet19", output_type="pt"), pipe(face, output_type="pt"))


def test_a_needless_remap_is_warned_about(pipe, face):
    with pytest.warns(UserWarning, match="look like the order celebamask19.*leave out remap="):
        pipe(face, remap="bisenet19")


def test_no_face_in_its_right_order_is_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(60):
            ssmgen.data.to_labels(draw_face(seed, 64)[1], CELEBAMASK19)


def test_real_faces_are_told_from_the_other_order(shared):
    from ssmgen.data import read_mask
    from ssmgen.data.labels import likelier_order

    masks = [read_mask(file, CELEBAMASK19) for file in sorted((shared / "faces" / "masks").glob("*.png"))[::8]]
    assert not any(likelier_order(mask, CELEBAMASK19) for mask in masks)
    found = [likelier_order(remap(mask, CELEBAMASK19, BISENET19), CELEBAMASK19) is not None for mask in masks]
    assert sum(found) > 0.85 * len(found)


def test_image_i_depends_on_its_seed_and_mask_alone(pipe, face):
    other = draw_face(8, 64)[1]
    four = pipe([face, other], num_images=2, seed=5, output_type="pt")
    assert torch.allclose(four[3:], pipe(other, seed=8, output_type="pt"), atol=1e-5)
    assert torch.allclose(four, pipe([face, other], num_images=2, seed=5, batch_size=1, output_type="pt"), atol=1e-5)
    assert torch.allclose(four[:2], pipe(face, num_images=2, seed=[5, 6], output_type="pt"), atol=1e-5)
    assert not torch.allclose(four[0], four[1], atol=1e-2)


def test_settings_of_a_call_replace_the_recipe(pipe, face):
    seen = []
    pipe(face, steps=5, callback=lambda step, x: seen.append((step, tuple(x.shape))))
    assert len(seen) == 5 and seen[0][1] == (1, 3, 32, 32)
    guided = {"guidance_scale": 3.0}
    changes = ({}, {"solver": "heun"}, guided, {**guided, "guidance_start": 0.5}, {"shift": 0.5})
    images = [pipe(face, output_type="pt", **changed) for changed in changes]
    for one, other in itertools.combinations(images, 2):
        assert not torch.equal(one, other)


def test_what_is_saved_is_read_back(pipe, face, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    again = MaskToImage.from_pretrained(tmp_path / "saved")
    assert again.recipe == pipe.recipe and again.card == pipe.card
    assert torch.equal(again(face, output_type="pt"), pipe(face, output_type="pt"))


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
        monkeypatch.setattr("ssmgen.model_folder.os.replace", stop)
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


def test_weights_in_bfloat16_give_nearly_the_same_and_nothing_is_lost(pipe, face, monkeypatch):
    plain = pipe(face, output_type="pt")
    moved = MaskToImage(pipe.model, pipe.autoencoder, pipe.recipe)
    for how in ({"dtype": torch.bfloat16}, {"device": "cpu", "dtype": torch.bfloat16}):
        half = moved.to(**how)(face, output_type="pt")
        assert 0 < (half - plain).abs().max() < 0.1
    assert torch.equal(moved.to(torch.bfloat16)(face, output_type="pt"), half)
    assert torch.equal(moved.to("cpu", torch.float32)(face, output_type="pt"), plain)
    with pytest.raises(TypeError, match="floating-point one, got torch.int8"):
        moved.to(torch.int8)
    with pytest.raises(ValueError, match="dtype must be a torch.dtype, 'auto' or None, got 'half'"):
        moved.to(dtype="half")
    for taken, dtype in (("bf16", torch.bfloat16), ("no", None)):
        monkeypatch.setattr("ssmgen.precision.choose_precision", lambda asked, device, taken=taken: Choice(taken, ""))
        assert moved.to("cpu", "auto").sampler.dtype == dtype == moved.to(dtype="auto").sampler.dtype


def test_weights_saved_in_16_bits_are_half_as_large_and_nearly_the_same(pipe, face, tmp_path):
    pipe.save_pretrained(tmp_path / "full")
    pipe.save_pretrained(tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    again = MaskToImage.from_pretrained(tmp_path / "half")
    assert all(p.dtype == torch.float32 for p in again.model.parameters())
    assert 0 < (again(face, output_type="pt") - pipe(face, output_type="pt")).abs().max() < 0.02


def test_parts_that_do_not_fit_are_refused(pipe):
    other = ssmgen.build("sisma-debug", **ARGS | {"num_classes": 5})
    with pytest.raises(ValueError, match="num_classes=5, and there are 19 classes of celebamask19"):
        MaskToImage(other, pipe.autoencoder, pipe.recipe)
    with pytest.raises(ValueError, match="image_size must be a multiple of 4 .* got 30"):
        MaskToImage(pipe.model, pipe.autoencoder, replace(pipe.recipe, image_size=30))
    for wrong, kind, message in (
        ({"model": "euler"}, ValueError, r"'euler' is of kind solver, not model\. All models: [^.]*\.$"),
        ({"model": "my-own"}, ValueError, "import the module that registers it first"),
        ({"sampling": {"step": 3}}, ValueError, "no setting 'step'. Did you mean 'steps'"),
        ({"image_size": "64"}, ValueError, "image_size must be a positive number of pixels, got '64'"),
    ):
        with pytest.raises(kind, match=message):
            replace(pipe.recipe, **wrong)


BAD_CALLS = [
    ({"output_type": "jpg"}, "output_type must be one of pil, np, pt, uint8, latent, got 'jpg'"),
    ({"num_images": 0}, "num_images and batch_size must be at least 1, got 0"),
    ({"seed": [1, 2]}, "got 2 seeds for 1 image"),
    *(({"seed": seed}, "a seed is a whole number from 0 to 2") for seed in (None, -1, 2**64, 0.0, True, "1", [1.5])),
    ({"seed": 2**64 - 1, "num_images": 2}, "a seed is .* got 18446744073709551616"),
    ({"step": 3}, "MaskToImage takes no 'step'. Did you mean 'steps'"),
    ({"steps": 0}, "steps must be a positive whole number, got 0"),
    ({"steps": 2.5}, "steps must be a positive whole number, got 2.5"),
    ({"shift": 0}, "shift must be a number above 0, got 0"),
    ({"shift": float("nan")}, "shift must be a number above 0, got nan"),
    ({"guidance_scale": -1.0}, "guidance_scale must be a number at least 0, got -1.0"),
    ({"guidance_start": 1.5}, r"guidance_start must be a number in \[0, 1\], got 1.5"),
    ({"solver": "eular"}, "Did you mean 'euler'"),
    ({"solver": "sisma-xl"}, "'sisma-xl' is of kind model, not solver"),
    ({"remap": "bisenet"}, "unknown label set 'bisenet'.*bisenet19"),
    ({"remap": "bisenet19", "palette": "celebamask19"}, "palette=celebamask19 and remap=bisenet19 differ"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_CALLS)
def test_bad_settings_are_refused(pipe, face, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(face, **settings)


BAD_MASKS = [
    (torch.zeros(8, 9, dtype=torch.uint8), ValueError, "the mask is 8 x 9 .height x width.: crop it to a square"),
    ([torch.zeros(8, 8).int(), torch.full((8, 8), 19)], ValueError, "mask 2 of 2: label 19 is outside 0..18"),
    (torch.full((8, 8), 19, dtype=torch.uint8), ValueError, "19"),
    (torch.full((8, 8), 300), ValueError, "300"),
    (torch.zeros(8, 8), TypeError, "ids are integers, got torch.float32"),
    (torch.zeros(2, 8, 8, dtype=torch.uint8).numpy(), ValueError, "Several masks go into a list"),
    (torch.full((2, 8, 8), 19), ValueError, "the masks: label 19 is outside 0..18"),
    (torch.zeros(3, 8, 9).long(), ValueError, "each mask is 8 x 9"),
    (torch.full((8, 8, 3), 7, dtype=torch.uint8).index_fill(2, torch.tensor(1), 9), ValueError, "not in the palette"),
    ([], ValueError, "the list of masks is empty"),
    ({"mask": 1}, TypeError, "a mask is a path, a PIL image, an array or a tensor, got dict"),
    ("nowhere.png", FileNotFoundError, "nowhere.png: no such file"),
    (Image.new("CMYK", (8, 8)), ValueError, "CMYK"),
    (Image.new("I;16", (8, 8)), ValueError, "I;16 image with more than 8 bits; expected L or P"),
    (Image.new("RGBA", (8, 8)), ValueError, "RGBA image with transparent pixels"),
    (torch.zeros(8, 8).numpy(), TypeError, "ids are integers, got float32"),
    (
        torch.zeros(8, 8).bool().numpy(),
        TypeError,
        r"got bool \(8, 8\): give mask.astype\('int64'\), where True becomes",
    ),
    (torch.zeros(8, 8).bool(), TypeError, r"got torch.bool \(8, 8\): give mask.long\(\), where True becomes class 1"),
    (torch.zeros(8, 8), TypeError, r"give mask.long\(\) if its values are ids"),
    (torch.zeros(19, 8, 8), TypeError, r"give mask.argmax\(0\) of one-hot classes or logits"),
    (torch.zeros(19, 8, 8).bool(), TypeError, r"give mask.long\(\).argmax\(0\) of one-hot classes"),
    (torch.zeros(0, 8, 8, dtype=torch.uint8), ValueError, "the mask: the batch is empty"),
    (torch.eye(8).byte() * 255, ValueError, "label 255 is outside .* as a binary mask does: divide it by 255"),
    (torch.eye(8).byte() * 255 + 1 - torch.eye(8).byte(), ValueError, r"label 255 \(255 is often an ignore label\)"),
]


@pytest.mark.parametrize(("mask", "kind", "message"), BAD_MASKS, ids=range(len(BAD_MASKS)))
def test_what_is_no_mask_is_refused(pipe, mask, kind, message):
    with pytest.raises(kind, match=message):
        pipe(mask)


def test_noise_of_small_seeds_is_what_it_was():
    """Figures and pictures of the docs rest on it; torch's default dtype and device do not matter."""
    expected = {
        0: "a25207107225c7f610397660248fee8c2aac455439e6b113fdf5cfea11eff662",
        7: "df1f2643101fd18998697a13646d2397d4810f69f30336576c8e5b87043472de",
        2**32 - 1: "4181534d1bf44f1d9c94f748867b35360e28963cb58c3d1b5ac5c22c36bb496c",
    }
    try:
        for dtype, device in ((torch.float32, "cpu"), (torch.float64, "meta"), (torch.bfloat16, "cpu")):
            torch.set_default_dtype(dtype)
            torch.set_default_device(device)
            noise = ssmgen.initial_noise([*expected, 2**40], (4, 32, 32))
            assert noise.dtype == torch.float32 and noise.device.type == "cpu"
            found = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in noise]
            assert found[:3] == list(expected.values())
            assert found[3] == "875b1e14f90cd98bb105f84575597a94e03cadee6f62c375338bb177aa7f4922", (
                "noise of a large seed is fixed too"
            )
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_every_bit_of_a_seed_counts():
    seeds = [5, *(5 + 2**bit for bit in range(3, 64)), derived_seed(0, "a"), derived_seed(0, "a") ^ 2**62]
    noise = ssmgen.initial_noise(seeds, (3, 64, 64)).flatten(1)
    assert (torch.corrcoef(noise) - torch.eye(len(seeds))).abs().max() < 0.06, "5 of the standard deviations"
    large = noise[-20:].double()
    assert abs(large.mean()) < 0.01 and abs(large.std() - 1) < 0.01 and abs((large**4).mean() - 3) < 0.1
    assert 3.5 < large.abs().max() < 6


def test_a_default_of_float64_changes_no_image(pipe, face):
    expected = pipe(face, output_type="pt", seed=2**63)
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.allclose(pipe(face, output_type="pt", seed=2**63), expected, atol=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_noise_that_cannot_be_is_explained():
    for seeds, kind, message in (
        (3, TypeError, "seeds is a list, one for each image"),
        (None, TypeError, "seeds is a list, one for each image"),
        ([], ValueError, "seeds is empty"),
        ([None], TypeError, "a seed is a whole number from 0 to .* got None"),
        ([2**64], ValueError, "a seed is a whole number from 0 to .* got 18446744073709551616"),
    ):
        with pytest.raises(kind, match=message):
            ssmgen.initial_noise(seeds, (3, 4, 4))
    with pytest.raises(TypeError, match="sample takes no 'step'. Did you mean 'steps'"):
        ssmgen.sample(None, torch.zeros(1), step=3)


def test_a_device_that_is_not_there_is_named(pipe):
    for device in ("xpu", "cuda:99", "gpu"):
        with pytest.raises(ValueError, match=f"device '{device}': torch cannot use it here .*'ssmgen doctor'"):
            pipe.to(device)
    assert pipe.device.type == "cpu"
    with pytest.raises(TypeError, match="from_pretrained takes no 'local_file_only'. Did you mean 'local_files_only'"):
        MaskToImage.from_pretrained("drawn-faces", local_file_only=True)


def damage_config(folder):
    folder.joinpath("config.json").write_text("{}")


def newer_format(folder):
    content = json.loads(folder.joinpath("config.json").read_text()) | {"format": 2}
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
        (damage_config, ValueError, "config.json: is no configuration"),
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
    monkeypatch.setattr("ssmgen.model_folder._PACKAGED", tmp_path / "pretrained")
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
    assert asked == {"name": "owner/name", "revision": "v1", "local_files_only": True}
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
