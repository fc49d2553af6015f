"""MaskToImage: what goes in and what comes out."""

import itertools
import json
import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image
from pipelines import ARGS, random_pipe

import ssmgen
from ssmgen import MaskToImage
from ssmgen.data import BISENET19, CELEBAMASK19, draw_face, remap, write_png
from ssmgen.data.images import to_pil
from ssmgen.noise import shared_noise
from ssmgen.pipeline import interpolate
from ssmgen.precision import Choice


@pytest.fixture(scope="module")
def face():
    return draw_face(2, 64)[1]


@pytest.fixture(scope="module")
def pipe():
    return random_pipe({"solver": "euler", "steps": 3}, "A test.")


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


def test_weights_in_bfloat16_give_nearly_the_same_and_nothing_is_lost(pipe, face, monkeypatch):
    plain = pipe(face, output_type="pt")
    moved = MaskToImage(pipe.model, pipe.autoencoder, pipe.recipe)
    for how in ({"dtype": torch.bfloat16}, {"device": "cpu", "dtype": torch.bfloat16}):
        half = moved.to(**how)(face, output_type="pt")
        assert 0 < (half - plain).abs().max() < 0.1
    assert torch.equal(moved.to(torch.bfloat16)(face, output_type="pt"), half)
    assert torch.equal(moved.to("cpu", torch.float32)(face, output_type="pt"), plain)
    with pytest.raises(TypeError, match="floating-point dtype, got torch.int8"):
        moved.to(torch.int8)
    with pytest.raises(ValueError, match="dtype must be a torch.dtype, 'auto' or None, got 'half'"):
        moved.to(dtype="half")
    for taken, dtype in (("bf16", torch.bfloat16), ("no", None)):
        monkeypatch.setattr("ssmgen.precision.choose_precision", lambda asked, device, taken=taken: Choice(taken, ""))
        assert moved.to("cpu", "auto").sampler.dtype == dtype == moved.to(dtype="auto").sampler.dtype


def test_parts_that_do_not_fit_are_refused(pipe):
    other = ssmgen.build("sisma-debug", **ARGS | {"num_classes": 5})
    with pytest.raises(ValueError, match="num_classes=5, and there are 19 classes of celebamask19"):
        MaskToImage(other, pipe.autoencoder, pipe.recipe)
    with pytest.raises(ValueError, match="image_size must be a multiple of 4 .* got 30"):
        MaskToImage(pipe.model, pipe.autoencoder, replace(pipe.recipe, image_size=30))
    for wrong, kind, message in (
        ({"model": "euler"}, ValueError, r"'euler' is of kind solver, not model\. All models: [^.]*\.$"),
        ({"model": "my-own"}, ValueError, "import that module first"),
        ({"sampling": {"step": 3}}, TypeError, "takes no 'step'. Did you mean 'steps'"),
        ({"image_size": "64"}, ValueError, "image_size must be 1 to 16384 pixels, got '64'"),
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
    ({"guidance_scale": -1.0}, "guidance_scale must be a number at least 0, or one for each condition, got -1.0"),
    (
        {"guidance_start": 1.5},
        r"guidance_start must be a time in \[0, 1\], 0 noise and 1 data, .* got 1.5",
    ),
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


def test_a_default_of_float64_changes_no_image(pipe, face):
    expected = pipe(face, output_type="pt", seed=2**63)
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.allclose(pipe(face, output_type="pt", seed=2**63), expected, atol=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_device_that_is_not_there_is_named(pipe):
    for device in ("xpu", "cuda:99", "gpu"):
        with pytest.raises(ValueError, match=f"device '{device}': torch cannot use it here .*'ssmgen doctor'"):
            pipe.to(device)
    assert pipe.device.type == "cpu"
    with pytest.raises(TypeError, match="from_pretrained takes no 'local_file_only'. Did you mean 'local_files_only'"):
        MaskToImage.from_pretrained("drawn-faces", local_file_only=True)


def test_rectangles_are_made_from_masks_of_their_shape(pipe, tmp_path):
    wide = MaskToImage(pipe.model, pipe.autoencoder, replace(pipe.recipe, image_size=(16, 32)))
    mask = torch.zeros(16, 32, dtype=torch.long)
    mask[:, 16:] = 1
    assert wide.latent_size == (3, 16, 32) and wide.recipe.title == "sisma-debug, 16 x 32"
    image = wide(mask, output_type="uint8")
    assert tuple(image.shape) == (1, 3, 16, 32) and tuple(wide.pixels_of(image[0]).shape) == (1, 3, 16, 32)
    halved = wide.labels_of(mask.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert torch.equal(halved.long(), mask)
    with pytest.raises(ValueError, match="32 x 32 .height x width.: crop it to the aspect ratio of 16 x 32"):
        wide(torch.zeros(32, 32, dtype=torch.long))
    wide.save_pretrained(tmp_path / "wide")
    again = MaskToImage.from_pretrained(tmp_path / "wide")
    assert again.recipe == wide.recipe and again.recipe.size == (16, 32)
    assert torch.equal(again(mask, output_type="uint8"), image)
    assert replace(pipe.recipe, image_size=[32, 32]).image_size == 32, "a square is written as before"


def test_other_sizes_than_trained_are_made_when_asked(pipe, face):
    mask = face[:32]
    tall = pipe(mask.T.contiguous(), size=(48, 24), output_type="uint8")
    assert tuple(tall.shape) == (1, 3, 48, 24) and pipe.recipe.size == (32, 32)
    other = MaskToImage(pipe.model, pipe.autoencoder, replace(pipe.recipe, image_size=(48, 24)))
    assert torch.equal(other(mask.T.contiguous(), output_type="uint8"), tall)
    assert pipe(face, size=64, output_type="latent").shape[-2:] == (64, 64)
    half = pipe.to(torch.bfloat16).resized((48, 24))
    assert half.sampler.dtype == torch.bfloat16 and pipe.to(torch.float32).sampler.dtype is None
    for size, message in (
        ((48, 26), r"image_size must be a multiple of 4 .* got \(48, 26\)"),
        ((48, 24, 3), r"size must be a side or \(height, width\)"),
        ((48, 48), "the mask is 64 x 32 .height x width.: crop it to a square"),
        ((0, 0), "image_size must be 1 to 16384 pixels, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(mask.T.contiguous(), size=size)


def test_masks_of_nearly_the_same_shape_are_resized(pipe, face):
    assert tuple(pipe.labels_of(face[:, :63]).shape) == (32, 32)
    with pytest.raises(ValueError, match="64 x 60 .height x width.: crop it to a square, or give size= of its shape"):
        pipe.labels_of(face[:, :60])


@pytest.fixture(scope="module")
def bucketed(pipe):
    return MaskToImage(pipe.model, pipe.autoencoder, replace(pipe.recipe, image_size=[(32, 32), (48, 24), (24, 48)]))


def test_a_model_of_several_sizes_takes_the_one_that_suits_the_mask(bucketed, pipe, face, tmp_path):
    for mask, size in ((face, (32, 32)), (face[:, :30], (48, 24)), (face[:31], (24, 48))):
        image = bucketed(mask, output_type="uint8")
        assert tuple(image.shape[-2:]) == size
        assert torch.equal(pipe.resized(size)(image_mask(mask, size), output_type="uint8"), image)
    with pytest.raises(ValueError, match="mask 1 gets the size 32 x 32 and mask 2 48 x 24: call the pipeline once for"):
        bucketed([face, face[:, :32]])
    with pytest.raises(ValueError, match="64 x 45 .height x width.: crop it to the aspect ratio of 48 x 24, or give"):
        bucketed(face[:, :45])
    bucketed.save_pretrained(tmp_path / "buckets")
    again = MaskToImage.from_pretrained(tmp_path / "buckets")
    assert again.recipe == bucketed.recipe and again.recipe.title == "sisma-debug, 32 x 32 or 48 x 24 or 24 x 48"
    assert json.loads((tmp_path / "buckets/config.json").read_text())["format"] == 3
    pipe.save_pretrained(tmp_path / "square")
    assert json.loads((tmp_path / "square/config.json").read_text())["format"] == 2, "earlier versions read it"
    for sizes, message in (
        ([(32, 32), (32, 32)], "every bucket must be given once"),
        ([(32, 32), (30, 32)], "image_size must be a multiple of 4"),
        ([(32, 32), (30,)], "image_size must be 1 to"),
        ([], "image_size must be 1 to"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskToImage(pipe.model, pipe.autoencoder, replace(pipe.recipe, image_size=sizes))


def image_mask(mask, size):
    return torch.nn.functional.interpolate(mask[None, None], size, mode="nearest-exact")[0, 0]


def test_a_pipeline_starts_both_sides_from_the_same_noise(pipe, face):
    mask, labels = pipe.labels_of(face), pipe.recipe.labels
    plain, mirrored = (
        pipe(mask, seed=3, num_images=2, shared_noise=each, output_type="latent") for each in (False, True)
    )
    start = shared_noise(ssmgen.initial_noise([3, 4], pipe.latent_size), mask[None], labels.mirrored)
    assert torch.equal(mirrored, pipe(mask, noise=start, num_images=2, output_type="latent"))
    assert not torch.equal(mirrored, plain)
    recipe = replace(pipe.recipe, sampling=replace(pipe.recipe.sampling, shared_noise=True))
    own = MaskToImage(pipe.model, pipe.autoencoder, recipe)
    assert torch.equal(own(mask, seed=3, num_images=2, output_type="latent"), mirrored)
    masks = [mask, face.flip(1)]
    together = own(masks, seed=3, num_images=2, output_type="latent")
    apart = [own(each, seed=seed, num_images=2, output_type="latent") for each, seed in zip(masks, (3, 5), strict=True)]
    assert torch.allclose(together, torch.cat(apart), atol=1e-4)
    first, last = interpolate(own, mask, (3, 4), 2, output_type="latent")
    assert torch.allclose(torch.stack([first, last]), mirrored, atol=1e-4)
    with pytest.raises(ValueError, match="shared_noise needs labels, which a Sampler does not know"):
        pipe.sampler(start, mask[None], shared_noise=True)
    with pytest.raises(TypeError, match="shared_noise must be True or False, got 1"):
        pipe(mask, shared_noise=1)
