"""One lister for every command: case, hidden files, accents, unsupported formats, home, byte-order marks."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")

from recipes.sisma import prepare, sample
from recipes.sisma.arguments import from_command_line
from recipes.sisma.evaluation.image_folder import find_images
from recipes.sisma.parser import load_parser
from recipes.sisma.prepare.sources import IMAGES, PARTS
from recipes.sisma.watch import find_runs
from ssmgen.data import CELEBAMASK19, PairFolder, draw_face, to_labels, write_png
from ssmgen.data.drawn_faces import write_official_layout
from ssmgen.data.files import files_with, listing, other_images, stem_of
from ssmgen.data.folder import PreparedFolder, load_splits
from ssmgen.data.images import read_image, to_pil
from ssmgen.weights import open_weights

COMPOSED, APART = (unicodedata.normalize(form, "Zoë") for form in ("NFC", "NFD"))


def left_behind(folder: Path) -> None:
    """What macOS, Windows and Jupyter put into folders."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("._00000.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"no picture")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (folder / name).mkdir()
        (folder / name / "00001_hair.png").write_bytes(b"no picture")


def test_what_counts_in_a_folder(tmp_path):
    left_behind(tmp_path)
    (tmp_path / "folder.png").mkdir()
    for name in ("b.PNG", "a.png", "c.jfif", "d.HEIC", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in listing(tmp_path)] == [
        "a.png",
        "b.PNG",
        "c.jfif",
        "d.HEIC",
        "folder.png",
        "notes.txt",
    ]
    assert [path.name for path in files_with(tmp_path, {".png"})] == ["a.png", "b.PNG"]
    assert [path.name for path in other_images(tmp_path, {".png"})] == ["c.jfif", "d.HEIC"]
    assert stem_of(Path(f"{APART}.png")) == COMPOSED and listing(tmp_path / "none") == []


def test_sample_takes_the_masks_of_any_case_and_none_that_is_hidden(tmp_path):
    left_behind(tmp_path)
    for name in ("a.PNG", "b.PNG", "c.png"):
        write_png(tmp_path / name, draw_face(0, size=32)[1])
    assert [file.name for file in sample.mask_files(str(tmp_path))] == ["a.PNG", "b.PNG", "c.png"]


@pytest.fixture
def official(tmp_path):
    write_official_layout(tmp_path / "source", 2, size=64)
    return tmp_path / "source"


def prepared(source: Path, target: Path) -> PreparedFolder:
    splits = source.parent / "all.json"
    splits.write_text(json.dumps({"test": [], "train": ["0", "1"]}), encoding="utf-8-sig")
    prepare.main([f"source={source}", f"target={target}", f"split={splits}"])
    return PreparedFolder(target, "train")


def test_parts_of_any_case_are_read_and_those_of_another_kind_are_named(official, tmp_path):
    whole = prepared(official, tmp_path / "whole")
    parts = official / PARTS / "0"
    (parts / "00000_hair.png").rename(parts / "00000_hair.PNG")
    (official / IMAGES / "1.jpg").rename(official / IMAGES / "1.JFIF")
    for folder in (parts, parts.parent, official / IMAGES, official):
        left_behind(folder)
    again = prepared(official, tmp_path / "again")
    for index in range(2):
        assert all(torch.equal(*pair) for pair in zip(again[index], whole[index], strict=True))
    to_pil(read_image(parts / "00000_hair.PNG")).save(parts / "00001_hat.jpg")
    (parts.parent / "00001_hair.png").write_bytes((parts / "00001_skin.png").read_bytes())
    (official / IMAGES / "1.heic").touch()
    write_png(parts / "00000_hair.png", read_image(parts / "00000_hair.PNG"))
    with pytest.raises(ValueError, match=r"4 problem\(s\) found") as raised:
        prepared(official, tmp_path / "never")
    for line in (
        f"{PARTS}/0/00001_hat.jpg: is not a PNG file",
        f"{PARTS}/00001_hair.png: is in the wrong folder",
        f"{IMAGES}/1.heic: has an unsupported image format",
        f"{PARTS}/0/00000_hair.png: is the same part as 00000_hair.PNG",
    ):
        assert line in str(raised.value)


def test_names_with_accents_are_paired_however_they_are_written(tmp_path):
    image, mask = draw_face(0, size=32)
    for part, name, pixels in (("images", APART, image), ("masks", COMPOSED, mask)):
        (tmp_path / "source" / part).mkdir(parents=True)
        write_png(tmp_path / "source" / part / f"{name}.PNG", pixels)
        left_behind(tmp_path / "source" / part)
    assert PairFolder(tmp_path / "source", CELEBAMASK19).ids == [COMPOSED]
    (tmp_path / "split.json").write_text(json.dumps({"train": [APART], "test": []}), encoding="utf-8-sig")
    assert load_splits(tmp_path / "split.json") == {"train": [COMPOSED], "test": []}
    words = [f"source={tmp_path / 'source'}", f"target={tmp_path / 'target'}", f"split={tmp_path / 'split.json'}"]
    prepare.main(words)
    for part in ("images", "masks"):  # as an archive unpacked on macOS has them
        (tmp_path / "target" / part / f"{COMPOSED}.png").rename(tmp_path / "target" / part / f"{APART}.png")
    pairs = PreparedFolder(tmp_path / "target", "train")
    assert pairs.ids == [COMPOSED] and torch.equal(pairs[0][1], mask)
    write_png(tmp_path / f"{APART}.png", image)
    assert [file.stem for file in find_images(tmp_path, pairs.ids, 1)[0]] == [APART]
    for number in (1, 2):
        write_png(tmp_path / f"{APART}--{number}.png", image)
    assert list(find_images(tmp_path, pairs.ids, 1)[1]) == [COMPOSED], "samples are known by the id of their mask"


def test_images_of_a_kind_that_is_not_read_are_named(tmp_path):
    for part, pixels in zip(("images", "masks"), draw_face(0, size=32), strict=True):
        (tmp_path / part).mkdir()
        write_png(tmp_path / part / "a.png", pixels)
    for name in ("images/b.tiff", "masks/b.gif"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="b.tiff: has an unsupported image format(.|\n)*b.gif: is not a PNG"):
        PairFolder(tmp_path, CELEBAMASK19)


def test_every_command_names_a_fifo_among_the_images(official, tmp_path):
    """In place of an image of the archive, of a mask to sample, and of an image to evaluate."""
    parts = official / PARTS / "0"
    for file in (official / IMAGES / "1.jpg", parts / "00000_hair.png", tmp_path / "masks/a.png"):
        file.parent.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)
        os.mkfifo(file)
    with pytest.raises(ValueError, match=r"1.jpg: is a FIFO(.|\n)*00000_hair.png: is a FIFO"):
        prepared(official, tmp_path / "never")
    with pytest.raises(ValueError, match="a.png: is a FIFO, not a regular file"):
        sample.mask_files(str(tmp_path / "masks"))
    with pytest.raises(ValueError, match="a.png: is a FIFO, not a regular file"):
        find_images(tmp_path / "masks", ["a"], 1)
    for read in (load_splits, load_parser, open_weights, lambda file: to_labels(file, CELEBAMASK19)):
        with pytest.raises((ValueError, OSError), match="a.png: "):
            read(tmp_path / "masks/a.png")


def test_home_is_found_behind_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = from_command_line(sample.Settings(), ["mask=~/masks", "run=~/runs/a~b", "out=a~b"])
    assert (settings.mask, settings.run, settings.out) == (f"{tmp_path}/masks", f"{tmp_path}/runs/a~b", "a~b")
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert find_runs("~/runs/a,~/runs/b") == [tmp_path / "runs/a", tmp_path / "runs/b"]
    write_png("~/face.png", draw_face(0, size=32)[0])
    assert read_image("~/face.png").shape == (3, 32, 32)
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        PreparedFolder("~/prepared", "train")
