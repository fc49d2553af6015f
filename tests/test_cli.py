"""The command ``ssmgen``."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from ssmgen import MaskToImage, bench, build, cli
from ssmgen.cli import main
from ssmgen.cli.machine import OPTIONAL
from ssmgen.data import CELEBAMASK19
from ssmgen.ops import OPERATORS, backends, cpu_library
from ssmgen.pipeline import Recipe
from ssmgen.precision import Choice
from ssmgen.registry import find, names

ROOT = Path(__file__).parents[1]


def test_list_shows_every_kind_and_filters(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for word in ("sisma-xl", "cross-mamba", "flow-matching", "midpoint", "autoencoder-kl"):
        assert word in out
    assert main(["list", "sisma-?"]) == 0
    assert capsys.readouterr().out == "model:        sisma-b, sisma-l, sisma-s\n"


def test_list_as_json(capsys):
    assert main(["list", "sisma*", "--json"]) == 0
    assert "sisma-xl" in json.loads(capsys.readouterr().out)["model"]


def test_info_documents_other_names(capsys):
    assert main(["info", "rotary-attention"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("rotary-attention: block, registered by ssmgen\n")
    assert "divides ``dim``" in out and "num_heads: int\n" in out and "qk_norm: bool = False\n" in out
    assert "rotary: True (the default of this name)\n" in out
    assert main(["info", "style-image", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "condition" and facts["arguments"]["dropout"] == "float = 0.0"
    for name in names():
        if find(name).kind != "model":
            assert main(["info", name]) == 0, name


def test_info_counts_the_papers_parameters(capsys):
    assert main(["info", "sisma-xl"]) == 0
    out = capsys.readouterr().out
    assert "799,162,368" in out and "blocks / cross_mamba" in out and "TFLOP" in out and "GiB" in out
    assert main(["info", "sisma-xl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["blocks / ffn"] == 24 * 8_393_728


def test_the_guess_is_the_counted_operations_over_measured_rates(capsys, monkeypatch):
    monkeypatch.setattr(bench, "rates", lambda device: bench.Rates(device, matrix=2e9, scan=1e9))
    assert main(["info", "sisma-debug", "--size", "16", "--device", "cpu", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    expected = facts["matrix_flops"] / 2e9 + facts["scan_flops"] / 1e9
    assert facts["guess"]["seconds_per_image_and_evaluation"] == pytest.approx(expected)
    assert facts["guess"]["sampled_images_per_second"] == pytest.approx(1 / (build("ab3").nfe(24) * expected))
    assert facts["guess"]["trained_images_per_second"] == pytest.approx(1 / (3 * expected))
    assert main(["info", "sisma-debug", "--size", "16", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "a guess, real runs are slower" in out and "at 2 (products) and 1.0 (scans) GFLOP/s" in out


def test_rates_are_what_the_machine_does():
    found = bench.rates("cpu")
    assert found.device == "cpu" and 1e7 < found.scan < 1e13 and 1e8 < found.matrix < 1e14


def test_doctor_names_the_backend_that_runs(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "auto on cpu" in out and "mamba-ssm" in out and "torch 2." in out
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["reference"]["available"] and facts["compiled_scan"]["loads"] == cpu_scan_loads()
    assert set(facts["operators"]) == set(OPERATORS) and facts["operators"]["selective_scan"] == facts["backends"]
    for operator in OPERATORS[1:]:
        line = next(line for line in out.splitlines() if line.split()[:1] == [operator])
        for name, status in backends(operator).items():
            assert name in line and (f"{name} on cpu ({status.detail})" in line) == ("cpu" in status.auto_for)
            assert status.available or f"{name} missing ({status.detail})" in line
    taken = facts["precision"]
    assert f"auto on {taken['device']} takes {Choice(**taken['auto'])}\n" in out
    assert set(taken["cpu_seconds"]) == {"float32", "bfloat16"} and min(taken["cpu_seconds"].values()) > 0
    for package, version in facts["packages"].items():
        line = next(line for line in out.splitlines() if line.split()[:1] == [package])
        assert version in line if version else f"pip install 'ssmgen[{OPTIONAL[package][0]}]'" in line


def cpu_scan_loads():
    return cpu_library.unavailable() is None


def test_doctor_says_why_the_compiled_scan_does_not_load(capsys, monkeypatch):
    monkeypatch.setattr(cpu_library, "_REASON", "it was eaten")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "compiled scan: does not load (it was eaten)" in out and "portable   auto on cpu" in out
    assert "conv_silu        torch on cpu (PyTorch's own functions, any device); cpu missing (it was eaten)" in out


def test_doctor_knows_the_optional_packages_and_their_extras():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    declared = {
        (re.match(r"[\w-]+", package)[0], extra)
        for extra, packages in extras.items()
        if extra not in ("dev", "docs", "bench")
        for package in packages
    }
    assert {package for package, _ in declared} == set(OPTIONAL)
    assert {(package, extra) for package, (extra, _) in OPTIONAL.items()} <= declared


def test_bench_compares_the_backends_with_the_one_that_runs(capsys):
    words = ["bench", "--device", "cpu", "--tokens", "12", "--dim", "16", "--rounds", "2"]
    assert main(words) == 0
    out = capsys.readouterr().out
    chosen = next(name for name, status in backends().items() if "cpu" in status.auto_for)
    for part in bench.PARTS:
        assert re.search(rf"^{re.escape(part)}\n  {chosen} +[\d.]+ ms +1.00x$", out, re.MULTILINE)
    assert "portable" in out and "reference" in out and "triton" not in out
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    for part, times in facts["seconds"].items():
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in times.values())
        assert facts["medians"][part]["portable"] == pytest.approx(sum(times["portable"]) / 2)


def test_measuring_takes_turns():
    seen = []
    times = bench.measure({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2)
    assert "".join(seen) == "ababab" and all(len(seconds) == 2 for seconds in times.values())


@pytest.fixture
def folder(tmp_path):
    settings = {"in_channels": 3, "mask_scale": 1, "patch_size": 4, "dim": 96, "depth": 1}
    recipe = Recipe("sisma-debug", settings, "identity", 16, CELEBAMASK19, {"solver": "euler", "steps": 2})
    MaskToImage(build("sisma-debug", **settings), build("identity"), recipe).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_export_halves_the_weights_of_a_folder(folder, tmp_path, capsys):
    out = tmp_path / "small"
    assert main(["export", str(folder), str(out), "--dtype", "bfloat16"]) == 0
    assert f"MaskToImage.from_pretrained('{out}')" in capsys.readouterr().out
    sizes = [(where / "model.safetensors").stat().st_size for where in (folder, out)]
    assert sizes[1] < 0.6 * sizes[0]
    mask = torch.zeros(16, 16, dtype=torch.uint8)
    whole, small = (MaskToImage.from_pretrained(where)(mask, output_type="pt") for where in (folder, out))
    torch.testing.assert_close(whole, small, atol=0.05, rtol=0)
    assert main(["export", str(folder), str(tmp_path / "same"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {
        "out": str(tmp_path / "same"),
        "model": "sisma-debug",
        "dtype": "float32",
        "weight_bytes": sizes[0],
    }


def test_export_refuses_before_it_writes(folder, tmp_path, capsys):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    out = tmp_path / "out"
    for words, message in (
        ([folder, folder], f"{folder} exists already: delete it or name another folder"),
        ([tmp_path / "run", out], "run is a training run, not a pipeline folder: use its recipe's own export command"),
        ([folder, out, "--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ([tmp_path / "nowhere", out], "nowhere: no such folder"),
        ([folder, out, "--revision", "v1"], "revision='v1' is for repositories on the hub"),
    ):
        assert main(["export", *map(str, words)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err and err.count("\n") == 1
        assert not out.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["info", "sisma-xxl"], "'sisma-xl'"),
        (["info", "eular"], "Did you mean 'euler'"),
        (["info", "euler", "--size", "8"], "--size is for models, and 'euler' is a solver"),
        (["info", "sisma-xl", "--size", "33"], "positive multiples of 2"),
        (["info", "sisma-s", "--size", "-2"], "--size must be at least 1, got -2"),
        (["info", "sisma-s", "--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["bench", "--rounds", "0"], "rounds must be at least 1, got 0"),
        (["list", "nothing*"], "no name matches 'nothing*'"),
    ],
)
def test_mistakes_are_one_message(argv, message, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err


@pytest.mark.parametrize("words", [[], ["list"], ["info"], ["plan"], ["doctor"], ["bench"], ["export"]], ids=" ".join)
def test_help_has_examples_that_are_understood(words, capsys):
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    out = capsys.readouterr().out
    examples = re.findall(r"^  ssmgen (.*)$", out, re.MULTILINE)
    assert end.value.code == 0 and examples and "\x1b" not in out
    for example in examples:
        assert cli._parser().parse_args(shlex.split(example)).command is not None


def test_without_a_command_help_goes_to_stderr(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("usage: ssmgen") and captured.out == ""


def test_ctrl_c_ends_quietly(capsys, monkeypatch):
    def interrupted(**sizes):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "timings", interrupted)
    assert main(["bench"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_ends_quietly():
    """What ``ssmgen list | head -1`` comes to."""
    command = [sys.executable, "-m", "ssmgen.cli", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_it_is_installed_as_a_command():
    done = subprocess.run([sys.executable, "-m", "ssmgen.cli", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "doctor" in done.stdout
