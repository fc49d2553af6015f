"""The experiments run, go on where they stopped, and compare models of equal size."""

import json
import re

import pytest
import torch

pytest.importorskip("accelerate", reason="the experiments train, which needs ssmgen[train]")

from benchmarks.fidelity import __main__ as fidelity
from benchmarks.fidelity import defaults, experiment, report, step_time
from benchmarks.fidelity.experiment import Experiment
from benchmarks.fidelity.experiments import EXPERIMENTS, variant
from recipes.sisma import train
from recipes.sisma.pairs import load_autoencoder
from recipes.sisma.runs import new_model

TINY = (
    *("drawn_count=8", "image_size=32", "evaluate_masks=2", "solver_steps=2", "batch_size=2", "guidance_scale=1"),
    *("model_args.dim=24", "model_args.depth=1"),
)


FORMER = {"mask_input": "add", "mask_dropout": 0.1}
EQUAL = [
    *(("mask-entry", name, "cross-mamba") for name in EXPERIMENTS["mask-entry"].variants),
    ("design", "sisma-attn", "quick"),
    ("design", "dit", "quick"),
    ("faces", "no-gates-no-cross", "no-gates"),
]


def parameters(name, variant):
    """Their number, of a variant of an experiment."""
    experiment = EXPERIMENTS[name]
    config = train.parse(experiment.training(experiment.variants[variant]))
    config.autoencoder_source = "drawn"  # real faces' own is not at hand
    autoencoder = load_autoencoder(config)
    with torch.device("meta"):
        return sum(p.numel() for p in new_model(config, autoencoder).parameters())


def test_experiments_sample_as_the_presets_did_when_they_began():
    used = {name: train.parse(e.training()).sampling.shared_noise for name, e in EXPERIMENTS.items()}
    assert [name for name, shared in used.items() if shared] == ["simplest", "alike", "faces-128", "faces-256"]
    quick, faces = (train.parse(EXPERIMENTS[name].training()) for name in ("training-time", "faces"))
    assert quick.model == "sisma-mini" and quick.model_args == {**FORMER, "patch_size": 2}
    assert faces.model == "sisma-s" and faces.train.ema_decay == 0.998 and faces.mirrored_weighting == 0
    assert faces.autoencoder_source == "madebyollin/taesd"
    small = {"dim": 128, "depth": 4, "gates": True, "ffn_ratio": 4}  # the last two are sisma-s's own
    assert faces.model_args == {**FORMER, **small, "patch_size": 1}


@pytest.mark.parametrize(("name", "chosen", "other"), EQUAL)
def test_variants_have_equal_parameters(name, chosen, other):
    assert parameters(name, chosen) == pytest.approx(parameters(name, other), rel=0.002)


@pytest.mark.parametrize("name", ["ways-in", "ways-in-coarse", "ways-in-large"])
def test_ways_in_have_equal_parameters_within_two_percent(name):
    counts = {chosen: parameters(name, chosen) for chosen in EXPERIMENTS[name].variants}
    assert counts == pytest.approx(dict.fromkeys(counts, next(iter(counts.values()))), rel=0.02)


@pytest.mark.parametrize("name", [name for name, e in EXPERIMENTS.items() if not e.sampled])
def test_every_variant_can_be_built(name):
    for words in EXPERIMENTS[name].variants.values():
        config = train.parse(EXPERIMENTS[name].training(words))
        config.autoencoder_source = "drawn"  # real faces' own is not at hand
        autoencoder = load_autoencoder(config)
        train.check_config(config, new_model(config, autoencoder), autoencoder)


def test_variants_of_equal_time_take_other_steps():
    experiment = Experiment("?", {"a": (), "b": ()}, stages=(100, 300), paces={"b": 1.5})
    assert experiment.stages_of("a") == (100, 300) and experiment.stages_of("b") == (150, 450)


def test_equal_time_needs_measured_step_times(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["fidelity", "ways-in-time", "--variants", "added", "spade"])
    (tmp_path / "fidelity").mkdir()
    (tmp_path / "fidelity/step-time-ways-in.json").write_text('{"ratios": {"added": 1.0, "u=image": 1.25}}')
    assert EXPERIMENTS["ways-in-time"].stages_of("u=image") == (80, 160, 280, 1040)
    with pytest.raises(SystemExit):
        fidelity.main()
    said = capsys.readouterr().err
    assert "the steps of spade follow from step times" in said and "benchmarks.fidelity.step_time ways-in" in said


@pytest.mark.filterwarnings("ignore:width 24 is under twice")
def test_one_run_is_sampled_in_each_way(tmp_path, monkeypatch):
    ways = {"coarse": ("solver=euler", "steps=1"), "fine": ("solver=euler", "steps=4")}
    tiny = Experiment("?", ways, TINY, stages=(2,), sampled=True)
    coarse = fidelity.run_variant(tiny, "coarse", 1, tmp_path / "runs" / "e" / "coarse-seed1", tiny.stages)
    monkeypatch.setattr(train, "main", lambda argv: pytest.fail("it was trained before"))
    fine = fidelity.run_variant(tiny, "fine", 1, tmp_path / "runs" / "e" / "fine-seed1", tiny.stages)
    assert coarse["sampling"]["steps"] == 1 and fine["sampling"]["steps"] == 4
    assert coarse["words"].endswith("solver=euler steps=1") and coarse["seed"] == 1
    assert 0 <= fine["stages"][2]["mask_agreement"]["miou"] <= 1


@pytest.mark.filterwarnings("ignore:width 24 is under twice")
def test_a_step_is_timed_on_the_shapes_it_is_trained_on():
    step_time.whole_step(["quick", *TINY, "precision=auto"])()


@pytest.mark.parametrize("second", ["none", "concat", "spade", "cross-attention"])
@pytest.mark.filterwarnings("ignore:width 24 is under twice")
def test_a_variant_is_trained_and_measured_at_every_stage(tmp_path, monkeypatch, second):
    words = {
        "x": (*variant(second, 2.0, "add"), *(["model_args.dim=32"] if second in ("spade", "cross-attention") else []))
    }
    tiny = Experiment("?", words, TINY, stages=(2, 4))
    result = fidelity.run_variant(tiny, "x", 1, tmp_path / "runs" / "e" / "x", tiny.stages)
    assert list(result["stages"]) == [2, 4] and result["seed"] == 1 and result["commit"]
    assert all(0 <= stage["mask_agreement"]["miou"] <= 1 for stage in result["stages"].values())
    assert all("brow_distance" in stage["consistency"]["ratio"] for stage in result["stages"].values())
    monkeypatch.setattr(train, "main", lambda argv: pytest.fail("it was done before"))
    assert fidelity.run_variant(tiny, "x", 1, tmp_path / "runs" / "e" / "x", tiny.stages) == result


def test_what_was_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    called = []

    def measure(experiment, name, seed, folder, stages, *_):
        called.append((name, seed, stages))
        return {"stages": dict.fromkeys(map(str, stages), {})}

    def run(*more):
        monkeypatch.setattr("sys.argv", ["fidelity", "mask-entry", "--seeds", "0", "1", "--variants", "added", *more])
        fidelity.main()

    monkeypatch.setattr(fidelity, "FOLDER", tmp_path)
    monkeypatch.setattr(fidelity, "run_variant", measure)
    run("--stages", "1")
    run("--stages", "1")
    assert called == [("added", 0, (350,)), ("added", 1, (350,))]
    assert json.loads((tmp_path / "mask-entry/added-seed0.json").read_text()) == {"stages": {"350": {}}}
    called.clear()
    run()
    run("--stages", "1")
    assert called == [("added", 0, (350, 1050)), ("added", 1, (350, 1050))], "a run that was stopped early goes on"


def test_a_run_that_was_stopped_early_has_no_figures_of_the_end(tmp_path):
    whole = json.loads((report.FOLDER / "mask-entry/added-seed0.json").read_text())
    early = whole | {"stages": {"350": whole["stages"]["350"]}}
    for seed, result in enumerate((whole, early)):
        (tmp_path / f"added-seed{seed}.json").write_text(json.dumps(result))
    (tmp_path / "spade-seed0.json").write_text(json.dumps(early | {"variant": "spade"}))
    experiment = EXPERIMENTS["mask-entry"]
    columns = report._measured(experiment, report.read(tmp_path, experiment))
    assert columns["seeds"] == ["2, 1 to the end", "1, 0 to the end"]
    assert columns["mIoU, 350 steps"][0].endswith("± 0.000") and columns["mIoU, 1050 steps"][1] == "–"


def test_an_unknown_variant_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fidelity", "mask-entry", "--variants", "aded"])
    with pytest.raises(SystemExit):
        fidelity.main()
    assert "Did you mean 'added'" in capsys.readouterr().err


def test_the_page_is_what_the_results_render_to():
    assert (report.DOCS / "fidelity.md").read_text() == report.page(report.FOLDER), "run benchmarks.fidelity.report"


def test_the_finding_on_real_faces_is_what_its_table_says():
    found = report.read(report.FOLDER / "faces", EXPERIMENTS["faces"])
    without, beside = (report.stages(found[name][0])[-1] for name in ("no-gates-no-cross", "no-gates"))
    assert report._proxy(without)["frechet"]["value"] < report._proxy(beside)["frechet"]["value"]
    assert abs(without["mask_agreement"]["miou"] - beside["mask_agreement"]["miou"]) < 0.01
    said = "Without the cross layer agreement is level too, and the proxy distance is lower"
    assert said in EXPERIMENTS["faces"].finding


@pytest.mark.parametrize("name", defaults.PRESETS)
def test_every_setting_of_a_preset_says_what_it_stands_on(name):
    assert set(defaults.chosen(name)) <= set(defaults.STANDS_ON) <= set().union(*map(defaults.chosen, defaults.PRESETS))
    for setting in defaults.chosen(name):
        named = re.findall(r"`([a-z-]+)`", defaults.STANDS_ON[setting])
        assert set(named) <= {*EXPERIMENTS, "quick"}, f"{setting}: no such experiment"


def test_every_row_was_measured_at_a_commit():
    for file in report.FOLDER.rglob("*.json"):
        result = json.loads(file.read_text())
        assert result["commit"] and "dirty" not in result["commit"], f"{file}: measure with no file changed"


def test_a_row_is_mean_and_deviation_over_seeds(tmp_path):
    def write(seed, miou):
        stage = {
            "mask_agreement": {"miou": miou},
            "floor": {"miou": 0.2},
            "ceiling": {"miou": 0.9},
            "autoencoder_ceiling": {"miou": 0.8},
            "floor_to_ceiling": miou,
            "diversity": {"same_mask": 0.5},
        }
        result = {"variant": "added", "words": "w", "parameters": 1234, "seed": seed, "commit": "abc", "masks": 8}
        result |= {"stages": {"350": stage, "1050": stage}, "versions": {"torch": "2"}}
        result |= {"hardware": {"gpu": None, "processor": "P"}}
        (tmp_path / "mask-entry").mkdir(exist_ok=True)
        (tmp_path / f"mask-entry/added-seed{seed}.json").write_text(json.dumps(result))

    write(0, 0.5)
    assert "| added | 1,234 | 1 | 0.500 | 0.500 | 50% | 0.500 |" in report.page(tmp_path)
    write(1, 0.7)
    assert "| added | 1,234 | 2 | 0.600 ± 0.141 | 0.600 ± 0.141 | 60% | 0.500 ± 0.000 |" in report.page(tmp_path)
    (tmp_path / "mask-entry/else-seed0.json").write_text('{"variant": "else"}')
    with pytest.raises(ValueError, match="else-seed0.json: the experiment has no variant 'else'"):
        report.page(tmp_path)


def detailed_result(name, miou, small, iris):
    """A result of a variant of ways-in whose figures rise from stage to stage."""
    agreement = {"miou": miou, "iou": {"skin": 0.9, "l_eye": small, "r_eye": small + 0.2}}
    figures = {"iris_distance": 0.05, "brow_distance": 0.02, "hair_chroma_variance": 0.00012, "both_eyes": 0.75}
    ratio = {"iris_distance": iris, "brow_distance": 1.5, "hair_chroma_variance": 0.8}
    stage = {
        **{"mask_agreement": agreement, "floor": {"miou": 0.2}, "ceiling": {"miou": 0.9}, "floor_to_ceiling": miou},
        **{"autoencoder_ceiling": agreement, "diversity": {"same_mask": 0.5}},
        "consistency": {"generated": figures, "autoencoder": figures, "ratio": ratio},
    }
    found = {"variant": name, "words": "w", "parameters": 1, "seed": 0, "commit": "abc", "masks": 8}
    found |= {"versions": {"torch": "2"}, "hardware": {"gpu": None, "processor": "P"}}
    return found | {"stages": dict.fromkeys(["100", "1300", "200", "350"], stage)}


def test_an_experiment_in_detail_has_small_classes_and_consistency(tmp_path):
    for name in ("ways-in", "ways-in-time"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "added-seed0.json").write_text(json.dumps(detailed_result("added", 0.7, 0.4, 1.25)))
    page = report.page(tmp_path)
    assert "| added | 1 | 1 | 0.700 | 0.700 | 0.700 | 0.700 | 70% | 0.500 |" in page
    assert "| variant | small, 100 steps | small, 200 steps |" in page and "mIoU, time of 1300 steps" in page
    assert "| added | 0.500 | 0.500 | 0.500 | 0.500 |\n" in page
    assert "| eyes and consistency, 1300 steps | l_eye | r_eye |" in page and "350 steps | l_eye" not in page
    assert "| added | 0.400 | 0.600 | 0.750 | 1.25 | 1.50 | 0.80 |" in page
    early = detailed_result("u=image", 0.3, 0.2, 4.5)
    del early["stages"]["1300"]
    (tmp_path / "ways-in" / "u=image-seed0.json").write_text(json.dumps(early))
    both = report.page(tmp_path)
    assert "| u=image | 0.200 | 0.400 | 0.750 | 4.50 | 1.50 | 0.80 |" in both, "at the last stage that all have"
    assert "| eyes and consistency, 350 steps | l_eye |" in both and "eyes and consistency, 1300 steps | l_eye" in both
    assert "both eyes 0.750, iris 0.050, brows 0.020, hair chroma 0.00012" in page
    assert "| 100 / 200 / 350 / 1300 |" in page


def test_stages_of_several_commits_name_them_all():
    later = detailed_result("added", 0.7, 0.4, 1.25)
    later["stages"] = {"100": later["stages"]["100"] | {"commit": "first"}, "200": later["stages"]["200"]}
    assert "commit `abc`, `first`, seeds 0" in report._origin("ways-in", {"added": [later]})


def test_runs_of_other_lengths_say_their_steps(tmp_path):
    file = next(report.FOLDER.glob("mask-entry/*.json"))
    result = json.loads(file.read_text())
    result |= {"variant": "thrice", "stages": {"4000": result["stages"]["1050"]}}
    (tmp_path / "training-time").mkdir()
    (tmp_path / "training-time/thrice-seed0.json").write_text(json.dumps(result))
    miou = result["stages"]["4000"]["mask_agreement"]["miou"]
    assert f"| 1 | 4000 | {miou:.3f} |" in report.page(tmp_path)


def test_measured_times_are_a_column_with_their_own_origin(tmp_path):
    result = json.loads((report.FOLDER / "design/quick-seed0.json").read_text())
    (tmp_path / "design").mkdir()
    (tmp_path / "design/quick-seed0.json").write_text(json.dumps(result))
    times = {"ratios": {"quick": 1.256}, "command": "how", "commit": "when", "hardware": {"processor": "where"}}
    (tmp_path / "step-time-design.json").write_text(json.dumps(times))
    page = report.page(tmp_path)
    assert "diversity | time |" in page and "| 1.26 |" in page
    assert page.endswith("forward and backward, without the optimizer: `how`, commit `when`, where.\n")


def test_what_was_stopped_is_no_result(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fidelity, "FOLDER", tmp_path)
    monkeypatch.setattr(fidelity, "run_variant", stop)
    monkeypatch.setattr("sys.argv", ["fidelity", "mask-entry", "--seeds", "0"])
    with pytest.raises(SystemExit, match="130"):
        fidelity.main()
    assert "the same command goes on" in capsys.readouterr().err and not list(tmp_path.rglob("*.json"))


def test_the_check_for_copies_is_kept_without_its_pairs(tmp_path):
    whole = dict.fromkeys(fidelity._PROVENANCE, 0) | {"nearest": {"ratio": 0.9, "images": {"face": {"distance": 0.1}}}}
    (tmp_path / "result-2.json").write_text(json.dumps(whole))
    found = fidelity.run_variant(Experiment("?", {"a": ()}, stages=(2,)), "a", 0, tmp_path, (2,))
    assert found["stages"][2] == {"nearest": {"ratio": 0.9}, "commit": 0}
