"""Edits keep what they must keep and change what they are asked to."""

from dataclasses import replace

import pytest
import torch
from pipelines import random_pipe

import ssmgen
from ssmgen import MaskToImage
from ssmgen.data import CELEBAMASK19, draw_face
from ssmgen.data.transforms import center_crop_resize
from ssmgen.pipeline import MaskToImagePipeline, edit, editing, interpolate, variations

SIZE = 32


@pytest.fixture(scope="module")
def pipe():
    return random_pipe({"solver": "heun", "steps": 12})


@pytest.fixture(scope="module")
def face():
    return draw_face(2, SIZE)


@pytest.fixture(scope="module")
def hat(face):
    new = face[1].clone()
    new[:8, 8:24] = 14
    return new


def changed(image, result):
    return (result - image[None].float() / 255).abs().amax(1)[0] > 1e-3


@pytest.mark.parametrize("start", ["inversion", "noise"])
@pytest.mark.parametrize("solver", ["euler", "ab3", "deis2"])
def test_an_edit_leaves_the_rest_to_the_bit(pipe, face, hat, start, solver):
    image, mask = face
    if start == "inversion" and not ssmgen.build(solver).reversible:
        with pytest.raises(ValueError, match="solver='deis2' is not reversible: give another, such as solver='ab3'"):
            edit(pipe, image, mask, hat, start=start, solver=solver)
        return
    result = edit(pipe, image, mask, hat, margin=2, start=start, solver=solver, output_type="pt")
    allowed = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    differs = (mask != hat).nonzero()
    for row, column in differs.tolist():
        allowed[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3] = True
    found = changed(image, result)
    assert not (found & ~allowed).any() and found[mask != hat].float().mean() > 0.7


def test_a_region_says_where(pipe, face):
    image, mask = face
    region = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    region[20:28, 4:12] = True
    found = changed(image, edit(pipe, image, mask, mask, region=region, margin=0, start="noise", output_type="pt"))
    assert found[20:28, 4:12].any() and not (found & ~region).any()


def test_inversion_under_the_same_mask_gives_the_image_back(pipe, face):
    """A whole-image edit to the mask it has: back to the noise and forth again. New noise gives another image."""
    image, mask = face
    everywhere = torch.ones(SIZE, SIZE, dtype=torch.bool)
    own = pipe(mask, seed=3, output_type="pt")
    shown = (own[0] * 255).round().to(torch.uint8)

    def error(start):
        again = edit(pipe, shown, mask, mask, region=everywhere, start=start, steps=40, seed=8, output_type="pt")
        return (again - own).square().mean().sqrt()

    assert error("inversion") < 0.1 * error("noise")


def test_little_noise_stays_near_and_much_forgets(pipe, face):
    image, mask = face
    errors = [
        (variations(pipe, image, mask, strength=s, output_type="pt") - image[None] / 255).square().mean()
        for s in (0.05, 0.4, 1.0)
    ]
    assert errors[0] < errors[1] < errors[2]
    fresh = variations(pipe, image, mask, strength=1.0, seed=4, output_type="pt")
    assert torch.allclose(fresh, pipe(mask, seed=4, output_type="pt"), atol=1e-5)
    assert len(variations(pipe, image, mask, num_images=3)) == 3


def test_edits_start_from_shared_noise_too(pipe, face, hat):
    """That of the new mask, and never what an inversion found."""
    image, mask = face
    settings = {"shared_noise": True, "output_type": "pt"}
    found = pipe(mask, seed=4, **settings)
    assert torch.allclose(variations(pipe, image, mask, strength=1.0, seed=4, **settings), found, atol=1e-5)
    assert not torch.allclose(found, pipe(mask, seed=4, output_type="pt"), atol=1e-2)
    everywhere = {"region": torch.ones(SIZE, SIZE, dtype=torch.bool), "seed": 4}
    assert torch.allclose(edit(pipe, image, mask.roll(6, 1), mask, **everywhere, **settings), found, atol=1e-5)
    inverted = [
        edit(pipe, image, mask, hat, start="inversion", output_type="pt", shared_noise=m) for m in (True, False)
    ]
    assert torch.equal(*inverted)


def test_interpolation_begins_and_ends_with_the_seeds(pipe, face):
    images = interpolate(pipe, face[1], (3, 9), 5, output_type="pt")
    both = pipe(face[1], seed=[3, 9], num_images=2, output_type="pt")
    assert torch.allclose(images[[0, 4]], both, atol=1e-4)
    steps = (images[1:] - images[:-1]).square().mean((1, 2, 3)).sqrt()
    assert steps.max() < (images[0] - images[4]).square().mean().sqrt()


def test_an_image_is_taken_as_file_or_picture(pipe, face, hat, tmp_path):
    from ssmgen.data import write_png
    from ssmgen.data.images import to_pil

    image, mask = face
    write_png(tmp_path / "face.png", image)
    expected = edit(pipe, image, mask, hat, output_type="pt")
    for kind in (tmp_path / "face.png", to_pil(image)):
        assert torch.equal(edit(pipe, kind, mask, hat, output_type="pt"), expected)


BAD = [
    (lambda p, i, m: edit(p, i, m, m), "nothing to redraw: the masks are the same"),
    (lambda p, i, m: edit(p, i, m, m, start="nose"), "start must be one of inversion, noise"),
    (lambda p, i, m: edit(p, i, m, m, margin=-1), "margin must be at least 0"),
    (lambda p, i, m: edit(p, i, m, m, region=torch.zeros(SIZE, SIZE, dtype=torch.bool)), "the region is empty"),
    (lambda p, i, m: edit(p, i, m, m, region=torch.ones(4, 4, dtype=torch.bool)), r"region must be bool \(32, 32\)"),
    (lambda p, i, m: edit(p, i[:, :16], m, m.flip(1)), r"must be uint8 \(3, 32, 32\)"),
    (lambda p, i, m: variations(p, i, m, strength=0), r"strength must be in \(0, 1\]"),
    (lambda p, i, m: interpolate(p, m, (1, 1)), "seeds must be two"),
    (lambda p, i, m: interpolate(p, m, 5), "seeds must be two different ones, got 5"),
    (lambda p, i, m: interpolate(p, m, (0, 2**64)), "a seed is a whole number from 0 to"),
    (lambda p, i, m: edit(p, i, m, m.flip(1), seed=-1), "a seed is a whole number from 0 to .* got -1"),
    (lambda p, i, m: variations(p, i, m, seed=2**64), "a seed is a whole number from 0 to"),
    (lambda p, i, m: interpolate(p, m, (1, 2), 1), "count must be at least 2"),
    (lambda p, i, m: p(m, noise=torch.zeros(1, 3, 8, 8)), r"noise must be \(1, 3, 32, 32\)"),
    (lambda p, i, m: p.sampler(torch.zeros(1, 3, 32, 32), m[None], times=torch.tensor([0.0, 2.0])), "times must be"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_edits_are_refused(pipe, face, call, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, *face)


def test_the_benchmarks_edits_change_what_they_say():
    """From one class to another and nowhere else; a face that has a hat keeps it."""
    pytest.importorskip("accelerate", reason="the benchmarks import the recipe, which needs ssmgen[train]")
    from benchmarks.editing import EDITS

    classes = CELEBAMASK19.classes
    allowed = {
        "hat": {("hair", "hat")},
        "hair": {("background", "hair")},
        "lips": {("skin", "u_lip"), ("skin", "l_lip")},
    }
    made = dict.fromkeys(EDITS, 0)
    for seed in range(12):
        mask = draw_face(seed, 64)[1]
        for name, change in EDITS.items():
            new = change(mask, classes)
            pairs = torch.stack([mask, new])[:, mask != new].unique(dim=1).T.tolist()
            assert {(classes[old], classes[now]) for old, now in pairs} <= allowed[name], name
            made[name] += bool(pairs)
    assert made["lips"] == 12 and made["hair"] > 8 and made["hat"] > 6


def test_edits_tell_their_steps(pipe, face, hat):
    image, mask = face
    told = []
    steps = {"steps": 4, "solver": "euler", "callback": lambda step, x: told.append(tuple(x.shape))}
    edit(pipe, image, mask, hat, start="inversion", **steps)
    assert told == [(1, 3, SIZE, SIZE)] * 8  # back to the noise, and forth
    told.clear()
    variations(pipe, image, mask, strength=0.5, num_images=2, **steps)
    assert told == [(2, 3, SIZE, SIZE)] * 2


def test_settings_that_make_no_image_are_refused(pipe, face):
    image, mask = face
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        variations(pipe, image, mask, num_images=0)
    assert len(variations(pipe, image, mask, strength=1e-5, steps=4)) == 1
    for call, message in (
        (lambda: edit(pipe, image, mask, mask, seed=None), "a seed is a whole number from 0 to .* got None"),
        (lambda: variations(pipe, image, mask, seed=1.5), "a seed is a whole number from 0 to .* got 1.5"),
        (lambda: edit(pipe, image, mask, mask, sed=3), "edit takes no 'sed'. Did you mean 'seed'"),
        (lambda: variations(pipe, image, mask, step=3), "variations takes no 'step'. Did you mean 'steps'"),
        (lambda: interpolate(pipe, mask, (0, 1), step=3), "interpolate takes no 'step'. Did you mean 'steps'"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(ValueError, match=r"seeds must be two different ones, got \(0, 1, 0\)"):
        interpolate(pipe, mask, seeds=(0, 1, 0))


def test_the_rest_of_the_latents_arrives_at_the_images_own(pipe, face, hat, monkeypatch):
    """Before pixels are put back: what is drawn inside saw the image around it."""
    image, mask = face
    drawn = []
    paste = editing._paste
    monkeypatch.setattr(
        editing, "_paste", lambda pipe, latents, *rest: drawn.append(latents) or paste(pipe, latents, *rest)
    )
    edit(pipe, image, mask, hat, margin=0, start="noise")
    off = (drawn[0] - pipe.encode(image)).abs().amax(1)[0]
    assert off[mask == hat].max() < 1e-4 and off[mask != hat].mean() > 0.05


def test_pictures_of_a_model_of_several_sizes_are_edited_in_their_own(pipe):
    several = MaskToImage(pipe.model, pipe.autoencoder, replace(pipe.recipe, image_size=[(SIZE, SIZE), (48, 24)]))
    image, mask = center_crop_resize(*draw_face(1, 64), (48, 24))
    changed = mask.clone()
    changed[:8] = CELEBAMASK19.classes.index("hat")
    for call in (
        lambda p: edit(p, image, mask, changed, output_type="pt"),
        lambda p: variations(p, image, mask, output_type="pt"),
        lambda p: interpolate(p, mask, (0, 1), 2, output_type="pt"),
        lambda p: MaskToImagePipeline(p)(mask, num_inference_steps=2, output_type="pt").images,
    ):
        found = call(several)
        assert found.shape[-2:] == (48, 24) and torch.equal(found, call(pipe.resized((48, 24))))
    between = interpolate(pipe, mask, (0, 1), 2, size=(48, 24), output_type="pt")
    assert torch.equal(between, interpolate(several, mask, (0, 1), 2, output_type="pt"))
    theirs = MaskToImagePipeline(pipe)
    sized = theirs(mask, height=48, width=24, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert sized.shape[-2:] == (48, 24)
    with pytest.raises(ValueError, match="give both height and width, or neither: got height=48 and width=None"):
        theirs(mask, height=48)
