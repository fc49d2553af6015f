"""Jobs of the demo page: what they sample, what they reject, how they end."""

import base64
import io
import json
import time
import zipfile
from dataclasses import replace

import pytest
import torch
from PIL import Image
from pipelines import told_pipe

from benchmarks.demo_soak import untrained_pipe
from recipes.sisma.demo.exchange import InvalidRequest, data_url, encode_png, to_text
from recipes.sisma.demo.jobs import JobResult, JobRunner, JobStopped, Preview
from recipes.sisma.demo.results import show_result
from ssmgen import MaskToImage, Sampling
from ssmgen.data import draw_face
from ssmgen.data.transforms import center_crop_resize

SIDE = 32
CONTROLS = [3, 2, "euler", 1.0, 2]  # seed, steps, solver, guidance, number of images


@pytest.fixture(scope="module")
def runner():
    return JobRunner(untrained_pipe(SIDE))


@pytest.fixture(scope="module")
def face():
    return draw_face(2, SIDE)[1]


def finished(job):
    *previews, pictures = job
    assert all(isinstance(one, Preview) for one in previews) and isinstance(pictures, JobResult)
    return previews, pictures


def test_pictures_are_the_pipelines_own(runner, face):
    previews, pictures = finished(runner.generate(face, runner.checked(*CONTROLS)))
    expected = runner.pipe(face, seed=3, num_images=2, steps=2, solver="euler", output_type="pt")
    assert torch.equal(pictures.images, (expected * 255).round().to(torch.uint8))
    assert pictures.seeds == (3, 4) and pictures.names == ("seed 3", "seed 4")
    assert previews and previews[0].steps == 2 and previews[0].images.shape == pictures.images.shape


def test_the_zip_makes_the_same_pictures_again(runner, face, tmp_path):
    _, pictures = finished(runner.generate(face, runner.checked(*CONTROLS)))
    shown = show_result(pictures, runner.pipe.recipe)
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(shown["zip"]))) as zipped:
        assert sorted(zipped.namelist()) == ["image-0.png", "image-1.png", "mask.png", "settings.json"]
        zipped.extractall(tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert {"shift", "guidance_start"} <= set(settings) and settings["call"].startswith("pipe('mask.png', ")
    call = settings["call"].replace("mask.png", str(tmp_path / "mask.png"))
    pipe = runner.pipe  # a reader's may have other settings of its own
    other = MaskToImage(pipe.model, pipe.autoencoder, replace(pipe.recipe, sampling=Sampling(shared_noise=True)))
    again = eval(call, {"pipe": other})  # the words a reader would copy
    for number, image in enumerate(again):
        assert image.tobytes() == Image.open(tmp_path / f"image-{number}.png").tobytes()


def test_a_redraw_keeps_what_did_not_change(runner, face):
    request = runner.checked(*CONTROLS)
    _, pictures = finished(runner.generate(face, request))
    image, changed = pictures.images[0], face.clone()
    changed[:8, :8] = 14
    for start in ("inversion", "noise"):
        previews, redrawn = finished(runner.redraw(image, face, changed, request, start))
        assert torch.equal(redrawn.images[0, :, 16:], image[:, 16:])
        assert not torch.equal(redrawn.images[0, :, :8, :8], image[:, :8, :8])
        assert previews[0].steps == (4 if start == "inversion" else 2)
    with pytest.raises(InvalidRequest, match="Nothing to redraw"):
        runner.redraw(image, face, face, request)
    with pytest.raises(InvalidRequest, match="inversion, noise"):
        runner.redraw(image, face, changed, request, "middle")


def test_variations_and_the_way_between(runner, face):
    request = runner.checked(*CONTROLS)
    _, pictures = finished(runner.generate(face, request))
    _, near = finished(runner.vary(pictures.images[0], face, 0.2, request))
    _, far = finished(runner.vary(pictures.images[0], face, 1, request))
    distance = [(each.images.float() - pictures.images[0].float()).square().mean() for each in (near, far)]
    assert 0 < distance[0] < distance[1]
    _, between = finished(runner.between(face, 4, request))
    assert between.names == ("seed 3", "50 %", "seed 4")
    assert (between.images[0].int() - pictures.images[0].int()).abs().max() <= 1
    assert (between.images[2].int() - pictures.images[1].int()).abs().max() <= 1


SIZE = (32, 48)
SCALES = [3.0, 1.0]  # guidance of words and of style


@pytest.fixture(scope="module")
def told():
    """A runner whose model is told words and a style, and makes rectangles."""
    return JobRunner(told_pipe(SIZE))


@pytest.fixture(scope="module")
def style():
    """A style as the page sends it."""
    image, mask = center_crop_resize(*draw_face(5, 64), SIZE)
    return {"png": data_url(encode_png(image)), "mask": to_text(mask), "name": "example 1"}


def test_words_and_a_style_are_the_pipelines_own_and_the_zip_repeats_them(told, style, tmp_path):
    mask = center_crop_resize(*draw_face(2, 64), SIZE)[1]
    assert (told.texts, told.styles, told.scaled) == (["words"], ["style"], ["words", "style"])
    _, plain = finished(told.generate(mask, told.checked(*CONTROLS, "", None, *SCALES)))
    assert plain.settings["guidance_scale"] == {"mask": 1.0}, "what is not given is not guided"
    assert told.checked(*CONTROLS, "  ", None, *SCALES).told == {}, "blanks are no text"
    request = told.checked(*CONTROLS, " black  hair ", style, *SCALES)
    _, pictures = finished(told.generate(mask, request))
    assert not torch.equal(pictures.images, plain.images)
    shown = show_result(pictures, told.pipe.recipe)
    assert "guidance mask 1, words 3, style 1" in shown["caption"]
    assert shown["caption"].endswith("; words: black hair; style: example 1")
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(shown["zip"]))) as zipped:
        zipped.extractall(tmp_path)
    call = json.loads((tmp_path / "settings.json").read_text())["call"]
    for name in ("mask", "style", "style-mask"):
        call = call.replace(f"'{name}.png'", repr(str(tmp_path / f"{name}.png")))
    again = eval(call, {"pipe": told.pipe})
    for number, image in enumerate(again):
        assert image.tobytes() == Image.open(tmp_path / f"image-{number}.png").tobytes()


def test_edits_keep_words_and_style(told, style):
    mask = center_crop_resize(*draw_face(2, 64), SIZE)[1]
    changed = mask.clone()
    changed[:8, :8] = 14
    plain, given = (told.checked(*CONTROLS, *more, *SCALES) for more in (("", None), ("black hair", style)))
    image = finished(told.generate(mask, plain))[1].images[0]
    for start in (
        lambda request: told.redraw(image, mask, changed, request),
        lambda request: told.vary(image, mask, 0.5, request),
        lambda request: told.between(mask, 4, request),
    ):
        one, other = (finished(start(request))[1] for request in (plain, given))
        assert not torch.equal(one.images, other.images) and list(other.told) == ["words", "style"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((3, None, *SCALES), "The words must be a text of at most 500 letters"),
        (("a" * 501, None, *SCALES), "at most 500 letters"),
        (("", "/etc/passwd", *SCALES), "The style arrived incomplete"),
        (("", {"png": "", "mask": ""}, *SCALES), "no picture"),
        (("", {"png": "PNG", "mask": "32x32 0x1024"}, *SCALES), "another size than its picture"),
        (("", {"png": "PNG", "mask": "32x48 99x1536"}, *SCALES), "label 99"),
        (("hat", None, 11, 1), "The guidance of words must be a number from 0 to 10"),
        (("hat", None, None, 1), "The guidance of words must be"),
    ],
)
def test_words_or_a_style_out_of_range_are_refused(told, style, more, message):
    text, picture, *scales = more
    if isinstance(picture, dict) and picture["png"]:
        picture = picture | {"png": style["png"]}
    with pytest.raises(InvalidRequest, match=message):
        told.checked(*CONTROLS, text, picture, *scales)


BAD_CONTROLS = [
    (0, -1, "The seed must be a whole number from 0"),
    (0, 2**31, "The seed"),
    (0, None, "The seed"),
    (0, "7", "The seed"),
    (1, 0, "Steps must be a whole number from 1 to 100"),
    (1, 2.5, "Steps"),
    (1, True, "Steps"),
    (2, "dopri5", "The solver must be one of"),
    (2, ["euler"], "The solver"),
    (3, float("nan"), "Guidance must be a number from 0 to 10"),
    (3, float("inf"), "Guidance"),
    (4, 9, "The number of images must be a whole number from 1 to 8"),
]


@pytest.mark.parametrize(("place", "value", "message"), BAD_CONTROLS)
def test_a_control_out_of_range_is_refused(runner, place, value, message):
    with pytest.raises(InvalidRequest, match=message):
        runner.checked(*[value if i == place else given for i, given in enumerate(CONTROLS)])


def test_guidance_needs_a_model_that_has_it():
    pipe = untrained_pipe(SIDE)
    pipe.model.conditions["mask"].dropout = 0.0
    with pytest.raises(InvalidRequest, match="trained without guidance"):
        JobRunner(pipe).checked(3, 2, "euler", 2.0, 2)
    shipped = JobRunner(MaskToImage.from_pretrained("drawn-faces"))
    assert shipped.guided and shipped.checked(3, 2, "euler", 2.0, 2).sampling.guidance_scale == 2


class Endless(MaskToImage):
    """A pipeline that never comes to an end."""

    steps = 0

    def __call__(self, mask, *, callback, **settings):
        while True:
            Endless.steps += 1
            callback(1, torch.zeros(1, 3, SIDE, SIDE))
            time.sleep(0.01)


@pytest.fixture
def endless():
    pipe = untrained_pipe(SIDE)
    return JobRunner(Endless(pipe.model, pipe.autoencoder, pipe.recipe), timeout=0.3)


def is_free(runner, seconds=2.0):
    taken = runner._device.acquire(timeout=seconds)
    if taken:
        runner._device.release()
    return taken


def test_what_takes_too_long_is_given_up(endless, face):
    with pytest.raises(JobStopped, match="fewer steps or images"):
        list(endless.generate(face, endless.checked(*CONTROLS)))
    assert is_free(endless)


def test_closing_a_job_stops_it(endless, face):
    job = endless.generate(face, endless.checked(*CONTROLS))
    assert isinstance(next(job), Preview)
    job.close()
    assert is_free(endless)
    done = Endless.steps
    time.sleep(0.1)
    assert Endless.steps == done
