"""Images of a trained run, from masks in files."""

import errno
import os
import shutil
import warnings

import pytest
import torch

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")


from recipe_runs import words as words_of_run

from recipes.sisma import sample, train
from recipes.sisma.evaluation.image_folder import find_images
from recipes.sisma.image_names import check_mask_names
from recipes.sisma.runs import SamplingKeys, sampling_of
from ssmgen.data import BISENET19, CELEBAMASK19, remap
from ssmgen.data.drawn_faces import draw_face
from ssmgen.data.images import read_image, write_png


def test_sample_writes_images_of_its_own_seeds(trained, tmp_path, capsys):
    (tmp_path / "masks").mkdir()
    for index in range(2):
        write_png(tmp_path / "masks" / f"m{index}.png", draw_face(index, size=96)[1])
    out = tmp_path / "out"
    common = [f"run={trained}", f"out={out}", "steps=2", "solver=euler"]
    sample.main([*common, f"mask={tmp_path / 'masks'}", "num_images=2", "seed=5"])
    assert sorted(p.name for p in out.iterdir()) == ["m0--5.png", "m0--6.png", "m1--5.png", "m1--6.png"]
    first = read_image(out / "m0--6.png")
    assert first.shape == (3, 64, 64) and not torch.equal(first, read_image(out / "m0--5.png"))
    sample.main([*common, f"mask={tmp_path / 'masks' / 'm0.png'}", "seed=6"])
    difference = (read_image(out / "m0--6.png").int() - first.int()).abs().max()
    assert difference <= 1, "an image depends on what else was sampled with it"


def test_sample_reads_masks_as_the_pipeline_does(trained, tmp_path):
    """The other order is warned about and renamed, and what is not square is refused, not cropped."""
    mask = draw_face(2, size=96)[1]
    theirs = remap(mask, CELEBAMASK19, BISENET19)
    for name, pixels in (("own", mask), ("theirs", theirs), ("colours", BISENET19.colorize(theirs))):
        write_png(tmp_path / f"{name}.png", pixels)
    out = tmp_path / "out"
    common = [f"run={trained}", f"out={out}", "steps=2", "solver=euler"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample.main([*common, f"mask={tmp_path / 'own.png'}"])
        sample.main([*common, f"mask={tmp_path / 'theirs.png'}", "remap=bisenet19"])
        sample.main([*common, f"mask={tmp_path / 'colours.png'}", "palette=bisenet19"])
    own, renamed, coloured = (read_image(out / f"{name}--0.png") for name in ("own", "theirs", "colours"))
    assert torch.equal(own, renamed) and torch.equal(own, coloured)
    with pytest.warns(UserWarning, match="theirs.png: .* look like the order bisenet19.*say remap='bisenet19'"):
        sample.main([*common, f"mask={tmp_path / 'theirs.png'}"])
    write_png(tmp_path / "wide.png", mask[:48])
    with pytest.raises(ValueError, match="wide.png is 48 x 96 .height x width.: crop it to a square"):
        sample.main([*common, f"mask={tmp_path / 'wide.png'}"])
    with pytest.raises(ValueError, match="unknown label set 'bisenet'. Did you mean 'bisenet19'"):
        sample.main([*common, f"mask={tmp_path / 'own.png'}", "remap=bisenet"])
    assert not (out / "wide--0.png").exists()
    sample.main([*common, f"mask={tmp_path / 'wide.png'}", "size=48x96"])
    assert read_image(out / "wide--0.png").shape == (3, 48, 96)
    for size, message in (
        ("48x90", "image_size must be a multiple of 8"),
        ("48x96,64", "give one size"),
        ("x", "side"),
    ):
        with pytest.raises(ValueError, match=message):
            sample.main([*common, f"mask={tmp_path / 'wide.png'}", f"size={size}"])


def test_images_of_two_masks_never_have_one_name(trained, tmp_path):
    """Masks p and p-1 have images of their own; where names would meet, nothing is written."""
    masks, out = tmp_path / "masks", tmp_path / "out"
    masks.mkdir()
    for name in ("p", "p-1"):
        write_png(masks / f"{name}.png", draw_face(2, size=64)[1])
    common = [f"run={trained}", f"mask={masks}", f"out={out}", "steps=1", "num_images=2"]
    sample.main(common)
    images = {"p--0.png", "p--1.png", "p-1--0.png", "p-1--1.png"}
    assert {file.name for file in out.iterdir()} == images
    one, groups = find_images(out, ["p", "p-1"], 2)
    assert [file.name for file in one] == ["p--0.png", "p-1--0.png"]
    assert [[file.name for file in group] for group in groups.values()] == [
        ["p--0.png", "p--1.png"],
        ["p-1--0.png", "p-1--1.png"],
    ]
    write_png(masks / "p--1.png", draw_face(3, size=64)[1])
    shutil.rmtree(out)
    with pytest.raises(ValueError, match="p--1 is the name of a mask and of an image of the mask p.*: rename the mask"):
        sample.main(common)
    assert not out.exists()
    for other in ("a.jpg", "a.PNG"):
        with pytest.raises(ValueError, match=f"masks/{other} and a.png would both be sampled into a--5.png: rename"):
            sample.check_names([masks / "a.png", masks / other], [5])
    write_png(tmp_path / "p--1.png", draw_face(3, size=64)[1][None].expand(3, -1, -1))
    with pytest.raises(ValueError, match="p--1 is the name of a mask and of an image"):
        find_images(tmp_path, ["p", "p--1"], 2)
    with pytest.raises(ValueError, match="p--2 is the name of a mask and of an image"):
        check_mask_names(["p", "q", "p--2"], range(1, 3))
    check_mask_names(["p", "q", "p--3", "p--02"], range(1, 3))


def test_sampling_mistakes_are_explained(trained, tmp_path):
    bad = tmp_path / "bad.png"
    write_png(bad, torch.full((64, 64), 200, dtype=torch.uint8))
    out = tmp_path / "out"
    for argv, message in (
        ([f"mask={bad}"], r"bad.png: label 200 .* outside 0\.\.18"),
        (["mask=nowhere.png"], "nowhere.png: no such file"),
        ([], "mask= is missing"),
        ([f"mask={bad}", "num_images=0"], "num_images must be"),
        ([f"mask={bad}", "seed=-1"], "a seed is a whole number from 0 to .* got -1"),
        ([f"mask={bad}", f"seed={2**64}"], "a seed is a whole number from 0 to .* got 18446744073709551616"),
        ([f"mask={bad}", f"seed={2**64 - 1}", "num_images=2"], "a seed is a whole number from 0 to"),
        ([f"mask={bad}", "seed=None"], "seed"),
        ([f"mask={bad}", "shift=-1"], "shift must be a number above 0, got -1.0"),
        ([f"mask={bad}", "guidance_start=-0.5"], r"guidance_start must be a time in \[0, 1\], .* got -0.5"),
        ([f"mask={bad}", "solver=eular"], "unknown solver 'eular'. Did you mean 'euler'"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            sample.main([f"run={trained}", f"out={out}", *argv])
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        sample.main([f"run={tmp_path}", "mask=" + str(bad)])
    assert not out.exists()


def test_images_that_are_replaced_are_reported(trained, tmp_path, capsys):
    write_png(tmp_path / "m.png", draw_face(0, size=96)[1])
    words = [f"run={trained}", f"mask={tmp_path / 'm.png'}", f"out={tmp_path / 'out'}", "steps=2", "solver=euler"]
    sample.main(words)
    assert "note:" not in capsys.readouterr().err
    sample.main([*words, "num_images=2"])
    assert f"note: 1 of 2 images exist and are replaced: {tmp_path / 'out/m--0.png'}\n" in capsys.readouterr().err


def test_a_full_disk_names_the_image_and_leaves_no_part_of_it(trained, tmp_path, monkeypatch):
    class Full:
        def save(self, file, format):
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_png(tmp_path / "m.png", draw_face(0, size=96)[1])
    monkeypatch.setattr("ssmgen.data.images.to_pil", lambda pixels: Full())
    words = [f"run={trained}", f"mask={tmp_path / 'm.png'}", f"out={tmp_path / 'out'}", "steps=2", "solver=euler"]
    with pytest.raises(OSError, match=r"m--0.png: writing failed \(.*No space left"):
        sample.main(words)
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A run that is told words and a style."""
    folder = tmp_path_factory.mktemp("told")
    more = ("style=true", "words=true", "model_args.mask_dropout=0.1", "evaluate=false", "drawn_count=8", "steps=6")
    train.main(["quick", *words_of_run(folder, *more)])
    return folder / "run"


def test_sample_tells_words_and_a_style(told, trained, tmp_path, capfd):
    face, mask = draw_face(3, size=80)
    write_png(tmp_path / "m.png", draw_face(0, size=96)[1])
    write_png(tmp_path / "style.png", face)
    write_png(tmp_path / "style-mask.png", mask)
    common = [f"mask={tmp_path / 'm.png'}", "steps=2", "solver=euler"]
    style = [f"style={tmp_path / 'style.png'}", f"style_mask={tmp_path / 'style-mask.png'}"]
    images = []
    for i, more in enumerate(([], ["words=black hair"], style, [*style, "words=black hair", "guidance_scale.words=3"])):
        sample.main([f"run={told}", f"out={tmp_path / str(i)}", *common, *more])
        images.append(read_image(tmp_path / str(i) / "m--0.png"))
        assert not any(torch.equal(images[-1], other) for other in images[:-1]), more
    capfd.readouterr()
    sample.main([f"run={told}", f"out={tmp_path / 'unknown'}", *common, "words=violet hair, a monocle"])
    assert "note: no training text had the words 'violet', 'monocle', so" in capfd.readouterr().err
    pipe, _ = sample.load_run(told)
    assert pipe.recipe.sampling.guidance_scale == {"mask": 2.0, "style": 2.0, "words": 2.0}
    assert pipe.recipe.sampling.guidance_start == {"mask": 0.2}, "colours are decided near the noise"
    scales = {"mask": 2, "style": 2, "words": 3}
    sampling = sampling_of(pipe, SamplingKeys(guidance_scale=1, guidance_start=0.5), ["mask", "words"])
    assert (sampling.guidance_scale, sampling.guidance_start) == (1, 0.5), "a number is that of all"
    sampling = sampling_of(pipe, SamplingKeys(guidance_start={"words": 0.1}), ["mask", "words"])
    assert sampling.guidance_scale == {"mask": 2, "words": 2} and sampling.guidance_start == {"mask": 0.2, "words": 0.1}
    given = {"words": "black hair", "style": face, "style_mask": mask, "guidance_scale": scales}
    expected = pipe(tmp_path / "m.png", steps=2, solver="euler", output_type="uint8", **given)
    assert torch.equal(images[3], expected[0])
    for run, more, message in (
        (trained, ["words=x"], "words= is for a run that was trained with words=true, and .* takes mask only"),
        (trained, style, "style= is for a run that was trained with style=true"),
        (told, style[:1], "a style image without its mask: .* Give style_mask= too"),
        (told, style[1:], "style_mask= is the mask of a picture that is not given: give style= too"),
        (told, [style[0], "style_mask=no.png"], "no.png: no such file"),
        (told, ["guidance_scale.words=3"], "needs a value for the guided condition"),
        (told, ["guidance_scale.wrods=3"], "names no condition 'wrods'. Did you mean 'words'"),
        (told, ["guidance_scale=high"], "guidance_scale must be a number at least 0"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            sample.main([f"run={run}", f"out={tmp_path / 'bad'}", *common, *more])
    assert not (tmp_path / "bad").exists()
