"""An evaluation of images that somebody else made."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")

from recipes.sisma import evaluate
from recipes.sisma.arguments import UsageError
from recipes.sisma.evaluation.image_folder import find_images
from recipes.sisma.evaluation.measure import NamedParser, load_named_parser
from recipes.sisma.evaluation.results import summary
from recipes.sisma.evaluation.settings import Settings
from recipes.sisma.pairs import held_out_pairs
from recipes.sisma.presets import Config
from ssmgen.data import CELEBAMASK19
from ssmgen.data.drawn_faces import DrawnFaces
from ssmgen.data.folder import write_pair, write_records
from ssmgen.data.images import read_image, write_png
from ssmgen.data.transforms import center_crop_resize


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared folder with six drawn test pairs of 48 pixels."""
    folder = tmp_path_factory.mktemp("prepared")
    faces, hashes = DrawnFaces(8, size=48), {}
    ids = [f"face{index}" for index in range(8)]
    for index, id in enumerate(ids):
        hashes |= write_pair(folder, id, *faces[index])
    write_records(folder, CELEBAMASK19, {"train": ids[6:], "test": ids[:6]}, hashes, {})
    return folder


@pytest.fixture
def faces(prepared, tmp_path):
    """The real images under the ids of their masks, as if somebody had made them."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for index in range(6):
        shutil.copy(prepared / "images" / f"face{index}.png", folder / f"face{index}.png")
    return folder


def test_images_of_the_masks_themselves_reach_the_ceiling(prepared, faces):
    evaluate.main([f"images={faces}", f"data={prepared}", "parser=drawn"])
    out = faces.with_name("faces-evaluation")
    result = json.loads((out / "result.json").read_text())
    assert result["mask_agreement"] == result["ceiling"] and result["floor_to_ceiling"] == 1
    assert result["floor"]["miou"] < result["ceiling"]["miou"] and "autoencoder_ceiling" not in result
    assert result["masks"] == 6 and result["image_size"] == 48 and result["images"] == "faces"
    page = (out / "report.html").read_text()
    assert "6 images of 48 pixels" in page and "training steps" not in page and (out / "result.png").is_file()


def test_given_images_are_measured_by_one_process(prepared, faces, monkeypatch):
    monkeypatch.setattr(evaluate, "all_processes", lambda: SimpleNamespace(is_main_process=False))
    evaluate.main([f"images={faces}", f"data={prepared}", "parser=drawn"])
    assert not faces.with_name("faces-evaluation").exists()


def test_images_under_other_ids_and_blurred_ones_agree_less(prepared, faces):
    def agreement():
        return evaluate.evaluate_images(faces, Settings(data=str(prepared), parser="drawn"), command="test")

    sharp = [read_image(faces / f"face{index}.png") for index in range(6)]
    real = agreement()["mask_agreement"]["miou"]
    for index, image in enumerate(sharp):
        blurred = torch.nn.functional.avg_pool2d(image.float(), 7, 1, 3).to(torch.uint8)
        write_png(faces / f"face{index}.png", blurred)
    assert agreement()["mask_agreement"]["miou"] < 0.9 * real
    for index, image in enumerate(sharp):
        write_png(faces / f"face{(index + 5) % 6}.png", image)  # not the shift that the floor makes
    assert agreement()["mask_agreement"]["miou"] < 0.8 * real


def test_several_images_a_mask_count_for_the_diversity(prepared, faces):
    for file in list(faces.iterdir()):
        shutil.copy(file, faces / f"{file.stem}--0.png")
        write_png(faces / f"{file.stem}--1.png", 255 - read_image(file))
        file.unlink()
    result = evaluate.evaluate_images(faces, Settings(data=str(prepared), masks=4), command="test")
    assert result["masks"] == 4 and result["diversity"]["same_mask"] > result["diversity"]["other_masks"] > 0
    files, groups = find_images(faces, [f"face{index}" for index in range(6)], 6)
    assert [file.name for file in files] == [f"face{index}--0.png" for index in range(6)]
    assert [[file.name for file in group] for group in groups.values()][0] == ["face0--0.png", "face0--1.png"]


def extra(folder):
    shutil.copy(folder / "face0.png", folder / "stranger.png")


def missing(folder):
    (folder / "face3.png").unlink()


def smaller(folder):
    write_png(folder / "face2.png", torch.zeros(3, 32, 32, dtype=torch.uint8))


def oblong(folder):
    write_png(folder / "face0.png", torch.zeros(3, 48, 32, dtype=torch.uint8))


def grey(folder):
    write_png(folder / "face4.png", torch.zeros(48, 48, dtype=torch.uint8))


def alpha(folder):
    from PIL import Image

    Image.new("RGBA", (48, 48)).save(folder / "face5.png")


def damaged(folder):
    (folder / "face5.png").write_bytes(b"no image")


def twice(folder):
    from PIL import Image

    Image.new("RGB", (48, 48)).save(folder / "face5.jpg")


def uneven(folder):
    for name in ("face0--0", "face0--1", "face1--0", "face1--1", "face1--2"):
        shutil.copy(folder / "face0.png", folder / f"{name}.png")


def odd_size(folder):
    for file in folder.iterdir():
        write_png(file, torch.zeros(3, 40, 40, dtype=torch.uint8))


def empty(folder):
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "words", "message"),
    [
        (extra, [], "images without a mask, 1: stranger.png"),
        (missing, [], "masks without an image, 1 of 6: face3"),
        (smaller, [], "face2.png: is 32 x 32 pixels, and 48 x 48 suits its mask; all must have one size"),
        (oblong, [], "face0.png: is 32 x 48 pixels, and 48 x 48 suits its mask; all must have one size"),
        (grey, [], "face4.png: is of mode L, not RGB"),
        (alpha, [], "face5.png: is of mode RGBA, not RGB"),
        (damaged, [], "face5.png: cannot be read as an image"),
        (twice, [], "face5.jpg and face5.png are two images of one name"),
        (uneven, [], "same number of images for the diversity; face0 has 2, face1 has 3"),
        (odd_size, ["parser=drawn"], "multiples of 16, got 40 pixels"),
        (empty, [], "holds no images"),
        (shutil.rmtree, [], "no such folder of images"),
        (None, ["masks=1"], "at least 2 unseen masks, got 1"),
        (None, ["masks=3", "proxy=none.safetensors"], "at least 4 unseen masks with real images, got 3"),
        (None, ["proxy=none.safetensors"], "none.safetensors: not found"),
        (None, ["fid=clean"], r"pt_inception-2015.*\.pth: not found"),
        (None, ["lpips=true"], r"alexnet.*\.pth: not found"),
        (None, ["parser=none.safetensors"], "none.safetensors: no such parser"),
        (None, ["steps=4"], "steps= has no meaning for existing images"),
    ],
)
def test_images_that_cannot_be_measured_are_refused_before_anything_is_written(prepared, faces, spoil, words, message):
    if spoil is not None:
        spoil(faces)
    with pytest.raises((ValueError, OSError), match=message):
        evaluate.main([f"images={faces}", f"data={prepared}", f"weights={faces.parent / 'none'}", *words])
    assert not faces.with_name("faces-evaluation").exists()


def test_images_of_drawn_faces_have_one_size(tmp_path):
    for index, side in enumerate((32, 32, 48)):
        write_png(tmp_path / f"{index:05d}.png", torch.zeros(3, side, side, dtype=torch.uint8))
    with pytest.raises(ValueError, match="00002.png: has another size than 00000.png"):
        evaluate.main([f"images={tmp_path}", "data=drawn", "masks=3"])


def test_images_need_to_know_their_masks(faces):
    with pytest.raises(UsageError, match="images= needs data=PREPARED"):
        evaluate.main([f"images={faces}"])


class Seer:
    """A parser of one's own: it has seen the masks."""

    def __init__(self, masks):
        self.masks = iter(masks)

    def parse(self, images):
        return torch.stack([next(self.masks) for _ in images])


class Halves:
    """Labels the left half of an image 1 and the right one 2, and keeps the sizes that it saw."""

    def __init__(self):
        self.seen = []

    def parse(self, images):
        self.seen.append(tuple(images.shape[-2:]))
        left = torch.arange(images.shape[-1]) < images.shape[-1] // 2
        return torch.where(left, 1, 2).to(torch.uint8).expand(len(images), *images.shape[-2:])


@pytest.mark.parametrize(
    ("trained_on", "given", "seen"),
    [
        (16, (32, 32), (16, 16)),
        (16, (16, 16), (16, 16)),
        (16, (8, 8), (8, 8)),
        (16, (32, 64), (32, 64)),
        (0, (32, 32), (32, 32)),
    ],
)
def test_a_parser_sees_larger_squares_at_the_size_it_knows(trained_on, given, seen):
    parser = Halves()
    labels = NamedParser("halves", parser, 19, image_size=trained_on).parse(torch.zeros(2, 3, *given))
    assert parser.seen == [seen] and labels.shape == (2, *given) and labels.dtype == torch.uint8
    assert (labels[..., : given[1] // 2] == 1).all() and (labels[..., given[1] // 2 :] == 2).all()


def test_the_shipped_parser_knows_its_size():
    assert load_named_parser("drawn").image_size == 128


def test_any_parser_can_judge(prepared, faces):
    masks = [measured[1] for measured in held_out_pairs(Config(data=str(prepared), image_size=48), 6)]
    named = NamedParser("seer", Seer([*masks, *masks]), 19, weights="1" * 64)
    result = evaluate.evaluate_images(faces, Settings(data=str(prepared)), command="test", parser=named)
    assert result["mask_agreement"]["miou"] == result["ceiling"]["miou"] == 1
    assert result["mask_agreement"]["protocol"].startswith("agreement[parser=seer,")
    assert result["mask_agreement"]["weights"] == "1" * 64
    small = NamedParser("seer", Seer([*masks, *masks]), 19, image_size=16)
    reduced = evaluate.evaluate_images(faces, Settings(data=str(prepared)), command="test", parser=small)
    assert reduced["mask_agreement"]["protocol"].startswith("agreement[parser=seer,at=16,")
    with pytest.raises(ValueError, match="seer: predicts 6 classes, the masks have 19"):
        evaluate.evaluate_images(
            faces,
            Settings(data=str(prepared), out=str(faces / "out")),
            command="test",
            parser=NamedParser("seer", Seer(masks), 6),
        )


def test_a_parser_that_sees_nothing_is_said_not_divided_by(prepared, faces):
    class Blind:
        def parse(self, images):
            return torch.zeros(images[:, 0].shape, dtype=torch.uint8)

    result = evaluate.evaluate_images(
        faces,
        Settings(data=str(prepared), out=str(faces.parent / "out")),
        command="test",
        parser=NamedParser("blind", Blind(), 19),
    )
    assert result["floor_to_ceiling"] is None and "the parser fails on real images" in summary(result)
    assert "it cannot judge these" in (faces.parent / "out" / "report.html").read_text()


@pytest.fixture
def shapes(tmp_path):
    """A prepared folder whose masks have two shapes, wide and tall, and its images as if somebody had made them."""
    folder, hashes, faces = tmp_path / "prepared", {}, DrawnFaces(8, size=64)
    ids = [f"face{index}" for index in range(8)]
    folder.mkdir()
    (tmp_path / "made").mkdir()
    for index, id in enumerate(ids):
        size = (48, 32) if index % 3 else (32, 64)
        image, mask = center_crop_resize(*faces[index], size)
        hashes |= write_pair(folder, id, image, mask)
        if index < 6:
            write_png(tmp_path / "made" / f"{id}.png", image)
    write_records(folder, CELEBAMASK19, {"train": ids[6:], "test": ids[:6]}, hashes, {})
    return folder


def test_images_of_several_shapes_are_measured_with_their_masks(shapes):
    made = shapes.with_name("made")
    evaluate.main([f"images={made}", f"data={shapes}", "parser=drawn"])
    result = json.loads((shapes.with_name("made-evaluation") / "result.json").read_text())
    assert result["mask_agreement"] == result["ceiling"] and result["floor"]["miou"] < result["ceiling"]["miou"]
    assert result["image_size"] == "32x64,48x32" and result["diversity"]["other_masks"] > 0
    write_png(made / "face4.png", torch.zeros(3, 32, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="face4.png: is 64 x 32 pixels, and 32 x 48 suits its mask"):
        evaluate.main([f"images={made}", f"data={shapes}"])
