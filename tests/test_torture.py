"""A few cases of each long campaign of `make torture`, drawn as there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="training needs accelerate")

from torture import report
from torture.campaigns import CAMPAIGNS

ROOT = Path(__file__).parents[1]
#: The others take longer: tests/test_parallel.py compares sharded trainings, and the cost needs a quiet machine.
SAMPLED = ("cuts", "calls", "kills", "damage", "configurations", "hostile", "signals", "ranks")


def torture(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess, dict]:
    """The campaigns in a process of their own, which has no threads and can be forked."""
    file = folder / "found.json"
    command = [
        sys.executable,
        "-m",
        "torture",
        *words,
        "--jobs",
        "1",
        "--keep",
        str(folder / "cases"),
        "--json",
        str(file),
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    return done, {each["name"]: each for each in json.loads(file.read_text())["campaigns"]}


def test_no_case_of_the_sample_fails(tmp_path):
    done, found = torture(tmp_path, *SAMPLED, "--share", "0.01", "--seed", "1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "all hold" in done.stdout
    for name in SAMPLED:
        assert found[name]["skipped"] or found[name]["cases"] > 0, name


def test_a_failing_case_is_told_with_its_folder_and_how_to_repeat_it(tmp_path):
    done, found = torture(tmp_path, "selfcheck", "--seed", "7")
    assert done.returncode == 1 and "FAILED" in done.stdout
    failures = {each["case"]: each for each in found["selfcheck"]["failures"]}
    assert set(failures) == {1, 2, 3, 4} and found["selfcheck"]["kinds"] == {"passes": 2}
    assert "hangs" in failures[1]["what"] and "signal 9" in failures[2]["what"]
    assert "a broken promise" in failures[3]["what"] and "ZeroDivisionError" in failures[4]["what"]
    assert failures[3]["reproduce"] == "PYTHONPATH=tests python -m torture selfcheck --seed 7 --case 3"
    assert (Path(failures[3]["folder"]) / "evidence").is_file()
    again, repeated = torture(tmp_path, "selfcheck", "--seed", "7", "--case", "3")
    assert again.returncode == 1
    assert [each["what"] for each in repeated["selfcheck"]["failures"]] == [failures[3]["what"]], "the same draws"


def test_the_page_shows_the_figures_of_the_last_torture():
    assert report.section(report.RESULTS) in (ROOT / "docs/reliability.md").read_text(), "run python -m torture.report"


def test_campaigns_have_the_sizes_that_are_promised():
    full = {name: campaign.count for name, campaign in CAMPAIGNS.items()}
    assert (full["cuts"], full["damage"], full["configurations"], full["signals"], full["ranks"]) == (
        200,
        10_000,
        5000,
        200,
        100,
    )
    assert full["kills"] == 100, "of five kills each"
