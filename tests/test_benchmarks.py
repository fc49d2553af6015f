"""The benchmark page is made from the committed results and nothing else."""

import json
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="the benchmarks import the recipe, which needs ssmgen[train]")

from benchmarks import report
from benchmarks.timing import RESULTS, measure, medians

ROOT = Path(__file__).parents[1]


def test_the_page_is_what_the_results_render_to():
    assert (ROOT / "docs/benchmarks.md").read_text() == report.page(RESULTS), "run python -m benchmarks.report"


def test_the_part_about_gpus_is_what_the_results_render_to():
    text = (ROOT / "docs/performance.md").read_text()
    assert text == report.with_gpu_part(text, report.gpu_part(RESULTS)), "run python -m benchmarks.report"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_every_result_says_where_it_comes_from(file):
    result = json.loads(file.read_text())
    assert result["commit"] and "dirty" not in result["commit"], "measure at a commit, with no file changed"
    assert result["command"].startswith("python -m benchmarks.") and result["hardware"]["processor"]
    assert {"torch", "python"} <= set(result["versions"]) and isinstance(result["seed"], int)


def test_a_result_without_a_section_is_named(tmp_path):
    (tmp_path / "unheard-cpu.json").write_text("{}")
    with pytest.raises(ValueError, match="unheard-cpu.json: no section"):
        report.page(tmp_path)


def test_results_of_a_gpu_are_rendered_in_their_own_part(tmp_path):
    assert report.gpu_part(tmp_path) == "Nothing has been measured on a GPU.\n"
    hardware = {"gpu": "NVIDIA X", "processor": "Y", "threads": 1}
    origin = {"command": "python -m benchmarks.x", "commit": "0123456789ab", "hardware": hardware, "seed": 0}
    origin |= {"versions": {"torch": "2.15.0", "python": "3.12.0"}}
    scan = {"shape": [8, 2048, 256, 16], "dtype": "torch.bfloat16", "what": "forward", "floor": 0.01}
    scan |= {"medians": {"ssmgen triton": 0.02, "ssmgen portable": 1.0, "mamba-ssm": 0.016}}
    (tmp_path / "gpu_scan-gpu.json").write_text(json.dumps(origin | {"rows": [scan], "mamba_ssm": "the package"}))
    trained = {"case": "sisma-xl", "batch": 64, "images_per_second": 200.0, "mfu": 0.31}
    models = {"steps": 200, "sampling": [], "training": [trained]}
    (tmp_path / "models-gpu.json").write_text(json.dumps(origin | models))
    part = report.gpu_part(tmp_path)
    assert "### The Triton scan (GPU)" in part and "commit `0123456789ab`, NVIDIA X, torch 2.15.0" in part
    assert "| (8, 2048, 256, 16) | bfloat16, forward | 0.02 ms | 2.0x | 50.0x | 0.8x |" in part
    assert "mamba-ssm: the package." in part and "| sisma-xl | 64 | 200 | 31% |" in part
    assert "Triton scan" not in report.page(tmp_path)
    text = f"before\n{''.join(report.GPU_PART)}after\n"
    assert report.with_gpu_part(report.with_gpu_part(text, "one\n"), part).count("### The Triton scan") == 1


def test_calls_are_timed_in_turn_after_a_warm_up():
    called = []
    times = measure({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, rounds=3)
    assert called == ["a", "b"] * 4
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}
