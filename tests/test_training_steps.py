"""How many steps a run takes, and how it continues."""

import json
import re
import shutil
import signal

import pytest
import torch

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")

from recipe_runs import SMALL, digests, words

from recipes.sisma import export, train
from recipes.sisma.arguments import UsageError
from recipes.sisma.presets import preset
from recipes.sisma.runs import load_config, save_config
from ssmgen.training import CheckpointError, TrainResult, checkpoints, verify_checkpoint


def test_ten_and_ten_make_twenty(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    common = [*SMALL, f"cache={tmp_path / 'cache'}", "evaluate=false"]
    train.main([*common, f"run={whole}", "steps=20"])
    train.main([*common, f"run={cut}", "steps=10"])
    train.main([*common, f"run={cut}", "steps=20", "resume=auto"])
    assert digests(whole) == digests(cut) and len(digests(whole)) == 3


def test_a_number_of_steps_that_was_measured_trains_as_if_it_was_given(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "LEAST", 2)
    monkeypatch.setattr(train, "MOST", 4)
    chosen, given = tmp_path / "chosen", tmp_path / "given"
    common = [word for word in SMALL if "lr_decay" not in word]
    common += [f"cache={tmp_path / 'cache'}", "checkpoint_every=2", "evaluate=false"]
    train.main([*common, f"run={chosen}"])
    said = re.search(r"measured \d+\.\d\d s a step: 4 steps, the allowed maximum, take", capsys.readouterr().err)
    assert said and load_config(chosen).train.steps == load_config(chosen).train.lr_decay_steps == 4
    train.main([*common, f"run={given}", "steps=4"])
    assert digests(chosen) == digests(given) and len(digests(chosen)) == 3
    losses = [[json.loads(line)["loss"] for line in (run / "log.jsonl").open()] for run in (chosen, given)]
    assert losses[0] == losses[1] and len(losses[0]) == 4

    def again(*_):
        raise AssertionError("measured twice")

    monkeypatch.setattr(train, "seconds_per_step", again)
    monkeypatch.setattr(train, "MOST", 9)
    shutil.rmtree(checkpoints(chosen / "checkpoints")[-1])  # stopped after step 2
    train.main([*common, f"run={chosen}", "resume=auto", "minutes=1"])
    assert digests(chosen) == digests(given) and load_config(chosen).train.steps == 4
    (chosen / "config.yaml").unlink()
    with pytest.raises(UsageError, match=r"config.yaml: not found, .*give steps="):
        train.main([*common, f"run={chosen}", "resume=auto"])


def test_steps_fill_the_minutes_within_bounds(capsys):
    cases = [(0.5, "", 700), (0.512, "", 700), (0.1, "", 1300), (2.0, "", 400), (0.1, "lr_decay_steps=90", 90)]
    for seconds, word, steps in cases:
        config = train.choose_steps(train.parse(["quick", "minutes=6", *filter(None, [word])]), lambda s=seconds: s)
        assert (config.train.steps, config.train.lr_decay_steps, config.sample_every) == (steps, steps, steps // 2)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "measured 0.50 s a step: 700 steps fit in 6 minutes"
    assert said[3].endswith("400 steps, the allowed minimum, take about 13.3 minutes (6 were asked for)")
    assert "90 steps, as many as the cosine of the learning rate has, take about 0.1 minutes" in said[4]
    own = train.choose_steps(train.parse(["quick", "lr_decay_steps=2000", "sample_every=0"]), lambda: 0.3)
    assert (own.train.steps, own.train.lr_decay_steps, own.sample_every) == (1200, 2000, 0)


def test_the_cosine_ends_where_training_does_if_nothing_else_is_said():
    for given, expected in (
        (["quick", "steps=3000"], (3000, 3000, 1500)),
        (["quick", "steps=7"], (7, 7, 4)),
        (["faces", "data=x", "steps=500", "lr_decay_steps=0", "sample_every=9"], (500, 0, 9)),
        (["paper", "data=x"], (150_000, 0, 5000)),
    ):
        config = train.continued(train.parse(given))
        assert (config.train.steps, config.train.lr_decay_steps, config.sample_every) == expected


def test_a_complete_run_is_not_trained_again(trained, capsys):
    before = digests(trained)
    common = [f"cache={trained.parent / 'cache'}", *SMALL, "steps=6", "model_args.mask_dropout=0.1"]
    train.main([f"run={trained}", *common, "resume=auto", "evaluate=false"])
    said = capsys.readouterr().out
    assert digests(trained) == before and f"{trained} is at step 6 already: nothing to train\n" in said
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
    assert f"l{said}\n" in printed.err and "note: the previous result is now result-step-2.json" in printed.out
    run = tmp_path / "run"
    result, before = (json.loads((run / name).read_text()) for name in ("result.json", "result-step-2.json"))
    assert (result["steps"], before["steps"]) == (4, 2)
    assert result["schedule"] == [{"step": 0, "lr_decay_steps": 2}, {"step": 2, "lr_decay_steps": 4}]
    assert (run / "result-step-2.png").is_file() and (run / "report-step-2.html").is_file()
    assert load_config(run).train.lr_decay_steps == 4
    with pytest.raises(CheckpointError, match="lr_decay_steps: 4 there, 3 now, which may only grow or become 0"):
        train.main([*common, "steps=3", "lr_decay_steps=3", "resume=auto"])
    export.main([f"run={run}", f"out={tmp_path / 'exported'}"])
    assert f"L{said}." in (tmp_path / "exported" / "README.md").read_text()


def test_an_existing_run_is_not_overwritten(trained, tmp_path):
    with pytest.raises(FileExistsError, match="already holds a run; continue it with resume=auto"):
        train.main(words(trained.parent, "steps=2"))


def test_resuming_another_runs_checkpoint_into_a_run_is_refused(trained, tmp_path):
    other = tmp_path / "other" / "checkpoints" / "step-00000001"
    other.mkdir(parents=True)
    with pytest.raises(FileExistsError, match="is another's"):
        train.main(words(trained.parent, "steps=9", f"resume={other}", "model_args.mask_dropout=0.1"))


def test_resuming_with_other_settings_is_refused_and_harms_nothing(trained):
    before, config = digests(trained), (trained / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match=r"another configuration \(.*lr: 0.012 there, 0.5 now"):
        train.main(words(trained.parent, "steps=9", "lr=0.5", "resume=auto", "model_args.mask_dropout=0.1"))
    assert digests(trained) == before and (trained / "config.yaml").read_text() == config


def test_a_training_that_is_asked_to_stop_gives_the_status_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    stopped = TrainResult(step=3, seconds=1.0, ema=torch.nn.Identity(), interrupted=True, signal=signal.SIGTERM)
    monkeypatch.setattr(train, "train", lambda *_, **__: stopped)
    given = words(tmp_path, "steps=9")
    assert train.main(given) == 143
    assert f"stopped at step 3; continue with: python -m recipes.sisma.train {' '.join(given)} resume=auto" in (
        capsys.readouterr().err
    )


def test_skipped_steps_are_counted_in_the_last_line(tmp_path, monkeypatch, capsys):
    result = TrainResult(6, 1.0, torch.nn.Identity(), False, skipped=2)
    monkeypatch.setattr(train, "train", lambda *_, **__: result)
    train.main(words(tmp_path, "steps=6", "evaluate=false"))
    assert re.search(r"to step 6 in 1 s; 2 steps were skipped", capsys.readouterr().out)


def test_a_run_records_the_precision_it_took_and_refuses_the_other(trained):
    taken = load_config(trained).train.precision
    assert preset("quick").train.precision == preset("faces").train.precision == "auto" and taken in ("no", "bf16")
    assert verify_checkpoint(checkpoints(trained / "checkpoints")[-1])["record"]["precision"] == taken
    other = {"no": "bf16", "bf16": "no"}[taken]
    with pytest.raises(CheckpointError, match=rf"another configuration \(precision: '{taken}' there, '{other}' now"):
        train.main(words(trained.parent, f"precision={other}", "resume=auto", "model_args.mask_dropout=0.1"))


def test_a_run_continued_for_fewer_steps_keeps_its_cosine(tmp_path):
    """Whoever wants to end sooner names steps= alone; a cosine that follows them would be another schedule."""
    save_config(preset("quick").with_steps(1300), tmp_path / "config.yaml")
    for given, cosine in (
        (["steps=800"], 1300),
        (["steps=2000"], 2000),
        (["steps=800", "lr_decay_steps=0"], 0),
        (["steps=800", "resume=no"], 800),
    ):
        asked = train.parse(["quick", f"run={tmp_path}", "resume=auto", *given])
        assert train.continued(asked).train.lr_decay_steps == cosine


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
