"""The timings on a GPU, as far as a CPU can run them: rows, parts, floors, peers, and what a bare machine needs."""

import argparse
import fnmatch
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_layers, gpu_scan, gpus, models, report, rows
from recipes.sisma import provenance
from ssmgen.precision import Choice

ROOT = Path(__file__).parents[1]


def given(file=None, only=None):
    return argparse.Namespace(json=file, only=only, rounds=1)


class OfTriton(Exception):
    """As Triton's own errors, which are no RuntimeError."""


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("too large"), OfTriton("out of resources")])
def test_a_file_is_written_after_each_row(error, tmp_path):
    file, seen = tmp_path / "x.json", []

    def row(name):
        def measure():
            seen.append(json.loads(file.read_text())["rows"] if file.exists() else [])
            if name == "b":
                raise error
            return {"value": name}

        return measure

    with pytest.raises(SystemExit, match="1 of 3 rows failed: b"):
        rows.run(given(file), "models", {"rows": {name: row(name) for name in "abc"}}, steps=4)
    assert seen == [[], [{"row": "a", "value": "a"}], [{"row": "a", "value": "a"}]]
    content = json.loads(file.read_text())
    assert [each["row"] for each in content["rows"]] == ["a", "c"] and content["steps"] == 4
    assert content["command"] == "python -m benchmarks.models" and "torch" in content["versions"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def measured(value, names="abc"):
    return {"rows": {f"row {name}": lambda: {"value": value} for name in names}}


def test_only_keeps_the_other_rows_of_the_same_origin(tmp_path, capsys):
    file = tmp_path / "x.json"
    rows.run(given(file), "models", measured(1))
    rows.run(given(file, ["row b"]), "models", measured(2))
    content = json.loads(file.read_text())
    assert [(each["row"], each["value"]) for each in content["rows"]] == [("row a", 1), ("row b", 2), ("row c", 1)]
    file.write_text(json.dumps(content | {"commit": "another"}))
    rows.run(given(file, ["*c"]), "models", measured(3))
    assert [each["value"] for each in json.loads(file.read_text())["rows"]] == [3]
    assert "x.json: its rows are dropped, since their commit differ from today's" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no row is called row d; there are:\nrow a\nrow b\nrow c"):
        rows.run(given(file, ["row d"]), "models", measured(4))


def test_no_model_is_trained_eagerly_because_others_were_before(monkeypatch):
    graphs, compiled = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, backend=lambda g, _: graphs.append(g) or g))
    case = models.Case("dit-debug", "dit-debug", 8, None, compile=True)
    monkeypatch.setattr(models, "choose_precision", lambda asked, device: Choice("no", "not measured"))
    with torch.compiler.config.patch(recompile_limit=2):  # the first model may compile twice, as einops changes then
        for _ in range(3):
            before = len(graphs)
            assert models.train_row(case, "cpu", rounds=1, batch=2)["batch"] == 2
            assert len(graphs) > before


def test_a_batch_that_does_not_fit_is_halved():
    def run(batch):
        if batch > 16:
            raise torch.OutOfMemoryError
        return f"ran {batch}"

    assert gpus.halved_until_it_fits(run, 64) == ("ran 16", 16)
    with pytest.raises(torch.OutOfMemoryError):
        gpus.halved_until_it_fits(lambda batch: run(99), 4)


def test_kernels_are_timed_in_captured_graphs_where_triton_has_them(monkeypatch):
    asked = []

    def captured(call, rep, return_mode):
        call()
        return float(len(asked))

    testing = types.ModuleType("triton.testing")
    testing.do_bench_cudagraph = captured
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(testing=testing))
    calls = {"a": lambda: asked.append("a"), "b": lambda: asked.append("b")}
    assert gpus.measure_kernels(calls, rounds=2) == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert asked == ["a", "b", "a", "b"]
    del testing.do_bench_cudagraph  # Triton without it: many calls are timed together
    assert {name: len(times) for name, times in gpus.measure_kernels(calls, rounds=2).items()} == {"a": 2, "b": 2}
    assert asked.count("a") == 2 + 3 * gpus._REPEATS


def test_the_floor_is_that_of_bytes_or_exponentials():
    h100 = gpus.LIMITS["H100 80GB HBM3"]

    def floor(shape, size, backward=False):
        return 1e3 * gpus.scan_floor_ms(shape, size, backward, 132, h100)

    assert floor((8, 2048, 256, 16), 4) == pytest.approx(16.05, abs=0.01)  # us of exponentials
    assert floor((8, 2048, 256, 16), 4, True) == pytest.approx(40.3, abs=0.1)  # of bytes
    assert floor((8, 2048, 256, 1), 4) == pytest.approx(4 * 8 * 256 * (3 * 2048 + 2) / 3.35e6, rel=1e-6)
    assert floor((8, 2048, 256, 1), 2) == pytest.approx(floor((8, 2048, 256, 1), 4) / 2)
    assert gpus.limits() is None or torch.cuda.is_available()


def test_the_layers_are_timed_beside_torch_and_the_floor(monkeypatch):
    shape, h100 = (8, 16, 16, 2048), gpus.LIMITS["H100 80GB HBM3"]
    assert gpu_layers.floor_ms(shape, torch.bfloat16, False, h100) == pytest.approx(5.01e-3, rel=1e-3)
    assert gpu_layers.floor_ms(shape, torch.float32, True, h100) == pytest.approx(25.04e-3, rel=1e-3)
    monkeypatch.setattr(gpu_layers, "BACKENDS", ("auto", "torch"))
    calls = gpu_layers.conv_calls((1, 2, 3, 4), torch.float32, True, "cpu")
    calls |= gpu_layers.embedding_calls((3, 4, 2, 5), torch.float32, "cpu")
    assert list(calls) == ["conv_silu auto", "conv_silu torch", "sum_rows dense", "sum_rows torch"]
    for call in calls.values():
        call()
    figures = gpu_layers._figures("conv", {"triton": [1.0], "torch": [2.0]}, 0.5)
    assert "| floor | 0.5 ms | 0.50 |" in report.SECTIONS["gpu_layers"][1]({"rows": [figures]})


def test_mamba_ssm_comes_from_the_hub_where_it_is_not_installed(monkeypatch):
    def op(u, delta, A, B, C, D, delta_bias, delta_softplus):
        assert u.is_contiguous() and u.shape == delta.shape == (1, 3, 5) and B.shape == C.shape == (1, 2, 5)
        return u + delta_bias[:, None]

    asked = []
    interface = types.SimpleNamespace(selective_scan_fn=op)
    kernels = types.SimpleNamespace(get_kernel=lambda name: asked.append(name) or types.SimpleNamespace(__name__="hub"))
    found = {"kernels": kernels, "hub.ops.selective_scan_interface": interface}
    importer = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: found.get(name) or importer(name))
    scan, origin = gpu_scan.mamba_ssm()
    assert asked == ["kernels-community/mamba-ssm"] and origin == "kernels-community/mamba-ssm, by the package kernels"
    u, maps, ones = torch.randn(1, 5, 3), torch.randn(1, 5, 2), torch.ones(3)
    assert torch.equal(scan(u, u, torch.ones(3, 2), maps, maps, ones, ones), u + 1)
    kernels.get_kernel = lambda name: 1 / 0
    scan, origin = gpu_scan.mamba_ssm()
    assert scan is None and origin.startswith("mamba-ssm is not installed") and "ZeroDivisionError" in origin


def test_the_parts_of_make_bench_gpu_have_all_rows_once():
    command = ["make", "-n", "bench-gpu", "RESULTS=/elsewhere", "PYTHON=python"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    parts = re.findall(r"timeout 480 python -m benchmarks\.(\w+) .*--json /elsewhere/(\S+)\.json --only (.*)",
                       printed.replace("\\\n", ""))  # fmt: skip
    assert len(parts) == 11 and all(file == f"{module}-gpu" for module, file, _ in parts)
    patterns = [p for module, _, only in parts for p in re.findall(r"'([^']*)'", only) if module == "models"]
    names = [f"sample {case.name}, batch {count}" for case in models.cases(True) for count in (1, 8)]
    names += [f"train {case.name}" for case in models.cases(True)[:-1]]
    assert {name: sum(fnmatch.fnmatchcase(name, p) for p in patterns) for name in names} == dict.fromkeys(names, 1)
    assert {module for module, *_ in parts} == {"gpu_scan", "gpu_layers", "tokens", "models"}


def test_the_commit_of_a_bare_tree_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "recipes/sisma/provenance.py"))
    monkeypatch.delenv("SSMGEN_COMMIT", raising=False)
    assert provenance.provenance("command", 0)["commit"] is None
    monkeypatch.setenv("SSMGEN_COMMIT", "0123456789ab")
    assert provenance.provenance("command", 0)["commit"] == "0123456789ab"


def test_the_gpu_tests_and_timings_run_from_a_bare_tree(tmp_path):
    """Not installed, no PYTHONPATH, and none of the packages that a GPU machine may lack."""
    for folder in ("ssmgen", "benchmarks", "recipes", "tests"):
        skipped = shutil.ignore_patterns("pretrained", "golden", "__pycache__", "*.so")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skipped)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    absent = ["diffusers", "omegaconf", "accelerate", "timm", "huggingface_hub", "hypothesis", "docstring_parser"]
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {absent!r}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import pytest\n"
        "code = pytest.main(['-m', 'gpu', '-p', 'no:cacheprovider'])\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"  # as python -m does
        "import ssmgen, benchmarks.gpu_scan, benchmarks.gpu_layers, benchmarks.models, benchmarks.tokens\n"
        "print(code.name, ssmgen.__file__)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # such as hypothesis', which are installed here
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.stdout.splitlines()[-1] == f"OK {tmp_path}/ssmgen/__init__.py", done.stdout + done.stderr
