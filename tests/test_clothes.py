"""A second recipe: photographs of other shapes and classes, from their folder to a measured run and its export."""

import json
import os
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")

from recipes.clothes import export, prepare, train
from recipes.clothes.presets import PRESETS
from recipes.sisma import compare, evaluate, parser, sample
from recipes.sisma import export as export_faces
from recipes.sisma import prepare as prepare_faces
from recipes.sisma.arguments import UsageError
from recipes.sisma.evaluation.images import HeldOut, Images, read_held_out
from recipes.sisma.evaluation.measure import Metrics, NamedParser, measure_images
from recipes.sisma.evaluation.report import _by_class
from recipes.sisma.runs import load_config, load_run
from ssmgen import MaskToImage
from ssmgen.data import LabelSet, PreparedFolder
from ssmgen.reading import read_json

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("SSMGEN_SHARED", ROOT.parent / "shared")) / "data" / "clothes"
NAMES = ["nothing", "face", "arms", "shirt", "coat", "trousers"]
TABLE = "background: nothing\nskin #e6b48c: face, arms\nclothes: shirt, coat, trousers\n"
SHAPES = [(64, 24), (64, 32), (48, 32)]  # height, width
TINY = ("image_size=64x32", "model_args.dim=64", "model_args.depth=1", "batch_size=4", "solver_steps=2")


def figure(number):
    """A person of six labels as an image and a mask, in one of the shapes."""
    rng = np.random.default_rng(number)
    height, width = SHAPES[number % len(SHAPES)]
    mask = np.zeros((height, width), np.uint8)
    for label, top, bottom in ((1, 0.05, 0.2), (2, 0.2, 0.3), (3 + number % 2, 0.3, 0.6), (5, 0.6, 0.95)):
        mask[int(top * height) : int(bottom * height), width // 4 : -width // 4] = label
    colours = rng.integers(0, 256, (6, 3))
    noise = rng.integers(-9, 10, (height, width, 3))
    return np.clip(colours[mask] + noise, 0, 255).astype(np.uint8), mask


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder like the data set's, with one empty mask."""
    folder = tmp_path_factory.mktemp("photographs")
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for number in range(13):
        image, mask = figure(number)
        Image.fromarray(image).save(folder / f"images/{number:04d}.jpg", quality=95)
        Image.fromarray(mask * (number != 12)).save(folder / f"masks/{number:04d}.png")
    (folder / "labels.json").write_text(json.dumps(NAMES))
    (folder / "few.txt").write_text(TABLE)
    return folder


@pytest.fixture(scope="module")
def data(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("prepared") / "data"
    prepare.main([f"source={source}", f"target={target}", f"merge={source / 'few.txt'}", "test_share=0.4"])
    return target


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """An f8 autoencoder with few channels, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("autoencoder")
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    counts = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    diffusers.AutoencoderTiny(**blocks, **counts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(data, autoencoder, tmp_path_factory):
    """A run that was stopped after a step and continued, then measured with a parser of its own."""
    folder = tmp_path_factory.mktemp("run")
    named = folder / "parser.safetensors"
    parser.main([f"data={data}", f"out={named}", "steps=2", "batch_size=2", "image_size=64x32", "width=4"])
    words = [*TINY, f"data={data}", f"run={folder / 'run'}", f"cache={folder / 'cache'}", f"parser={named}"]
    words += [f"autoencoder_source={autoencoder}", "sample_every=2"]
    train.main([*words, "steps=1", "lr_decay_steps=2", "evaluate=false"])
    train.main([*words, "steps=2", "lr_decay_steps=2", "resume=auto"])
    return folder / "run"


def test_labels_are_merged_by_the_table_and_bad_pairs_left_out(source, data, capsys):
    record = read_json(data / "prepared.json")
    assert record["labels"]["classes"] == ["background", "skin", "clothes"] and record["labels"]["mirrored"] == []
    assert record["source"]["merged"]["clothes"] == ["shirt", "coat", "trousers"]
    assert record["source"]["left_out"] == [{"file": "masks/0012.png", "reason": "the mask is empty: background only"}]
    pairs = PreparedFolder(data, "train", (64, 32))
    assert pairs.labels.palette[1] == (0xE6, 0xB4, 0x8C) and "0012" not in pairs.ids
    _, own = figure(int(pairs.ids[0]))
    merged = np.array(Image.open(data / f"masks/{pairs.ids[0]}.png"))
    assert (merged == np.array([0, 1, 1, 2, 2, 2])[own]).all()


def test_the_next_command_is_this_recipes(source, tmp_path, capsys):
    prepare.main([f"source={source}", f"target={tmp_path / 'out'}", f"merge={source / 'few.txt'}", "test_share=0.4"])
    assert f"Next: python -m recipes.clothes.train data={tmp_path / 'out'}\n" in capsys.readouterr().out
    with pytest.raises(
        UsageError, match=r"preset 'clothes' needs data=FOLDER, made by: python -m recipes.clothes.prep"
    ):
        train.main([f"run={tmp_path / 'run'}"])
    with pytest.raises(FileNotFoundError, match="prepare one with python -m recipes.clothes.prepare source=DIR"):
        train.main([f"run={tmp_path / 'run'}", f"data={tmp_path / 'none'}"])
    with pytest.raises(UsageError, match="unknown preset 'faces'.* The presets are clothes"):
        train.main(["faces"])


def test_any_folder_is_prepared_with_names_and_a_table(source, tmp_path, capsys):
    """The feature is not this recipe's: ``recipes.sisma.prepare`` has it for everyone."""
    words = [f"source={source}", f"labels={source / 'labels.json'}", "on_bad=skip", "test_share=0.4"]
    prepare_faces.main([*words, f"target={tmp_path / 'all'}"])
    assert PreparedFolder(tmp_path / "all", "test").labels.classes == tuple(NAMES)
    prepare_faces.main([*words, f"target={tmp_path / 'few'}", f"merge={source / 'few.txt'}"])
    assert PreparedFolder(tmp_path / "few", "test").labels.classes == ("background", "skin", "clothes")
    assert "Next: python -m recipes.sisma.train faces data=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "table", "message"),
    [
        (NAMES, TABLE.replace(", coat", ""), "few.txt: 1 fault.*\n.*left out: 'coat'"),
        (NAMES, TABLE + "outside: coat\n", "few.txt: 1 fault.*\n.*'coat' .* is also in line 3"),
        (NAMES, TABLE.replace("coat", "cote"), "unknown label 'cote'"),
        (NAMES[:5], TABLE.replace(", trousers", ""), r"label 5 is outside 0\.\.4"),
        ([*NAMES, "arms"], TABLE, "names.json: expected 1 to 256 different names, got 7, 6 of them different"),
        ({"nothing": 0}, TABLE, "names.json: expected a list of class names by id"),
    ],
)
def test_a_bad_table_or_list_of_names_is_explained_and_nothing_is_written(source, tmp_path, names, table, message):
    (tmp_path / "few.txt").write_text(table)
    (tmp_path / "names.json").write_text(json.dumps(names))
    files = [f"labels={tmp_path / 'names.json'}", f"merge={tmp_path / 'few.txt'}"]
    with pytest.raises(ValueError, match=message):
        prepare_faces.main([f"source={source}", f"target={tmp_path / 'out'}", *files])
    assert not (tmp_path / "out").exists()


def test_a_run_of_rectangles_with_classes_of_its_own_is_measured(run):
    pipe, trained = load_run(run)
    assert pipe.recipe.labels.classes == ("background", "skin", "clothes") and pipe.recipe.size == (64, 32)
    assert (trained.config.recipe, trained.config.preset, trained.step) == ("recipes.clothes", "clothes", 2)
    result = json.loads((run / "result.json").read_text())
    assert result["image_size"] == "64x32" and result["command"].startswith("python -m recipes.clothes.train ")
    for key in ("mask_agreement", "floor", "ceiling", "autoencoder_ceiling"):
        assert set(result[key]["iou"]) <= {"background", "skin", "clothes"} and 0 <= result[key]["miou"] <= 1
    assert result["diversity"].keys() == {"same_mask", "other_masks"}
    assert "CelebAMask" not in (run / "report.html").read_text(), "published figures are those of faces"
    with Image.open(run / "samples" / "step-000002.png") as sheet:
        assert sheet.width < sheet.height, "six rows of tall pictures"


def test_the_other_commands_take_the_run_as_it_is(run, data, tmp_path, capsys):
    mask = tmp_path / "mask.png"
    Image.fromarray(np.kron(figure(1)[1] // 3, np.ones((2, 2), np.uint8))).save(mask)  # twice as large
    sample.main([f"run={run}", f"mask={mask}", f"out={tmp_path / 'out'}"])
    with Image.open(tmp_path / "out" / "mask--0.png") as image:
        assert image.size == (32, 64)
    words = [f"data={data}", f"parser={run.parent / 'parser.safetensors'}", f"out={tmp_path / 'again'}"]
    images = next(folder for folder in (run / "evaluation").iterdir())
    (images / "record.json").rename(tmp_path / "record.json")
    try:
        evaluate.main([f"images={images}", *words])
    finally:
        (tmp_path / "record.json").rename(images / "record.json")
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    own = json.loads((run / "result.json").read_text())
    assert again["mask_agreement"] == own["mask_agreement"] and again["image_size"] == "64x32"


@pytest.fixture(scope="module")
def bucketed(data, autoencoder, run):
    """A run of two sizes."""
    words = [
        *TINY[1:],
        "image_size=64x32,48x32",
        "crops=2",
        f"data={data}",
        f"run={run.parent / 'bucketed'}",
        "steps=3",
    ]
    words += [f"parser={run.parent / 'parser.safetensors'}", f"cache={run.parent / 'cache'}", "sample_every=3"]
    train.main([*words, f"autoencoder_source={autoencoder}", "lr_decay_steps=3"])
    return run.parent / "bucketed"


def test_a_run_in_buckets_is_sampled_and_measured_in_each_shape(bucketed, data, tmp_path):
    buckets = load_config(bucketed).size
    assert buckets == [(64, 32), (48, 32)]
    pairs = PreparedFolder(data, "test", buckets)
    shapes = {id: tuple(mask.shape) for id, (_, mask) in zip(pairs.ids, pairs, strict=True)}
    assert set(shapes.values()) == set(buckets)
    folder = next((bucketed / "evaluation").iterdir())
    for id, (height, width) in shapes.items():
        for name in (id, f"{id}--1"):
            with Image.open(folder / f"{name}.png") as image:
                assert image.size == (width, height)
    result = json.loads((bucketed / "result.json").read_text())
    assert result["image_size"] == "64x32,48x32" and result["mask_agreement"]["n"] == len(pairs)
    alone = sum(list(shapes.values()).count(shape) == 1 for shape in shapes.values())
    assert result["floor"]["n"] == len(pairs) - alone, "each mask is compared with another one of its shape"
    with Image.open(bucketed / "samples" / "step-000003.png") as sheet:
        assert sheet.height > 3 * 64
    for number, size in ((1, (32, 64)), (2, (32, 48))):
        Image.fromarray(figure(number)[1] // 3).save(tmp_path / f"{number}.png")
        sample.main([f"run={bucketed}", f"mask={tmp_path / f'{number}.png'}", f"out={tmp_path / 'out'}"])
        with Image.open(tmp_path / "out" / f"{number}--0.png") as image:
            assert image.size == size


def test_a_run_in_buckets_is_exported_and_compared(bucketed, tmp_path):
    export.main([f"run={bucketed}", f"out={tmp_path / 'exported'}"])
    pipe = MaskToImage.from_pretrained(tmp_path / "exported")
    assert pipe.recipe.sizes == [(64, 32), (48, 32)]
    assert pipe(torch.zeros(96, 64, dtype=torch.long), output_type="uint8").shape[-2:] == (48, 32)
    compare.main([f"run={bucketed}", f"pipe={tmp_path / 'exported'}"])
    with Image.open(bucketed / "compare.png") as sheet:
        assert sheet.width == 6 * 36 + 4 and sheet.height > 3 * 64


class Exact:
    """A parser of images that show 80 times their label."""

    def parse(self, images):
        return ((images[:, 0] + 1) * 127.5 / 80).round().long()


def test_images_of_several_shapes_are_compared_with_those_of_their_own():
    masks = [torch.full(shape, label) for shape, label in (((4, 2), 0), ((2, 2), 3), ((4, 2), 1), ((4, 2), 2))]
    images = [(80 * mask).to(torch.uint8).expand(3, -1, -1) for mask in masks]
    labels = LabelSet("four", ("a", "b", "c", "d"), ((0, 0, 0),) * 4)
    held_out = HeldOut(["0", "1", "2", "3"], masks, images, labels)
    metrics = Metrics(NamedParser("exact", Exact(), 4), [], None)
    result, parsed = measure_images(Images(held_out, images, {}, "given"), metrics, [], lambda batch: batch)
    for key in ("mask_agreement", "ceiling", "autoencoder_ceiling"):
        assert result[key]["pixel_accuracy"] == 1 and result[key]["n"] == 4
    assert result["floor"]["pixel_accuracy"] == 0 and result["floor"]["n"] == 3, "the only one of its shape is left out"
    assert [name for name, *_ in _by_class(result)] == ["a", "b", "c"], "the floor knows nothing of d"
    assert all(torch.equal(found, mask) for found, mask in zip(parsed, masks, strict=True)), "in the order of the masks"
    steps = (80 / 127.5, 80 / 127.5, 160 / 127.5)
    assert result["diversity"]["other_masks"] == pytest.approx(sum(steps) / 3, rel=1e-4)


def test_masks_that_all_differ_in_shape_are_rejected():
    pairs = [(torch.zeros(3, size, 2, dtype=torch.uint8), torch.zeros(size, 2)) for size in (2, 3)]
    with pytest.raises(ValueError, match="no two of the 2 unseen masks have one shape"):
        read_held_out(pairs, 2, LabelSet("one", ("a",), ((0, 0, 0),)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["image_size=64x32,64x32"], "image_size=64x32,64x32: names a size twice"),
        (["image_size=64x32,48x30"], "multiple of 8"),
        (["image_size=64x32,x"], "image_size=x: expected a side"),
        (["image_size=64x32,48x24", "parser=PARSER"], "sides that are multiples of 16, got 64 x 32 x 48 x 24"),
        (["image_size=16x64,16x32"], "would lose more than half"),
    ],
)
def test_bad_buckets_are_explained_before_training(words, message, data, autoencoder, run, tmp_path):
    named = [word.replace("PARSER", str(run.parent / "parser.safetensors")) for word in words]
    more = [f"run={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}", f"autoencoder_source={autoencoder}"]
    with pytest.raises(ValueError, match=message):
        train.main([*TINY[1:], f"data={data}", *more, *named])
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    with pytest.raises(UsageError, match="a parser trains on one size"):
        parser.main([f"data={data}", "image_size=64x32,48x32"])


def test_an_export_names_the_command_and_no_faces(run, tmp_path):
    with pytest.raises(UsageError, match="is a run of recipes.clothes: export it with python -m recipes.clothes.exp"):
        export_faces.main([f"run={run}", f"out={tmp_path / 'no'}"])
    export.main([f"run={run}", f"out={tmp_path / 'out'}"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "python -m recipes.clothes.train clothes data=... " in card and "CelebA" not in card
    pipe = MaskToImage.from_pretrained(tmp_path / "out")
    assert pipe.recipe.size == (64, 32) and pipe.recipe.labels.classes == ("background", "skin", "clothes")


def test_the_recipe_is_presets_a_reader_and_few_lines():
    files = list((ROOT / "recipes" / "clothes").glob("**/*.py"))
    assert sum(len(file.read_text().splitlines()) for file in files) <= 150
    table = (ROOT / "recipes" / "clothes" / "classes.txt").read_text()
    assert 16 <= sum(":" in line and not line.startswith("#") for line in table.splitlines()) <= 20
    for make in PRESETS.values():
        assert make().recipe == "recipes.clothes" and make().flip


@pytest.mark.skipif(not SHARED.is_dir(), reason="the photographs may not be shipped: set SSMGEN_SHARED to try")
def test_real_photographs_train(tmp_path, autoencoder):
    for part in ("images", "masks"):
        (tmp_path / "source" / part).mkdir(parents=True)
        for file in sorted((SHARED / part).iterdir())[:10]:
            (tmp_path / "source" / part / file.name).symlink_to(file)
    (tmp_path / "source" / "labels.json").symlink_to(SHARED / "labels.json")
    prepare.main([f"source={tmp_path / 'source'}", f"target={tmp_path / 'data'}", "test_share=0.5"])
    words = [*TINY, f"data={tmp_path / 'data'}", f"run={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}", "steps=2"]
    train.main([*words, f"autoencoder_source={autoencoder}", "tracker=none"])
    assert len(load_run(tmp_path / "run")[0].recipe.labels) == 20
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["diversity"]["same_mask"] > 0 and "mask_agreement" not in result
