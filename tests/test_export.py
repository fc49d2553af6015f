"""Runs are exported with a card, loaded again, and fetched from the hub."""

import dataclasses
import fnmatch
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")

import recipe_runs

from recipes.sisma import export, prepare, train
from recipes.sisma.arguments import UsageError
from recipes.sisma.presets import preset
from recipes.sisma.runs import find_run, load_config, load_run, load_source
from ssmgen import MaskToImage
from ssmgen.data import CELEBAMASK19, LabelSet
from ssmgen.data.drawn_faces import draw_face
from ssmgen.data.folder import write_pair, write_records
from ssmgen.sampling import Sampling
from ssmgen.training import CheckpointError, checkpoints
from ssmgen.training.fsck import mend_run


def test_a_run_is_not_loaded_with_another_autoencoder(trained, tmp_path):

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("autoencoder: auto\n", "autoencoder: identity\n"))
    with pytest.raises(CheckpointError, match="trained on latents of"):
        load_run(run)


def test_a_run_with_a_damaged_newest_checkpoint_is_not_loaded_from_an_older_one(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    newest = checkpoints(run / "checkpoints")[-1]
    shutil.copytree(newest, newest.with_name("step-00000099"))
    with pytest.raises(CheckpointError, match=r"step-00000099/state.json: is of step 6(?s:.)*ssmgen fsck .*run"):
        load_run(run)
    mend_run(run)
    assert load_run(run)[1].step == 6


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
    assert {p.name for p in folder.iterdir()} == {"config.yaml", "labels.json", "source.json", "checkpoints"}
    assert load_run(folder)[1].weights == load_run(trained)[1].weights
    assert find_run("someone/faces", tmp_path) == Path("someone/faces")  # a mistyped folder asks no network
    with pytest.raises(FileNotFoundError, match="no/one: .*could not be fetched from the hub: no network"):
        find_run("hf://no/one", tmp_path)
    with pytest.raises(ValueError, match="expected hf://OWNER/NAME"):
        find_run("hf://faces", tmp_path)


def test_an_exported_run_gives_the_same_images(trained, tmp_path, capsys):
    export.main([f"run={trained}", f"out={tmp_path / 'exported'}"])
    assert "MaskToImage.from_pretrained" in capsys.readouterr().out
    pipe = MaskToImage.from_pretrained(tmp_path / "exported")
    mask = draw_face(3, 64)[1]
    theirs = load_run(trained)[0](mask, seed=7, output_type="uint8")
    ours = pipe(mask, seed=7, output_type="pt", batch_size=1)
    assert torch.equal((ours * 255).round().to(torch.uint8), theirs)
    card = (tmp_path / "exported" / "README.md").read_text()
    result = json.loads((trained / "result.json").read_text())
    assert f"| {result['mask_agreement']['miou']:.3f} |" in card and result["commit"] in card
    assert "license: apache-2.0" in card and "not photographs" in card and str(trained.parent) not in card
    assert "shuffled masks" in card and 'from_pretrained("OWNER/NAME")' in card
    with pytest.raises(UsageError, match="already exists"):
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


def test_the_cards_commands_name_guidance_by_condition(trained):
    config = dataclasses.replace(load_config(trained), sampling=Sampling(guidance_scale={"mask": 2, "words": 3}))
    assert {"guidance_scale.mask=2", "guidance_scale.words=3"} <= set(export.training_command(config).split())
    assert export.sampling_words({"steps": 3, "guidance_start": {"mask": 0.2}}) == [
        "steps=3",
        "guidance_start.mask=0.2",
    ]


def test_a_card_says_drawn_of_a_folder_prepared_from_drawn_faces(tmp_path):
    def origin(config):
        return export.origin_of(load_source(tmp_path / "old", config), CELEBAMASK19)

    config = preset("faces")
    assert origin(preset("quick")) == "drawn" and origin(config) == "CelebAMask-HQ"
    prepare.main(["source=drawn", f"target={tmp_path / 'drawn'}", "count=3", "size=32"])
    assert origin(dataclasses.replace(config, data=str(tmp_path / "drawn"))) == "drawn"
    image, mask = draw_face(0, size=32)
    (tmp_path / "own").mkdir()
    hashes = write_pair(tmp_path / "own", "a", image, mask)
    write_records(tmp_path / "own", CELEBAMASK19, {"train": ["a"], "test": []}, hashes, {"layout": "folder"})
    assert origin(dataclasses.replace(config, data=str(tmp_path / "own"))) == "CelebAMask-HQ"


@pytest.mark.parametrize(
    ("source", "origin"),
    [
        ({"layout": "official", "label_order": "celebamask19", "merged": {"all": ["skin"]}}, "CelebAMask-HQ"),
        ({"layout": "folder", "label_order": "bisenet19", "merged": {"all": ["skin"]}}, "CelebAMask-HQ"),
        ({"layout": "folder", "label_order": "names", "merged": {"all": [*CELEBAMASK19.classes]}}, "CelebAMask-HQ"),
        ({"layout": "folder", "label_order": "names", "merged": {"all": ["road", "sky"]}}, "own"),
        ({"layout": "folder", "label_order": "names"}, "own"),
        ({"layout": "drawn"}, "drawn"),
        ({"layout": "folder"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_the_origin_of_merged_classes_is_that_of_their_source(source, origin):
    assert export.origin_of(source, LabelSet("few", ("background", "face"), ((0, 0, 0), (9, 9, 9)))) == origin


@pytest.mark.parametrize("content", ["[]", "{", '{"merged": ["skin"]}', '{"merged": {"all": 3}}'])
def test_a_damaged_record_of_the_source_is_named(tmp_path, content):
    (tmp_path / "source.json").write_text(content)
    with pytest.raises(ValueError, match="source.json: "):
        load_source(tmp_path, preset("faces"))


def test_the_terms_of_merged_faces_outlive_their_data(tmp_path):
    """Faces merged into two classes, whose folder is deleted before the export, and whose record is lost after it."""
    prepare.main(["source=drawn", f"target={tmp_path / 'official'}", "layout=official", "count=6", "size=32"])
    (tmp_path / "few.txt").write_text(f"background: background\nface: {', '.join(CELEBAMASK19.classes[1:])}\n")
    words = [f"source={tmp_path / 'official'}", f"target={tmp_path / 'data'}", "split=by-name", "test_share=0.5"]
    prepare.main([*words, f"merge={tmp_path / 'few.txt'}"])
    small = recipe_runs.words(tmp_path, f"data={tmp_path / 'data'}", "image_size=32", "steps=1", "batch_size=2")
    train.main(["quick", *small, "evaluate=false"])
    shutil.rmtree(tmp_path / "data")
    for name, expected in (("known", "celebamask-hq-non-commercial"), ("lost", "Unknown: neither the run nor a")):
        export.main([f"run={tmp_path / 'run'}", f"out={tmp_path / name}"])
        assert expected in (tmp_path / name / "README.md").read_text()
        (tmp_path / "run" / "source.json").unlink(missing_ok=True)


def test_a_run_of_another_recipe_is_not_exported_as_ones_own(trained, tmp_path):
    """Presets of two recipes may have one name."""
    run = shutil.copytree(trained, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("recipe: recipes.sisma\n", "recipe: recipes.streets\n"))
    with pytest.raises(UsageError, match="is a run of recipes.streets: export it with python -m recipes.streets.exp"):
        export.main([f"run={run}", f"out={tmp_path / 'out'}"])
    with pytest.raises(UsageError, match="is a run of recipes.sisma: export it with python -m recipes.sisma.export"):
        export.main([f"run={trained}", f"out={tmp_path / 'out'}"], recipe="recipes.streets")
    export.main([f"run={run}", f"out={tmp_path / 'out'}"], recipe="recipes.streets")


def test_an_export_looks_for_space_first(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("ssmgen.atomic.free_space", lambda target: 1000)
    with pytest.raises(OSError, match=r"one: needs .* MB, but only .* are free on its disk"):
        export.main([f"run={trained}", f"out={tmp_path / 'new/one'}"])
    assert not list((tmp_path / "new").iterdir())
    monkeypatch.undo()
    export.main([f"run={trained}", f"out={tmp_path / 'one'}"])
    written = sum(file.stat().st_size for file in (tmp_path / "one").rglob("*.safetensors"))
    pipe, _ = load_run(trained)
    assert export.weights_size(pipe, torch.float32) == pytest.approx(written, rel=0.02)
    assert export.weights_size(pipe, torch.bfloat16) < 0.9 * written


def test_the_cards_command_names_the_settings_of_a_layer_one_by_one(trained):
    layer = {"name": "region-attention", "mirrored": [[4, 5], [6, 7]]}
    config = load_config(trained)
    config.model_args |= {"cross": {"mask": layer}}
    command = export.training_command(config)
    assert "model_args.cross.mask.name=region-attention 'model_args.cross.mask.mirrored=[[4, 5], [6, 7]]'" in command
    again = train.parse(shlex.split(command)[3:])
    assert again.model_args == config.model_args
    config.model_args["cross"] = {}
    assert "'model_args.cross={}'" in export.training_command(config), "no cross layer is a setting too"
