"""Training as its users run it: small, but every part real."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import yaml

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")

from recipe_runs import SMALL, words

from recipes.sisma import evaluate, export, parser, prepare, provenance, train
from recipes.sisma.arguments import UsageError, flat
from recipes.sisma.pairs import prepared_pairs
from recipes.sisma.presets import PRESETS, Config, preset
from recipes.sisma.runs import load_config, load_labels, load_run
from ssmgen import MaskToImage
from ssmgen.data import CELEBAMASK19, LabelSet
from ssmgen.data.drawn_faces import DrawnFaces, draw_face
from ssmgen.data.folder import write_pair, write_records
from ssmgen.training import checkpoints, verify_checkpoint


def test_a_run_folder_holds_what_is_promised(trained):
    assert {p.name for p in trained.iterdir()} == {
        *("config.yaml", "labels.json", "source.json", "log.jsonl", "samples", "checkpoints", "evaluation"),
        *("tensorboard", "result.json", "result.png", "report.html"),
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


def test_a_run_records_the_classes_of_its_data(tmp_path, four_pairs):
    labels = LabelSet("halves", tuple(f"part {i}" for i in range(20)), ((0, 9, 0),) * 20)
    data = four_pairs({"train": ["p0"], "test": ["p1", "p2"]}, labels)
    again = words(tmp_path, f"data={data}", "image_size=32", "steps=1", "batch_size=2", "sample_every=1", "parser=none")
    train.main(["quick", *again])
    pipe, _ = load_run(tmp_path / "run")
    assert pipe.recipe.labels == labels and pipe.model.num_classes == 20
    (tmp_path / "run" / "labels.json").write_text('{"name": "halves"}')
    with pytest.raises(ValueError, match="labels.json: is not the record of a label set"):
        load_run(tmp_path / "run")
    (tmp_path / "run" / "labels.json").unlink()
    with pytest.raises(FileNotFoundError, match="labels.json: not found, so the classes of the run's masks are not kn"):
        load_run(tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "recipe: recipes.sisma\n" in config
    (tmp_path / "run" / "config.yaml").write_text(config.replace("recipe: recipes.sisma\n", ""))
    assert load_labels(tmp_path / "run") == CELEBAMASK19, "as in runs that began before classes were recorded"


def test_a_parser_of_other_classes_is_rejected_before_training(tmp_path, four_pairs):
    data = four_pairs({"train": ["p0"], "test": ["p1", "p2"]}, LabelSet("two", ("a", "b"), ((0, 9, 0),) * 2))
    with pytest.raises(ValueError, match="drawn-parser.safetensors: predicts 19 classes, the masks have 2"):
        train.main(["quick", *words(tmp_path, f"data={data}", "image_size=32", "steps=1")])
    assert not (tmp_path / "run").exists()


def test_open_steps_need_a_test_split_for_their_sheets(tmp_path):
    """``quick`` leaves sample_every to the number of steps, which is not known when the data are checked."""
    image, mask = draw_face(0, size=32)
    hashes = write_pair(tmp_path, "a", image, mask)
    write_records(tmp_path, CELEBAMASK19, {"train": ["a"], "test": []}, hashes, {})
    with pytest.raises(ValueError, match="there is no test pair"):
        train.main(["quick", f"data={tmp_path}", "evaluate=false", f"run={tmp_path / 'run'}"])


def test_a_solver_whose_package_is_missing_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"ssmgen\[adaptive\]"):
        train.main(words(tmp_path, "steps=1", "solver=dopri5", "sample_every=0"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["quik"], "unknown preset 'quik'.*'quick'"),
        (["my-quick"], "unknown preset 'my-quick'"),
        (["quick", "step=3"], "unknown key 'step'.*'steps'"),
        (["quick", "steps"], "'steps' is not key=value"),
        (["quick", "steps=many"], "steps"),
        (["quick", "preset=paper"], "name the preset as the first word"),
        (["quick", "recipe=recipes.clothes"], "run python -m recipes.clothes.train instead"),
        (["faces"], "needs data=FOLDER"),
        (["quick", "steps=-1"], "steps must not be negative, got -1"),
        (["paper", "steps=0"], "steps must be positive, or 0 with minutes= to train for; got minutes=0"),
        (["quick", "minutes=-1"], "got minutes=-1"),
        (["quick", "seed=-1"], "a seed is a whole number from 0 to .* got -1"),
        (["quick", "model=sisma-xxl"], "unknown name 'sisma-xxl'"),
        (["quick", "model_args.dept=3"], "takes no 'dept'.*'depth'"),
        (["quick", "model_args.num_classes=3"], "follows from the autoencoder and the labels"),
        (["quick", "autoencoder_source=./nowhere"], "nowhere: no such folder"),
        (["quick", "image_size=60"], "multiple of 8 \\(autoencoder"),
        (["quick", "image_size=big"], "image_size=big: expected a side such as 128, or height x width such as 192x96"),
        (["quick", "image_size=64x0"], "image_size=64x0: expected a side"),
        (["quick", "image_size=64x32"], "image_size=64x32: drawn faces are square"),
        (["quick", "steps=3000", "lr_decay_steps=1300"], "lr_decay_steps=1300 ends before steps=3000"),
        (["quick", "solver=flow-matching"], "'flow-matching' is of kind objective, not solver. All solvers: ab2"),
        (["quick", "solver_steps=0"], "sampling steps must be a positive whole number, got 0"),
        (["quick", "shift=0"], "shift must be a number above 0, got 0"),
        (
            ["quick", "guidance_start=2"],
            r"guidance_start must be a time in \[0, 1\], 0 noise and 1 data, .* got 2",
        ),
        (["quick", "guidance_scale=-3"], "guidance_scale must be a number at least 0, .* got -3"),
        (["quick", "balance=5"], r"balance is a share of the masks, in \[0, 1\], got 5"),
        (["quick", "evaluate_masks=1"], "evaluate_masks must be at least 2"),
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


@pytest.mark.parametrize(
    ("words", "message"),
    [(["run=FILE"], "FILE: is a file; run= names a folder"), (["run=new", "resume=yes"], "resume=yes: not found")],
)
def test_folders_that_are_none_are_explained(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    with pytest.raises(OSError, match=message):
        train.main([*SMALL, "steps=1", "evaluate=false", *words])


def test_printed_commands_can_be_pasted(tmp_path, capsys, monkeypatch):
    words = ["quick", "run=my runs/a;b", "model_args={depth: 1}", "resume=no"]
    expected = ["python", "-m", "recipes.sisma.train", *words[:3], "resume=auto"]
    assert shlex.split(train._continue(words, "recipes.sisma")) == expected
    config = dataclasses.replace(preset("quick"), t_sampling="a b")
    assert shlex.split(export.training_command(config))[3:] == ["quick", "t_sampling=a b"]
    target = tmp_path / "my faces"
    prepare.main(["source=drawn", f"target={target}", "count=24", "size=32"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: "))
    assert f"data={target}" in shlex.split(line)
    with pytest.raises(FileNotFoundError, match="prepare source=DIR 'target=.*no folder'"):
        prepared_pairs(Config(data=str(tmp_path / "no folder")), "train")
    with pytest.raises(FileNotFoundError, match="recipes.sisma.parser 'out=.*my parser'"):
        parser.load_parser(tmp_path / "my parser")
    asked = []
    monkeypatch.setattr(evaluate, "evaluate_run", lambda *_, command, **__: asked.append(command))
    evaluate.main(["run=my run", "masks=2"])
    assert shlex.split(asked[0]) == ["python", "-m", "recipes.sisma.evaluate", "run=my run", "masks=2"]


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


def test_presets_are_as_printed():
    paper, stable = preset("paper"), preset("stable")
    own = paper.train
    assert (paper.model, own.batch_size, own.lr, own.weight_decay) == ("sisma-xl", 8, 4e-3, 0.0)
    assert (own.ema_decay, own.steps, paper.flip, paper.image_size) == (0.9999, 150_000, False, 256)
    assert (paper.sampling.solver, paper.sampling.steps, paper.model_args) == ("euler", 200, {})
    assert stable.train == dataclasses.replace(own, lr=1e-4)
    for name, make in PRESETS.items():
        assert make().preset == name
        make().with_steps(make().train.steps or train.MOST)
    assert preset("faces").with_steps(4000).train.lr_decay_steps == preset("faces").train.steps == 4000


def test_a_run_from_before_its_settings_were_nested_loads(tmp_path):
    config = dataclasses.replace(preset("faces").with_steps(7), data="x")
    plain = {key: value for key, value in flat(config).items() if key != "objective"}  # there was one
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    assert {"steps", "solver_steps", "lr", "guidance_scale"} <= plain.keys() and load_config(tmp_path) == config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain | {"learning_rate": 1}))
    with pytest.raises(UsageError, match="config.yaml: .*learning_rate"):
        load_config(tmp_path)


def test_config_survives_the_run_folder(trained):
    config = load_config(trained)
    assert isinstance(config, Config) and config.train.steps == 6 and config.model_args["depth"] == 1


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
