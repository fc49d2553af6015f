"""Command lines: keys of plain and nested dataclasses, help, exit statuses and warnings."""

import importlib
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")

from recipes.sisma import train
from recipes.sisma.arguments import Help, UsageError, _short_keys, from_command_line, keys_help, run_command
from recipes.sisma.presets import preset

ROOT = Path(__file__).parents[1]


@dataclass
class Training:
    """How to train.

    Attributes:
        steps: optimiser steps.
        lr: learning rate.
        seed: of everything random.
        name: of the optimiser.
    """

    steps: int = 10
    lr: float = 0.5
    seed: int = 0
    name: str = "adamw"


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
        steps, shift: of the solver,
            and of its time grid.
        solver: a registered solver.
    """

    steps: int = 3
    shift: float | None = None
    solver: str = "ab3"


@dataclass
class Nested:
    """A run.

    Attributes:
        name: of the run.
        lr: learning rate of this run.
        model_args: overrides of the model.
    """

    short_names: ClassVar[dict[str, str]] = {"solver_steps": "sampling.steps"}

    name: str = "run"
    model_args: dict[str, Any] = field(default_factory=dict)
    train: Training = field(default_factory=lambda: Training(steps=20))
    sampling: Sampling = field(default_factory=Sampling)


def parse(*words: str) -> Nested:
    return from_command_line(Nested(), list(words))


def test_nested_fields_are_set_by_short_and_by_dotted_keys():
    expected = Nested(train=Training(steps=7, lr=0.1), sampling=Sampling(steps=4, shift=2.0, solver="heun"))
    assert parse("steps=7", "lr=0.1", "solver_steps=4", "shift=2", "solver=heun") == expected
    dotted = ("train.steps=7", "train.lr=0.1", "sampling.steps=4", "sampling.shift=2", "sampling.solver=heun")
    assert parse(*dotted) == expected
    assert parse("steps=5", "train.steps=6", "steps=7", "lr=.1", *dotted[2:]) == expected, "the last word counts"
    assert parse() == Nested()


def test_a_name_of_several_fields_is_short_for_none_of_them():
    found = parse("train.name=muon", "model_args.depth=6", "model_args.block.width=8")
    assert (found.name, found.train.name) == ("run", "muon")
    assert found.model_args == {"depth": 6, "block": {"width": 8}}
    with pytest.raises(UsageError, match=r"unknown key 'sampling'. Did you mean"):
        parse("sampling={steps: 3}")


def test_values_are_converted_by_the_type_of_a_nested_field(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse("solver=007").sampling.solver == "007" and parse("sampling.solver=~/s").sampling.solver == "/home/me/s"
    for word in ("steps=many", "train.steps=many"):
        with pytest.raises(UsageError, match=f"{word}: Value 'many'"):
            parse(word)
    for word in ("seed=-1", "train.seed=-1"):
        with pytest.raises(ValueError, match="a seed is a whole number from 0"):
            parse(word)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model_args.dim=" + "9" * 5000, "model_args.dim=999"),
        ("step=3", "unknown key 'step'. Did you mean 'steps'"),
        ("solver_step=3", "unknown key 'solver_step'. Did you mean 'solver_steps'"),
        ("train.stepz=3", "unknown key 'train.stepz'. Did you mean 'train.steps'"),
        ("sampling.solver_steps=3", r"unknown key 'sampling.solver_steps'. Did you mean .*'sampling.steps'"),
        ("=3", "unknown key ''"),
        ("steps", "'steps' is not key=value; the keys are name, model_args, steps, lr, seed, train.name, solver_steps"),
    ],
)
def test_a_mistaken_key_gets_the_closest_one(word, message):
    with pytest.raises(UsageError, match=message):
        parse(word)


def test_help_of_nested_fields_has_their_short_keys_and_descriptions():
    assert keys_help(Nested()).splitlines()[1:] == [
        *("  name=run", "      of the run."),
        *("  model_args={}", "      overrides of the model."),
        *("  steps=20", "      optimiser steps."),
        *("  lr=0.5", "      learning rate of this run."),
        *("  seed=0", "      of everything random."),
        *("  train.name=adamw", "      of the optimiser."),
        *("  solver_steps=3", "      of the solver, and of its time grid."),
        *("  shift=None", "      of the solver, and of its time grid."),
        *("  solver=ab3", "      a registered solver."),
    ]


def test_a_command_ends_with_one_message_and_no_traceback(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "recipes.sisma.train", f"run={tmp_path / 'file' / 'run'}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "file" in done.stderr


COMMANDS = ("sample", "evaluate", "compare", "export", "autoencoder", "parser", "watch", "prepare", "demo.__main__")


@pytest.mark.parametrize("schema", [preset("quick"), *COMMANDS], ids=lambda s: s if isinstance(s, str) else "train")
def test_every_key_says_what_it_is(schema):
    if isinstance(schema, str):
        schema = importlib.import_module(f"recipes.sisma.{schema}").Settings()
    text = keys_help(schema)
    assert "\n  " in text
    for key in _short_keys(schema):
        assert re.search(rf"^  {re.escape(key)}=.*\n      \S", text, re.MULTILINE), key


def test_help_is_the_command_and_its_keys():
    done = subprocess.run(
        [sys.executable, "-m", "recipes.sisma.train", "faces", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith("Train SISMA") and "\n  flip=True\n      train on mirrored pairs too" in done.stdout
    assert "\n  batch_size=16\n      examples per optimiser step" in done.stdout
    for word in ("--help", "-h"):
        with pytest.raises(Help, match="solver_steps=11"):
            train.parse([word])


def test_a_stopped_command_says_so_by_its_exit_status(monkeypatch, capsys):
    def stopped(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back what the command sets
    for main, status in ((stopped, 130), (lambda argv: 130, 130), (lambda argv: None, 0)):
        with pytest.raises(SystemExit) as ended:
            run_command(main)
        assert ended.value.code == status
    assert capsys.readouterr().err == "stopped by SIGINT; no half-written file is left\n"


def test_a_warning_of_a_command_is_one_line():
    code = "import warnings, recipes.sisma.arguments as a; a.run_command(lambda _: warnings.warn('odd\\n mask'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "warning: odd mask\n"
