"""The command ``ssmgen``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ssmgen.cli import main

ROOT = Path(__file__).parents[1]


def test_list_shows_every_kind_and_filters(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for word in ("sisma-xl", "cross-mamba", "flow-matching", "midpoint", "autoencoder-kl"):
        assert word in out
    assert main(["list", "sisma-?"]) == 0
    assert capsys.readouterr().out == "model:       sisma-b, sisma-l, sisma-s\n"


def test_list_as_json(capsys):
    assert main(["list", "sisma*", "--json"]) == 0
    assert "sisma-xl" in json.loads(capsys.readouterr().out)["model"]


def test_info_counts_the_papers_parameters(capsys):
    assert main(["info", "sisma-xl"]) == 0
    out = capsys.readouterr().out
    assert "799,162,368" in out and "blocks / cross_mamba" in out and "TFLOP" in out and "GiB" in out
    assert main(["info", "sisma-xl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["blocks / ffn"] == 24 * 8_393_728


def test_doctor_names_the_backend_that_runs(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "auto on cpu" in out and "mamba-ssm" in out and "torch 2." in out
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["reference"]["available"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["info", "sisma-xxl"], "'sisma-xl'"),
        (["info", "euler"], "'euler' is a solver; info takes a model"),
        (["info", "sisma-xl", "--size", "33"], "multiples of patch_size 2"),
        (["list", "nothing*"], "no name matches 'nothing*'"),
    ],
)
def test_mistakes_are_one_message(argv, message, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err


def test_it_is_installed_as_a_command():
    done = subprocess.run([sys.executable, "-m", "ssmgen.cli", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "doctor" in done.stdout
