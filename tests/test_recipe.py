"""The SISMA recipe as its users run it: small, but every part real."""

import dataclasses
import fnmatch
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import pytest
import torch

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")

from recipes.sisma import budget, evaluate, export, parser, prepare, provenance, sample, train
from recipes.sisma.arguments import UsageError
from recipes.sisma.evaluation.image_folder import find_images
from recipes.sisma.image_names import check_mask_names
from recipes.sisma.pictures import save_sheet
from recipes.sisma.presets import PRESETS, Config, preset
from recipes.sisma.runs import find_run, load_config, load_run, sampling_settings, save_config
from ssmgen import MaskToImage
from ssmgen.data import BISENET19, CELEBAMASK19, remap
from ssmgen.data.drawn_faces import DrawnFaces, draw_face
from ssmgen.data.folder import PreparedFolder, write_pair, write_records
from ssmgen.data.images import read_image, write_png
from ssmgen.metrics import MaskAgreement
from ssmgen.training import CheckpointError, TrainResult, checkpoints, verify_checkpoint
from ssmgen.weights import write_weights

ROOT = Path(__file__).parents[1]
SMALL = [
    *("image_size=64", "drawn_count=24", "batch_size=4", "model_args.dim=64", "model_args.depth=1", "log_every=1"),
    *("sample_every=0", "evaluate_masks=4", "solver_steps=2", "checkpoint_every=5", "warmup=2", "lr_decay_steps=1300"),
]


def words(tmp_path, *more):
    return [f"run={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}", *SMALL, *more]


def digests(run: Path) -> dict[str, str]:
    newest = checkpoints(run / "checkpoints")[-1]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in newest.glob("*.safetensors")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One small run with everything in it."""
    folder = tmp_path_factory.mktemp("trained")
    train.main(words(folder, "steps=6", "sample_every=3", "model_args.mask_dropout=0.1"))
    return folder / "run"


def test_a_run_folder_holds_what_is_promised(trained):
    assert {p.name for p in trained.iterdir()} == {
        *("config.yaml", "log.jsonl", "samples", "checkpoints", "result.json", "result.png", "report.html"),
        *("evaluation", "tensorboard"),
    }
    assert [p.name for p in sorted((trained / "samples").iterdir())] == ["step-000003.png", "step-000006.png"]
    result = json.loads((trained / "result.json").read_text())
    for key in ("mask_agreement", "ceiling", "floor"):
        assert 0 < result[key]["pixel_accuracy"] <= 1 and 0 < result[key]["miou"] <= 1
    assert set(result["diversity"]) == {"same_mask", "other_masks"}
    assert result["steps"] == 6 and result["seconds"] > 0 and result["parameters"] > 1000
    assert result["command"].startswith("python -m recipes.sisma.train run=")
    assert {"commit", "versions", "hardware", "seed", "sampling", "floor_to_ceiling"} <= set(result)
    assert result["ceiling"]["miou"] > result["mask_agreement"]["miou"]


def test_ten_and_ten_make_twenty(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    common = [*SMALL, f"cache={tmp_path / 'cache'}", "evaluate=false"]
    train.main([*common, f"run={whole}", "steps=20"])
    train.main([*common, f"run={cut}", "steps=10"])
    train.main([*common, f"run={cut}", "steps=20", "resume=auto"])
    assert digests(whole) == digests(cut) and len(digests(whole)) == 3


def test_a_number_of_steps_that_was_measured_trains_as_if_it_was_given(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(budget, "LEAST", 2)
    monkeypatch.setattr(budget, "MOST", 4)
    chosen, given = tmp_path / "chosen", tmp_path / "given"
    common = [word for word in SMALL if "lr_decay" not in word]
    common += [f"cache={tmp_path / 'cache'}", "checkpoint_every=2", "evaluate=false"]
    train.main([*common, f"run={chosen}"])
    said = re.search(r"measured \d+\.\d\d s a step: 4 steps, the most that are chosen, take", capsys.readouterr().err)
    assert said and load_config(chosen).steps == load_config(chosen).lr_decay_steps == 4
    train.main([*common, f"run={given}", "steps=4"])
    assert digests(chosen) == digests(given) and len(digests(chosen)) == 3
    losses = [[json.loads(line)["loss"] for line in (run / "log.jsonl").open()] for run in (chosen, given)]
    assert losses[0] == losses[1] and len(losses[0]) == 4

    def again(*_):
        raise AssertionError("measured twice")

    monkeypatch.setattr(train, "seconds_per_step", again)
    monkeypatch.setattr(budget, "MOST", 9)
    shutil.rmtree(checkpoints(chosen / "checkpoints")[-1])  # stopped after step 2
    train.main([*common, f"run={chosen}", "resume=auto", "minutes=1"])
    assert digests(chosen) == digests(given) and load_config(chosen).steps == 4
    (chosen / "config.yaml").unlink()
    with pytest.raises(UsageError, match=r"config.yaml: not found, .*give steps="):
        train.main([*common, f"run={chosen}", "resume=auto"])


def test_steps_fill_the_minutes_within_bounds(capsys):
    cases = [(0.5, "", 700), (0.512, "", 700), (0.1, "", 1300), (2.0, "", 400), (0.1, "lr_decay_steps=90", 90)]
    for seconds, word, steps in cases:
        config = budget.choose_steps(train.parse(["quick", "minutes=6", *filter(None, [word])]), lambda s=seconds: s)
        assert (config.steps, config.lr_decay_steps, config.sample_every) == (steps, steps, steps // 2)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "measured 0.50 s a step: 700 steps fit in 6 minutes"
    assert said[3].endswith("400 steps, the fewest that are chosen, take about 13.3 minutes (6 were asked for)")
    assert "90 steps, as many as the cosine of the learning rate has, take about 0.1 minutes" in said[4]
    own = budget.choose_steps(train.parse(["quick", "lr_decay_steps=2000", "sample_every=0"]), lambda: 0.3)
    assert (own.steps, own.lr_decay_steps, own.sample_every) == (1200, 2000, 0)


def test_the_cosine_ends_where_training_does_if_nothing_else_is_said():
    for words, expected in (
        (["quick", "steps=3000"], (3000, 3000, 1500)),
        (["quick", "steps=7"], (7, 7, 4)),
        (["faces", "data=x", "steps=500", "lr_decay_steps=0", "sample_every=9"], (500, 0, 9)),
        (["paper", "data=x"], (150_000, 0, 5000)),
    ):
        config = budget.continued(train.parse(words))
        assert (config.steps, config.lr_decay_steps, config.sample_every) == expected


def test_a_complete_run_is_not_trained_again(trained, capsys):
    before = digests(trained)
    common = [f"cache={trained.parent / 'cache'}", *SMALL, "steps=6", "model_args.mask_dropout=0.1"]
    train.main([f"run={trained}", *common, "resume=auto", "evaluate=false"])
    said = capsys.readouterr().out
    assert digests(trained) == before and f"{trained} is at step 6 already: nothing is trained\n" in said
    assert "to step 6" not in said


def test_a_finished_run_is_prolonged_and_says_so(tmp_path, capsys):
    """What the error advises works, and the results of the shorter run stay."""
    common = words(tmp_path, "parser=none", "evaluate_masks=2")
    train.main([*common, "steps=2", "lr_decay_steps=2"])
    with pytest.raises(ValueError, match="lr_decay_steps=2 ends before steps=4.* Set lr_decay_steps=4, or 0"):
        train.main([*common, "steps=4", "lr_decay_steps=2", "resume=auto"])
    capsys.readouterr()
    train.main([*common, "steps=4", "lr_decay_steps=4", "resume=auto"])
    printed = capsys.readouterr()
    said = "earning-rate schedule changed at step 2: lr_decay_steps=4, 2 until then"
    assert f"l{said}\n" in printed.err and "note: the result before is now result-step-2.json" in printed.out
    run = tmp_path / "run"
    result, before = (json.loads((run / name).read_text()) for name in ("result.json", "result-step-2.json"))
    assert (result["steps"], before["steps"]) == (4, 2)
    assert result["schedule"] == [{"step": 0, "lr_decay_steps": 2}, {"step": 2, "lr_decay_steps": 4}]
    assert (run / "result-step-2.png").is_file() and (run / "report-step-2.html").is_file()
    assert load_config(run).lr_decay_steps == 4
    with pytest.raises(CheckpointError, match="lr_decay_steps: 4 there, 3 now, which may only grow or become 0"):
        train.main([*common, "steps=3", "lr_decay_steps=3", "resume=auto"])
    export.main([f"run={run}", f"out={tmp_path / 'exported'}"])
    assert f"L{said}." in (tmp_path / "exported" / "README.md").read_text()


@pytest.fixture(scope="module")
def four_pairs(tmp_path_factory):
    """Four pairs, written as a prepared folder, and its maker for other splits and classes."""
    folder, faces, hashes = tmp_path_factory.mktemp("few"), DrawnFaces(4, size=32), {}
    for index in range(4):
        hashes |= write_pair(folder, f"p{index}", *faces[index])

    def write(splits, labels=CELEBAMASK19):
        write_records(folder, labels, splits, hashes, {"split": "by-name"})
        return folder

    return write


@pytest.mark.parametrize(
    ("test", "more", "message"),
    [
        (
            1,
            [],
            r"there is 1 test pair, and an evaluation needs 2\. Prepare again .* Or train without: evaluate=false\.",
        ),
        (0, [], "there is no test pair.* Or train without: evaluate=false sample_every=0"),
        (0, ["evaluate=false", "sample_every=1"], "evaluate=false sample_every=0"),
        (4, [], "split 'train' of .* is empty"),
    ],
)
def test_data_without_enough_pairs_is_refused_before_training(tmp_path, four_pairs, test, more, message):
    data = four_pairs({"train": [f"p{i}" for i in range(test, 4)], "test": [f"p{i}" for i in range(test)]})
    with pytest.raises(ValueError, match=message):
        train.main(["quick", *words(tmp_path, f"data={data}", "image_size=32", "steps=1", *more)])
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_what_such_a_refusal_advises_trains(tmp_path, four_pairs):
    data = four_pairs({"train": ["p0"], "test": []})
    small = words(tmp_path, f"data={data}", "image_size=32", "steps=1", "batch_size=2")
    train.main(["quick", *small, "evaluate=false", "sample_every=0"])
    assert checkpoints(tmp_path / "run" / "checkpoints")
    data = four_pairs({"train": ["p0"], "test": ["p1", "p2"]})
    again = words(tmp_path / "two", f"data={data}", "image_size=32", "steps=1", "batch_size=2", "sample_every=1")
    train.main(["quick", *again])
    assert json.loads((tmp_path / "two/run/result.json").read_text())["masks"] == 2, "two are enough for all of it"


def test_masks_of_other_classes_are_refused_before_training(tmp_path, four_pairs):
    data = four_pairs({"train": ["p0"], "test": ["p1", "p2"]}, BISENET19)
    with pytest.raises(ValueError, match="has masks of bisenet19, the recipe trains on those of celebamask19"):
        train.main(["quick", *words(tmp_path, f"data={data}", "image_size=32", "steps=1")])
    assert not (tmp_path / "run").exists()


def test_a_solver_whose_package_is_missing_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"ssmgen\[adaptive\]"):
        train.main(words(tmp_path, "steps=1", "solver=dopri5", "sample_every=0"))
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_overwritten(trained, tmp_path):
    with pytest.raises(FileExistsError, match="already holds a run; continue it with resume=auto"):
        train.main(words(trained.parent, "steps=2"))


def test_resuming_another_runs_checkpoint_into_a_run_is_refused(trained, tmp_path):
    other = tmp_path / "other" / "checkpoints" / "step-00000001"
    with pytest.raises(FileExistsError, match="is another's"):
        train.main(words(trained.parent, "steps=9", f"resume={other}", "model_args.mask_dropout=0.1"))


def test_resuming_with_other_settings_is_refused_and_harms_nothing(trained):
    before, config = digests(trained), (trained / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match=r"another configuration \(.*lr: 0.012 there, 0.5 now"):
        train.main(words(trained.parent, "steps=9", "lr=0.5", "resume=auto", "model_args.mask_dropout=0.1"))
    assert digests(trained) == before and (trained / "config.yaml").read_text() == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["quik"], "unknown preset 'quik'.*'quick'"),
        (["my-quick"], "unknown preset 'my-quick'"),
        (["quick", "step=3"], "unknown key 'step'.*'steps'"),
        (["quick", "steps"], "'steps' is not key=value"),
        (["quick", "steps=many"], "steps"),
        (["quick", "preset=paper"], "name the preset as the first word"),
        (["faces"], "needs data=FOLDER"),
        (["quick", "steps=-1"], "steps must be positive"),
        (["paper", "steps=0"], "steps must be positive, or 0 with minutes= to train for; got minutes=0"),
        (["quick", "minutes=-1"], "got minutes=-1"),
        (["quick", "seed=-1"], "a seed is a whole number from 0 to .* got -1"),
        (["quick", "model=sisma-xxl"], "unknown name 'sisma-xxl'"),
        (["quick", "model_args.dept=3"], "takes no 'dept'.*'depth'"),
        (["quick", "model_args.num_classes=3"], "follows from the autoencoder and the labels"),
        (["quick", "autoencoder_source=./nowhere"], "nowhere: no such folder"),
        (["quick", "image_size=60"], "multiple of 8 \\(autoencoder"),
        (["quick", "steps=3000", "lr_decay_steps=1300"], "lr_decay_steps=1300 ends before steps=3000"),
        (["quick", "solver=flow-matching"], "'flow-matching' is of kind objective, not solver. All solvers: ab2"),
        (["quick", "solver_steps=0"], "solver_steps must be at least 1"),
        (["quick", "shift=0"], "shift must be a number above 0, got 0"),
        (["quick", "guidance_start=2"], r"guidance_start must be a number in \[0, 1\], got 2"),
        (["quick", "guidance_scale=-3"], "guidance_scale must be a number at least 0, got -3.0"),
        (["quick", "balance=5"], r"balance is a share of the masks, in \[0, 1\], got 5"),
        (["quick", "evaluate_masks=1"], "evaluate_masks at least 2"),
        (["quick", "parser=nothing"], "nothing: no such parser"),
        (
            ["quick", "image_size=72"],
            "drawn-parser.safetensors: needs images with sides that are multiples of 16, got 72",
        ),
    ],
)
def test_mistakes_are_explained_before_work_begins(argv, message, tmp_path):
    with pytest.raises((UsageError, ValueError, TypeError, OSError), match=message):
        train.main([*argv[:1], f"run={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}", *argv[1:]])
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


def test_a_training_that_is_asked_to_stop_gives_the_status_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    stopped = TrainResult(step=3, seconds=1.0, ema=torch.nn.Identity(), interrupted=True)
    monkeypatch.setattr(train, "train", lambda *_, **__: stopped)
    given = words(tmp_path, "steps=9")
    assert train.main(given) == 130
    assert f"stopped at step 3; continue with: python -m recipes.sisma.train {' '.join(given)} resume=auto" in (
        capsys.readouterr().out
    )


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
    assert [[file.name for file in group] for group in groups] == [
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


def test_printed_commands_can_be_pasted(tmp_path, capsys, monkeypatch):
    words = ["quick", "run=my runs/a;b", "model_args={depth: 1}", "resume=no"]
    expected = ["python", "-m", "recipes.sisma.train", *words[:3], "resume=auto"]
    assert shlex.split(train._continue(words)) == expected
    config = dataclasses.replace(preset("quick"), tracker="a b")
    assert shlex.split(export.training_command(config))[3:] == ["quick", "tracker=a b"]
    target = tmp_path / "my faces"
    prepare.main(["source=drawn", f"target={target}", "count=24", "size=32"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: "))
    assert shlex.split(line)[-1] == f"data={target}"
    with pytest.raises(FileNotFoundError, match="prepare source=DIR 'target=.*no folder'"):
        PreparedFolder(tmp_path / "no folder", "train")
    with pytest.raises(FileNotFoundError, match="recipes.sisma.parser 'out=.*my parser'"):
        parser.load_parser(tmp_path / "my parser")
    asked = []
    monkeypatch.setattr(evaluate, "evaluate_run", lambda run, *, command, **_: asked.append(command))
    evaluate.main(["run=my run", "masks=2"])
    assert shlex.split(asked[0]) == ["python", "-m", "recipes.sisma.evaluate", "run=my run", "masks=2"]


def test_a_model_without_mask_dropout_is_sampled_without_guidance():
    """One of somebody's own need not have the attribute."""
    config = dataclasses.replace(preset("quick"), guidance_scale=1.0)
    assert sampling_settings(config, torch.nn.Identity(), {})["guidance_scale"] == 1.0
    with pytest.raises(ValueError, match="guidance_scale=2.0 needs a run trained with model_args.mask_dropout"):
        sampling_settings(config, torch.nn.Identity(), {"guidance_scale": 2.0})


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
        ([f"mask={bad}", "guidance_start=-0.5"], r"guidance_start must be a number in \[0, 1\], got -0.5"),
        ([f"mask={bad}", "solver=eular"], "unknown solver 'eular'. Did you mean 'euler'"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            sample.main([f"run={trained}", f"out={out}", *argv])
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        sample.main([f"run={tmp_path}", "mask=" + str(bad)])
    assert not out.exists()


def test_a_run_is_not_loaded_with_another_autoencoder(trained, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("autoencoder: auto\n", "autoencoder: identity\n"))
    with pytest.raises(CheckpointError, match="trained on latents of"):
        load_run(run)


def test_a_run_takes_the_class_of_its_autoencoder_from_the_source(tmp_path):
    """The natural slip, ``faces autoencoder_source=stabilityai/sd-vae-ft-mse``, is none: the folder names its class."""
    kl = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    kl.save_pretrained(tmp_path / "kl")
    settings = [f"autoencoder_source={tmp_path / 'kl'}", "steps=2", "evaluate=false"]
    with pytest.raises(ValueError, match="kl: its config.json names the class AutoencoderKL.*give autoencoder=autoenc"):
        train.main(words(tmp_path, *settings, "autoencoder=autoencoder-tiny"))
    assert not (tmp_path / "run").exists()
    train.main(words(tmp_path, *settings))
    record = verify_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1])["record"]
    assert record["autoencoder"]["name"] == "autoencoder-kl"
    export.main([f"run={tmp_path / 'run'}", f"out={tmp_path / 'exported'}"])
    assert MaskToImage.from_pretrained(tmp_path / "exported").recipe.autoencoder == "autoencoder-kl"


def test_skipped_steps_are_counted_in_the_last_line(tmp_path, monkeypatch, capsys):
    result = TrainResult(6, 1.0, torch.nn.Identity(), False, skipped=2)
    monkeypatch.setattr(train, "train", lambda *_, **__: result)
    train.main(words(tmp_path, "steps=6", "evaluate=false"))
    assert re.search(r"to step 6 in 1 s; 2 of its steps were skipped", capsys.readouterr().out)


def test_a_failed_upload_leaves_nothing_in_the_way_of_the_next_try(trained, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *_, **__: None)
    words = [f"run={trained}", f"out={tmp_path / 'out'}", "hub=me/faces"]

    def upload(**_):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    with pytest.raises(OSError, match="me/faces: could not be uploaded to the hub: no network"):
        export.main(words)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **_: "https://hub/me/faces")
    export.main(words)
    assert capsys.readouterr().out.endswith("https://hub/me/faces\n") and (tmp_path / "out/config.json").is_file()
    with pytest.raises(ValueError, match="repository must be of the form owner/name, got 'faces'"):
        export.main([f"run={trained}", f"out={tmp_path / 'other'}", "hub=faces"])


def test_a_run_on_the_hub_is_fetched_only_when_asked_for(trained, tmp_path, monkeypatch):
    import inspect
    import shutil

    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    signature = inspect.signature(huggingface_hub.snapshot_download)

    def matches(file, patterns):
        return any(fnmatch.fnmatch(str(file.relative_to(trained)), pattern) for pattern in patterns)

    def fetch(*args, **kwargs):
        asked = signature.bind(*args, **kwargs).arguments  # what the installed library would take
        if asked["repo_id"] != "someone/faces":
            raise LocalEntryNotFoundError("no network")
        kept = [f for f in trained.rglob("*") if f.is_file() and matches(f, asked["allow_patterns"])]
        for file in kept:
            target = Path(asked["local_dir"]) / file.relative_to(trained)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    folder = find_run("hf://someone/faces", tmp_path)
    assert {p.name for p in folder.iterdir()} == {"config.yaml", "checkpoints"}
    assert load_run(folder).weights == load_run(trained).weights
    assert find_run("someone/faces", tmp_path) == Path("someone/faces")  # a mistyped folder asks no network
    with pytest.raises(FileNotFoundError, match="hf://no/one: could not be fetched: no network"):
        find_run("hf://no/one", tmp_path)
    with pytest.raises(ValueError, match="expected hf://OWNER/NAME"):
        find_run("hf://faces", tmp_path)


def test_an_exported_run_gives_the_same_images(trained, tmp_path, capsys):
    export.main([f"run={trained}", f"out={tmp_path / 'exported'}"])
    assert "MaskToImage.from_pretrained" in capsys.readouterr().out
    pipe = MaskToImage.from_pretrained(tmp_path / "exported")
    mask = draw_face(3, 64)[1]
    theirs = load_run(trained).generate(mask.unsqueeze(0), [7])
    ours = pipe(mask, seed=7, output_type="pt", batch_size=1)
    assert torch.equal((ours * 255).round().to(torch.uint8), theirs)
    card = (tmp_path / "exported" / "README.md").read_text()
    result = json.loads((trained / "result.json").read_text())
    assert f"| {result['mask_agreement']['miou']:.3f} |" in card and result["commit"] in card
    assert "license: apache-2.0" in card and "not photographs" in card and str(trained.parent) not in card
    assert "shuffled masks" in card and 'from_pretrained("OWNER/NAME")' in card
    with pytest.raises(UsageError, match="is there already"):
        export.main([f"run={trained}", f"out={tmp_path / 'exported'}"])
    with pytest.raises(UsageError, match="dtype must be one of float32, bfloat16, float16, got half"):
        export.main([f"run={trained}", f"out={tmp_path / 'half'}", "dtype=half"])
    export.main([f"run={trained}", f"out={tmp_path / 'half'}", "dtype=float16", "name=small-faces"])
    assert 'from_pretrained("small-faces")' in (tmp_path / "half" / "README.md").read_text()
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("exported", "half")]
    assert sizes[1] < 0.6 * sizes[0]


def test_a_card_does_not_carry_the_figures_of_other_weights(tmp_path):
    assert export._result(tmp_path, 6) == {}
    (tmp_path / "result.json").write_text('{"steps": 6}')
    assert export._result(tmp_path, 6) == {"steps": 6} and export._result(tmp_path, 9) == {}


def test_the_cards_command_makes_the_same_settings(trained):
    config = load_config(trained)
    words = export.training_command(config).removeprefix("python -m recipes.sisma.train ").split()
    again = train.parse(words)
    again.run, again.resume, again.cache = config.run, config.resume, config.cache
    assert again == config


def evaluated(run, **settings):
    """The figures of an evaluation, and its images by name."""
    result = evaluate.evaluate_run(run, command="test", **settings)
    folder = max((run / "evaluation").iterdir(), key=lambda folder: (folder / "record.json").stat().st_mtime_ns)
    images = {file.name: file.read_bytes() for file in folder.glob("*.png")}
    return {key: result[key] for key in ("mask_agreement", "ceiling", "floor", "diversity")}, images, folder


def test_a_stopped_evaluation_goes_on_and_finds_the_same(trained):
    whole, images, folder = evaluated(trained, batch_size=6)
    assert len(images) == 4 + 4 * 4
    for name in sorted(images)[3:9]:
        (folder / name).unlink()
    (folder / f"{sorted(images)[4]}.tmp-1").write_bytes(b"half an ima")
    assert evaluated(trained, batch_size=6) == (whole, images, folder)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_with_a_micro_batch_the_batch_size_changes_no_bit(trained, micro_batch):
    found = []
    for batch_size in (8, 3, 1):
        figures, images, folder = evaluated(trained, batch_size=batch_size, micro_batch=micro_batch)
        found.append((figures, images))
        shutil.rmtree(folder)
    assert found[0] == found[1] == found[2]


def test_without_one_it_changes_no_more_than_rounding(trained):
    found = []
    for batch_size in (8, 3, 1):
        figures, _, folder = evaluated(trained, batch_size=batch_size)
        found.append(figures)
        shutil.rmtree(folder)
    for other in found[1:]:
        assert found[0]["diversity"] == pytest.approx(other["diversity"], abs=1e-3)
        for key in ("miou", "pixel_accuracy"):
            assert found[0]["mask_agreement"][key] == pytest.approx(other["mask_agreement"][key], abs=1e-3)


def test_bad_batches_are_refused_before_sampling(trained):
    for batch_size, micro_batch in ((0, 0), (4, -1)):
        with pytest.raises(ValueError, match="batch_size must be at least 1 and micro_batch at least 0"):
            evaluate.evaluate_run(trained, command="test", batch_size=batch_size, micro_batch=micro_batch)


def test_a_parser_of_other_classes_is_refused(trained, tmp_path):
    parser.save_parser(parser.FaceParser(7, 4), tmp_path / "seven.safetensors", {"num_classes": 7, "width": 4})
    with pytest.raises(ValueError, match=r"seven.safetensors: tells 7 classes apart, the masks have 19"):
        evaluate.evaluate_run(trained, command="test", parser=str(tmp_path / "seven.safetensors"))


def agreement_of_each(folder, count):
    """mIoU of every image by itself, by the shipped parser."""
    judge, _ = parser.load_parser(parser.SHIPPED)
    found = []
    for index in range(count):
        image = read_image(folder / f"{index:05d}.png").unsqueeze(0).float() / 127.5 - 1
        agreement = MaskAgreement(CELEBAMASK19.classes)
        agreement.update(judge.parse(image), DrawnFaces(count, size=64, start=parser.HELD_OUT)[index][1].unsqueeze(0))
        found.append(agreement.result()["miou"])
    return found


def test_the_report_stands_alone(trained):
    result = evaluate.evaluate_run(trained, command="<script>")
    folder = next(trained.glob("evaluation/*/record.json")).parent
    of_each = agreement_of_each(folder, 4)
    page = (trained / "report.html").read_text()
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(?!data:)(https?:|/|\.)", page), "it loads nothing"
    assert page.count("data:image/png;base64,") == 3 * 4 + 4 * 6  # one mask a group of the four, diversity rows
    assert f"best {max(of_each):.3f}" in page and f"worst {min(of_each):.3f}" in page
    assert f"{result['mask_agreement']['miou']:.3f}" in page and "second-hand" in page
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "polyline" in page


def test_evaluation_repeats_and_takes_other_settings(trained):
    first = json.loads((trained / "result.json").read_text())
    again = evaluate.evaluate_run(trained, command="again")
    assert again["mask_agreement"] == first["mask_agreement"] and again["diversity"] == first["diversity"]
    other = evaluate.evaluate_run(trained, command="other", masks=3, steps=1, solver="euler")
    assert other["sampling"]["solver"] == "euler" and other["masks"] == 3
    none = evaluate.evaluate_run(trained, command="none", parser="none")
    assert "mask_agreement" not in none and "not measured" in evaluate.summary(none)
    with pytest.raises(FileNotFoundError, match="nothing.safetensors: no such parser"):
        evaluate.evaluate_run(trained, command="", parser="nothing.safetensors")
    evaluate.evaluate_run(trained, command=first["command"])


def test_the_shipped_parser_finds_every_class_on_unseen_faces():
    judge, card = parser.load_parser(parser.SHIPPED)
    faces = DrawnFaces(96, size=128, start=parser.HELD_OUT + 5000)
    score = parser.evaluate_parser(judge, faces)
    assert score["miou"] >= 0.80 and min(score["iou"].values()) > 0.05 and len(score["iou"]) == 19
    assert card["held_out"]["miou"] >= 0.85 and min(card["held_out"]["iou"].values()) > 0.2
    assert abs(score["miou"] - card["held_out"]["miou"]) < 0.06


def test_shipped_assets_are_small_and_carry_their_command():
    for file in (ROOT / "recipes" / "sisma" / "assets").rglob("*.safetensors"):
        assert file.stat().st_size <= 1_500_000, file
    card = json.loads((ROOT / "recipes" / "sisma" / "assets" / "drawn-autoencoder" / "card.json").read_text())
    assert card["command"].startswith("python -m recipes.sisma.autoencoder")
    assert parser.load_parser(parser.SHIPPED)[1]["command"].startswith("python -m recipes.sisma.parser")


def test_presets_are_as_printed():
    paper, stable = preset("paper"), preset("stable")
    assert (paper.model, paper.batch_size, paper.lr, paper.weight_decay) == ("sisma-xl", 8, 4e-3, 0.0)
    assert (paper.ema_decay, paper.steps, paper.flip, paper.image_size) == (0.9999, 150_000, False, 256)
    assert (paper.solver, paper.solver_steps, paper.model_args) == ("euler", 200, {})
    assert stable.lr == 1e-4
    for name, make in PRESETS.items():
        assert make().preset == name
        make().with_steps(make().steps or budget.MOST).train_settings()
    assert preset("faces").train_settings().lr_decay_steps == preset("faces").steps


def test_config_survives_the_run_folder(trained):
    config = load_config(trained)
    assert isinstance(config, Config) and config.steps == 6 and config.model_args["depth"] == 1


def test_a_run_records_the_precision_it_took_and_refuses_the_other(trained):
    taken = load_config(trained).precision
    assert preset("quick").precision == preset("faces").precision == "auto" and taken in ("no", "bf16")
    assert verify_checkpoint(checkpoints(trained / "checkpoints")[-1])["record"]["precision"] == taken
    other = {"no": "bf16", "bf16": "no"}[taken]
    with pytest.raises(CheckpointError, match=rf"another configuration \(precision: '{taken}' there, '{other}' now"):
        train.main(words(trained.parent, f"precision={other}", "resume=auto", "model_args.mask_dropout=0.1"))


def test_train_parser_on_drawn_faces(tmp_path, capsys):
    out = tmp_path / "parser.safetensors"
    parser.main([f"out={out}", "steps=2", "batch_size=2", "image_size=32", "width=8", "held_out=4", "faces=8"])
    _, card = parser.load_parser(out)
    assert card["width"] == 8 and "miou" in card["held_out"] and card["precision"] in ("no", "bf16")
    assert f"precision {card['precision']}" in capsys.readouterr().err
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="broken.safetensors: is no safetensors file"):
        parser.load_parser(tmp_path / "broken.safetensors")
    write_weights(tmp_path / "other.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="other.safetensors: is not a parser"):
        parser.load_parser(tmp_path / "other.safetensors")
    write_weights(tmp_path / "cut.safetensors", {"a": torch.zeros(1)}, {"card": json.dumps(card)})
    with pytest.raises(ValueError, match="cut.safetensors: .* do not fit"):
        parser.load_parser(tmp_path / "cut.safetensors")


def test_a_training_whose_loss_is_no_number_saves_nothing(tmp_path):
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan: lower lr"):
        parser.main(
            [f"out={tmp_path / 'p.safetensors'}", "steps=3", "lr=1e30", "batch_size=2", "image_size=32", "width=8"]
            + ["held_out=4", "faces=8"]
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "message"),
    [("image_size=40", "must be a multiple of 16, got 40"), ("steps=0", "must be at least 1"), ("data=no", "no such")]
    + [("precision=fp16", "precision must be 'auto', 'no' .float32. or 'bf16', got 'fp16'")],
)
def test_a_parser_that_cannot_be_trained_is_refused_before_training(tmp_path, word, message):
    with pytest.raises((ValueError, OSError), match=message):
        parser.main([f"out={tmp_path / 'new' / 'parser.safetensors'}", "held_out=1", word])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("factor", [4, 8])
def test_train_autoencoder_on_drawn_faces(tmp_path, factor):
    from recipes.sisma import autoencoder
    from ssmgen import build

    autoencoder.main(
        [f"out={tmp_path / 'ae'}", "steps=2", "batch_size=2", "image_size=32", "width=8", "held_out=16", "faces=8"]
        + [f"factor={factor}"]
    )
    assert build("autoencoder-tiny", source=str(tmp_path / "ae")).factor == factor
    assert json.loads((tmp_path / "ae" / "card.json").read_text())["precision"] in ("no", "bf16")


@pytest.mark.parametrize("began", ["no", "bf16"])
def test_an_autoencoder_goes_on_in_the_precision_it_began_with(tmp_path, began):
    from recipes.sisma import autoencoder

    settings = autoencoder.Settings(out=str(tmp_path / "ae"), precision=began)
    network = torch.nn.Linear(1, 1)
    autoencoder._checkpoint(network, torch.optim.AdamW(network.parameters()), settings, 1000)
    asked = dataclasses.replace(settings, precision="auto")
    assert autoencoder._precision(asked) == (began, "as step-00001000 was made")
    assert autoencoder._precision(dataclasses.replace(settings, precision="no")) == ("no", "as asked")


def test_sheets_refuse_ragged_rows(tmp_path):
    image = CELEBAMASK19.colorize(torch.zeros(8, 8, dtype=torch.uint8))
    save_sheet(tmp_path / "a.png", [[image, image]], ["x", "y"])
    assert read_image(tmp_path / "a.png").shape[0] == 3
    with pytest.raises(ValueError, match="2 headings"):
        save_sheet(tmp_path / "a.png", [[image]], ["x", "y"])


def test_a_commit_is_marked_where_code_differs_from_it(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    (tmp_path / "recipes/sisma").mkdir(parents=True)
    code, page = tmp_path / "recipes/sisma/code.py", tmp_path / "README.md"
    code.write_text("1")
    page.write_text("one")
    git("init")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "first")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "recipes/sisma/provenance.py"))
    clean = provenance.provenance("command", 0)["commit"]
    assert re.fullmatch("[0-9a-f]{12}", clean)
    page.write_text("two")
    assert provenance.provenance("command", 0)["commit"] == clean
    code.write_text("2")
    assert provenance.provenance("command", 0)["commit"] == f"{clean}-dirty"


def test_a_run_continued_for_fewer_steps_keeps_its_cosine(tmp_path):
    """Whoever wants to end sooner names steps= alone; a cosine that follows them would be another schedule."""
    save_config(preset("quick").with_steps(1300), tmp_path / "config.yaml")
    asked = dataclasses.replace(preset("quick"), run=str(tmp_path), resume="auto", steps=800)
    assert budget.continued(asked).lr_decay_steps == 1300
    assert budget.continued(dataclasses.replace(asked, steps=2000)).lr_decay_steps == 2000
    assert budget.continued(dataclasses.replace(asked, lr_decay_steps=0)).lr_decay_steps == 0
    assert budget.continued(dataclasses.replace(asked, resume="no")).lr_decay_steps == 800


def test_open_steps_need_a_test_split_for_their_sheets(tmp_path):
    """``quick`` leaves sample_every to the number of steps, which is not known when the data are checked."""
    image, mask = draw_face(0, size=32)
    hashes = write_pair(tmp_path, "a", image, mask)
    write_records(tmp_path, CELEBAMASK19, {"train": ["a"], "test": []}, hashes, {})
    with pytest.raises(ValueError, match="there is no test pair"):
        train.main(["quick", f"data={tmp_path}", "evaluate=false", f"run={tmp_path / 'run'}"])


def test_a_run_is_not_continued_for_fewer_steps_than_it_has(trained):
    words = [
        f"run={trained}",
        f"cache={trained.parent / 'cache'}",
        *SMALL,
        "model_args.mask_dropout=0.1",
        "resume=auto",
    ]
    before = (trained / "config.yaml").read_text()
    with pytest.raises(ValueError, match="is at step 6 already, beyond steps=4: give steps=6 or more"):
        train.main([*words, "steps=4", "evaluate=false"])
    assert (trained / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [(["run=FILE"], "FILE: is a file; run= names a folder"), (["run=new", "resume=yes"], "resume=yes: is no folder")],
)
def test_folders_that_are_none_are_explained(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    with pytest.raises(OSError, match=message):
        train.main([*SMALL, "steps=1", "evaluate=false", *words])


def test_a_card_says_drawn_of_a_folder_prepared_from_drawn_faces(tmp_path):
    config = preset("faces")
    assert export.is_drawn(preset("quick")) and not export.is_drawn(config)
    prepare.main(["source=drawn", f"target={tmp_path / 'drawn'}", "count=3", "size=32"])
    assert export.is_drawn(dataclasses.replace(config, data=str(tmp_path / "drawn")))
    image, mask = draw_face(0, size=32)
    (tmp_path / "own").mkdir()
    hashes = write_pair(tmp_path / "own", "a", image, mask)
    write_records(tmp_path / "own", CELEBAMASK19, {"train": ["a"], "test": []}, hashes, {"layout": "folder"})
    assert not export.is_drawn(dataclasses.replace(config, data=str(tmp_path / "own")))
