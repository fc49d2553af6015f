"""Values of conditions besides the mask: texts, pictures, labels and maps, as users have them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pipelines import random_pipe, told_pipe

import ssmgen
from ssmgen import MaskToImage
from ssmgen.data import BISENET19, CELEBAMASK19, draw_face, remap, write_png
from ssmgen.data.images import to_pil
from ssmgen.data.transforms import center_crop_resize
from ssmgen.pipeline import MaskToImagePipeline, edit, interpolate, variations
from ssmgen.sampling import Sampling

SIZE = (32, 48)


@pytest.fixture(scope="module")
def pipe():
    return told_pipe(SIZE)


@pytest.fixture(scope="module")
def pair():
    return center_crop_resize(*draw_face(2, 64), SIZE)


@pytest.fixture(scope="module")
def other():
    """A style picture of another shape than the images."""
    return draw_face(5, 64)


def test_each_kind_of_value_is_what_the_sampler_takes(pipe, pair, other):
    mask, edges = pair[1], torch.rand(1, 1, *SIZE)
    noise = ssmgen.initial_noise([3], pipe.latent_size)
    image = pair[0].float()[None] / 127.5 - 1
    values = {
        "words": ssmgen.build("word-vectors", width=8).encode(["a hat"]),
        "style": {"latents": image, "mask": mask[None]},
        "kind": torch.tensor([2]),
        "edges": edges,
    }
    asked = {"words": "a hat", "style": pair[0], "style_mask": mask, "kind": 2, "edges": edges[0].numpy()}
    for name, value in values.items():
        expected = pipe.sampler(noise, mask[None], pipe.recipe.sampling, **{name: value})
        told = {key: given for key, given in asked.items() if key.removesuffix("_mask") == name}
        assert torch.equal(pipe(mask, seed=3, output_type="latent", **told), expected), name
        assert torch.equal(pipe(mask, seed=3, output_type="latent", **{name: value}), expected), name
        assert not torch.equal(pipe(mask, seed=3, output_type="latent"), expected), name


def test_one_value_per_image_gives_each_image_its_own(pipe, pair, other):
    mask = pair[1]
    told = {
        "words": ["a hat", "black hair", "a face"],
        "style": [pair[0], other[0], draw_face(7, 48)[0]],
        "style_mask": [pair[1], other[1], draw_face(7, 48)[1]],
        "kind": [0, 1, 2],
        "edges": torch.rand(3, 1, *SIZE),
    }
    together = pipe(mask, num_images=3, batch_size=2, output_type="pt", **told)
    for i in range(3):
        alone = pipe(mask, seed=i, output_type="pt", **{name: given[i] for name, given in told.items()})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="give one kind, or one per image: got 3 values for 2 images"):
        pipe(mask, num_images=2, kind=[0, 1, 2])


def test_a_style_is_read_like_a_mask_and_an_image(pipe, pair, other, tmp_path):
    """From files, in the other order, and of any size: a scaled picture has nearly the same style."""
    image, labels = other
    expected = pipe(pair[1], style=image, style_mask=labels, output_type="pt")
    write_png(tmp_path / "style.png", image)
    write_png(tmp_path / "mask.png", CELEBAMASK19.colorize(labels))
    kinds = [(to_pil(image), to_pil(labels)), (image.movedim(0, -1).numpy(), labels.numpy())]
    for style, mask in [*kinds, (str(tmp_path / "style.png"), tmp_path / "mask.png")]:
        assert torch.equal(pipe(pair[1], style=style, style_mask=mask, output_type="pt"), expected)
    theirs = [remap(each, CELEBAMASK19, BISENET19) for each in (pair[1], labels)]
    renamed = pipe(theirs[0], remap="bisenet19", style=image, style_mask=theirs[1], output_type="pt")
    assert torch.equal(renamed, expected)
    without = pipe(pair[1], output_type="pt")
    smaller = pipe(pair[1], style=draw_face(5, 48)[0], style_mask=labels, output_type="pt")
    assert (smaller - expected).abs().max() < 0.1 * (without - expected).abs().max()


def test_a_style_without_regions_takes_the_picture_alone(pair, other):
    pipe = told_pipe(SIZE, regions=False)
    assert not torch.equal(pipe(pair[1], style=other[0], output_type="pt"), pipe(pair[1], output_type="pt"))
    with pytest.raises(TypeError, match="MaskToImage takes no 'style_mask'. Did you mean 'style'"):
        pipe(pair[1], style=other[0], style_mask=other[1])


def test_a_map_is_scaled_to_the_images(pipe, pair):
    edges = torch.rand(1, *SIZE)
    larger = edges.repeat_interleave(2, 1).repeat_interleave(2, 2)
    found, expected = (pipe(pair[1], edges=each, output_type="pt") for each in (larger, edges))
    assert (found - expected).abs().max() < 0.2 * (pipe(pair[1], output_type="pt") - expected).abs().max()


def test_each_condition_has_its_own_guidance(pipe, pair):
    plain, guided = (
        pipe(pair[1], words="a hat", guidance_scale={"words": scale}, output_type="pt") for scale in (1, 4)
    )
    assert not torch.equal(plain, guided)
    with pytest.raises(ValueError, match="needs a value for the guided condition"):
        pipe(pair[1], guidance_scale={"words": 2})
    with pytest.raises(ValueError, match="has edges_dropout=0"):
        pipe(pair[1], edges=torch.rand(SIZE), guidance_scale={"edges": 2})


def test_scales_of_a_recipe_serve_the_conditions_that_have_a_value(pipe, pair, tmp_path):
    """A recipe may guide what a call leaves out, each from its own time on; so may settings that are given whole."""
    own = {"guidance_scale": {"mask": 2, "words": 3}, "guidance_start": {"mask": np.float32(0.5)}}
    guided = told_pipe(SIZE, **own)
    plain, told = {"guidance_scale": {"mask": 2}}, {"words": "a hat"}
    later = {"steps": 2, "guidance_start": {"mask": 0.5}, "output_type": "pt"}
    expected = pipe(pair[1], **plain, **later)
    assert torch.equal(guided(pair[1], output_type="pt"), expected)
    assert torch.equal(guided(pair[1], sampling=replace(guided.recipe.sampling, shift=1.0), output_type="pt"), expected)
    both = pipe(pair[1], guidance_scale={"mask": 2, "words": 3}, **told, **later)
    assert torch.equal(guided(pair[1], output_type="pt", **told), both) and not torch.equal(both, expected)
    assert len(variations(guided, *pair)) == 1
    guided.save_pretrained(tmp_path / "guided")
    again = MaskToImage.from_pretrained(tmp_path / "guided")
    assert again.recipe.sampling == guided.recipe.sampling
    assert torch.equal(again(pair[1], output_type="pt", **told), both)
    for key in ("guidance_scale", "guidance_start"):
        with pytest.raises(ValueError, match=f"{key}=.'wrods': 0.5. names a condition that the model does not have"):
            MaskToImage(pipe.model, pipe.autoencoder, replace(pipe.recipe, sampling={key: {"wrods": 0.5}}))
    with pytest.raises(ValueError, match="names no condition 'wrods'"):
        pipe(pair[1], sampling=Sampling(guidance_scale={"wrods": 2}))


BAD = [
    ({"wrods": "a hat"}, TypeError, "MaskToImage takes no 'wrods'. Did you mean 'words'"),
    ({"kind": "hat"}, TypeError, "kind takes a label, a whole number, not a text: got 'hat'"),
    ({"edges": "edges.png"}, TypeError, "edges takes a map of numbers, an array or a tensor, not a text"),
    ({"words": 3}, TypeError, "words takes a text, or a list with one per image, got 3"),
    ({"words": ["a", 2]}, TypeError, "words takes a text"),
    ({"words": torch.rand(1, 4, 9)}, ValueError, r"words: tokens must be \(batch, length, 8\)"),
    ({"words": ["a", "b"]}, ValueError, "give one words, or one per image"),
    ({"kind": 3}, ValueError, "kind: label 3 of item 0 is outside 0..2"),
    ({"edges": torch.rand(40, 40)}, ValueError, "edges is 40 x 40 .*aspect ratio of 32 x 48"),
    ({"edges": torch.rand(2, *SIZE)}, ValueError, r"edges: a map must be \(batch, 1, height, width\)"),
    ({"style": "no.png", "style_mask": "no.png"}, FileNotFoundError, "no.png: no such file"),
    ({"style": 3, "style_mask": torch.zeros(32, 32, dtype=torch.long)}, TypeError, "style: an image is a path"),
    ({"style": torch.zeros(3, 32, 32), "style_mask": 0}, ValueError, "style must be uint8"),
]
PICTURE = torch.zeros(3, 32, 32, dtype=torch.uint8)
BAD_STYLES = [
    ({}, ValueError, "a style image without its mask: .* Give style_mask= too"),
    ({"style": None, "style_mask": PICTURE[0]}, ValueError, "give style= too"),
    ({"style_mask": PICTURE[0].long() + 30}, ValueError, "style_mask: label 30 is outside 0..18"),
    ({"style_mask": PICTURE[0, :16]}, ValueError, "style and style_mask: image is 32 x 32 and mask 16 x 32"),
    ({"style_mask": [PICTURE[0]] * 2}, ValueError, "give one style_mask for each style: got 2 for 1"),
    ({"style_mask": "no.png"}, FileNotFoundError, "no.png: no such file"),
]


@pytest.mark.parametrize(("told", "kind", "message"), BAD + [({"style": PICTURE} | t, k, m) for t, k, m in BAD_STYLES])
def test_what_does_not_suit_a_condition_is_an_error_before_sampling(pipe, pair, told, kind, message, monkeypatch):
    monkeypatch.setattr(pipe, "sampler", NoSampling(pipe.sampler.conditions))
    with pytest.raises(kind, match=message):
        pipe(pair[1], **told)


class NoSampling:
    def __init__(self, conditions):
        self.conditions = conditions

    def __call__(self, *_, **__):
        raise AssertionError("sampling began")


def test_the_card_shows_how_each_condition_is_given(pipe):
    said = 'words="...", style="style.png", style_mask="style-mask.png", kind=0, edges=array, seed=0)'
    assert f'pipe("mask.png", {said}' in pipe.card
    assert 'pipe("mask.png", seed=0)' in random_pipe().card


def test_a_model_of_masks_alone_takes_no_words():
    with pytest.raises(TypeError, match="MaskToImage takes no 'words'"):
        random_pipe()(torch.zeros(32, 32, dtype=torch.long), words="a hat")


def test_text_encoders_travel_with_the_model(pipe, pair, tmp_path):
    expected = pipe(pair[1], words="a hat", output_type="pt")
    pipe.save_pretrained(tmp_path / "told")
    loaded = MaskToImage.from_pretrained(tmp_path / "told")
    assert loaded.recipe == pipe.recipe
    assert torch.equal(loaded(pair[1], words="a hat", output_type="pt"), expected)
    record = loaded.text_encoder("words").describe()
    recorded = MaskToImage(pipe.model, pipe.autoencoder, replace(pipe.recipe, text_encoders={"words": record}))
    assert torch.equal(recorded(pair[1], words="a hat", output_type="pt"), expected)


def test_text_encoders_that_do_not_fit_are_rejected(pipe, pair):
    def with_encoders(**encoders):
        return MaskToImage(pipe.model, pipe.autoencoder, replace(pipe.recipe, text_encoders=encoders))

    with pytest.raises(ValueError, match="'euler' is of kind solver, not text-encoder"):
        with_encoders(words="euler")
    with pytest.raises(ValueError, match="no condition 'kind' that takes text"):
        with_encoders(kind="word-vectors")
    with pytest.raises(ValueError, match="makes vectors of width 64, and the model reads width 8"):
        with_encoders(words="word-vectors")(pair[1], words="a hat")
    with pytest.raises(ValueError, match="has the weights None, and abc are recorded"):
        with_encoders(words={"name": "word-vectors", "width": 8, "weights": "abc"})(pair[1], words="a hat")
    with pytest.raises(ValueError, match="records no text encoder for it"):
        with_encoders()(pair[1], words="a hat")


def test_edits_and_the_diffusers_interface_pass_values_on(pipe, pair, other):
    image, mask = pair
    new = mask.clone()
    new[:12, :16] = 14
    told = {"words": "a hat", "style": other[0], "style_mask": other[1]}
    for call in (
        lambda **more: edit(pipe, image, mask, new, output_type="pt", **more),
        lambda **more: variations(pipe, image, mask, num_images=2, output_type="pt", **more),
        lambda **more: interpolate(pipe, mask, (0, 1), 2, output_type="pt", **more),
        lambda **more: MaskToImagePipeline(pipe)(mask, num_inference_steps=2, output_type="pt", **more).images,
    ):
        plain = call()
        assert not torch.equal(call(words="a hat"), plain) and not torch.equal(call(**told), call(words="a hat"))
        with pytest.raises(TypeError, match="takes no 'wrods'. Did you mean 'words'"):
            call(wrods="a hat")
    theirs = MaskToImagePipeline(pipe)(mask, generator=torch.Generator().manual_seed(0), output_type="pt", **told)
    noise = torch.randn(1, *pipe.latent_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs.images, pipe(mask, noise=noise, output_type="pt", **told), rtol=0, atol=1e-4)
