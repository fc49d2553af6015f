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


def test_calls_are_timed_in_turn_after_a_warm_up():
    called = []
    times = measure({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, rounds=3)
    assert called == ["a", "b"] * 4
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}
