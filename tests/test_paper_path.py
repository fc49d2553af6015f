"""`paper` and `stable` from the official archive's layout to a loaded export: small, but every part real."""

import json

import diffusers
import pytest
import torch

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")

from recipes.sisma import evaluate, export, parser, prepare, sample, train
from recipes.sisma.presets import preset
from recipes.sisma.runs import load_config
from ssmgen import MaskToImage
from ssmgen.data import CELEBAMASK19
from ssmgen.data.drawn_faces import draw_face
from ssmgen.data.images import read_image, to_pil, write_png
from ssmgen.training import checkpoints

IMAGES, PARTS = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno"
IDS = (0, 1, 1999, 2000, 28_000, 28_001, 29_999)
# Sizes alone; loader processes, solver, precision, evaluation and all else are the presets' own.
SMALL = ("image_size=32", "model_args.dim=64", "model_args.depth=1", "batch_size=4", "solver_steps=3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Drawn faces in the official layout, images twice as large as masks, and the prepared folder made of them."""
    folder = tmp_path_factory.mktemp("archive")
    root = folder / "CelebAMask-HQ"
    (root / IMAGES).mkdir(parents=True)
    for number, id in enumerate(IDS):
        image, mask = draw_face(number, 64)[0], draw_face(number, 32)[1]
        to_pil(image).save(root / IMAGES / f"{id}.jpg", quality=95)
        (root / PARTS / str(id // 2000)).mkdir(parents=True, exist_ok=True)
        for label in mask.unique().tolist():
            if label:
                part = (mask == label).to(torch.uint8) * 255
                write_png(root / PARTS / str(id // 2000) / f"{id:05d}_{CELEBAMASK19.classes[label]}.png", part)
    prepare.main([f"source={folder}", f"target={folder / 'prepared'}"])
    return folder / "prepared"


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """An f8 `AutoencoderKL` with few channels, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("autoencoder")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.18215,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def words(data, autoencoder, tmp_path):
    return [*SMALL, f"data={data}", f"autoencoder_source={autoencoder}", f"cache={data.parent / 'cache'}"]


@pytest.mark.parametrize("name", ["paper", "stable"])
def test_from_the_archive_to_a_loaded_export(name, words, data, tmp_path, capsys):
    run = tmp_path / "run"
    train.main([name, f"run={run}", *words, "steps=2"])
    train.main([name, f"run={run}", *words, "steps=3", "resume=auto"])
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-00000002", "step-00000003"]
    own, config = preset(name), load_config(run)
    assert (config.train.lr, config.train.num_workers, config.sampling.solver) == (own.train.lr, 4, "euler")
    assert (config.train.precision, config.evaluate, config.evaluate_masks) == ("no", True, 2000)
    result = json.loads((run / "result.json").read_text())
    assert result["masks"] == 3 and result["steps"] == 3 and result["image_size"] == 32
    assert result["sampling"]["steps"] == 3 and "mask_agreement" not in result  # the preset has no parser
    assert (run / "samples" / "step-000003.png").is_file() and (run / "report.html").is_file()

    mask = data / "masks" / "28000.png"
    sample.main([f"run={run}", f"mask={mask}", f"out={tmp_path / 'out'}", "seed=3"])
    sampled = read_image(tmp_path / "out" / "28000--3.png")

    export.main([f"run={run}", f"out={tmp_path / 'exported'}"])
    pipe = MaskToImage.from_pretrained(tmp_path / "exported")
    again = pipe(mask, seed=3, output_type="pt", batch_size=1)[0]
    assert torch.equal((again * 255).round().to(torch.uint8), sampled)
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"recipes.sisma.train {name} " in card and "non-commercial" in card and str(data) not in card


def test_a_parser_of_the_same_folder_judges_what_was_trained_on_it(words, data, tmp_path):
    """Mirrored pairs, crops and a batch in parts besides, which the presets leave out, through the same latents."""
    more = ["flip=true", "crops=2", "accumulate=2", "model_args.mask_dropout=0.1", "guidance_scale=2", "sample_every=0"]
    train.main(["stable", f"run={tmp_path / 'run'}", *words, *more, "steps=1", "evaluate=false"])
    file = tmp_path / "parser.safetensors"
    parser.main([f"data={data}", f"out={file}", "steps=2", "batch_size=2", "image_size=32", "width=8"])
    evaluate.main([f"run={tmp_path / 'run'}", f"parser={file}", "masks=2"])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["masks"] == 2 and 0 <= result["mask_agreement"]["miou"] <= 1
    assert result["parser"]["data"] == "prepared folder" and "autoencoder_ceiling" in result
