"""Render the figures of the last torture into docs/reliability.md: ``PYTHONPATH=tests python -m torture.report``."""

import json
from pathlib import Path
from typing import Any

from benchmarks.report import table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "torture" / "cpu.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- torture: made by python -m torture.report -->\n", "<!-- end of torture -->\n"


def main() -> None:
    """Replace the section between the markers of the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{PAGE}: has no lines {BEGIN.strip()} and {END.strip()}")
    PAGE.write_text(before + section(RESULTS) + after)


def section(results: Path) -> str:
    """The section as Markdown, with its markers; it says so if there are no figures."""
    content = _figures(json.loads(results.read_text())) if results.exists() else "No figures yet: run `make torture`.\n"
    return f"{BEGIN}{content}{END}"


def _figures(result: dict[str, Any]) -> str:
    reports = result["campaigns"]
    rows = [[each["promise"], _cases(each), _failed(each), f"{each['seconds']:,.0f} s"] for each in reports]
    figures = [
        [each["name"], name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"]
        for each in reports
        for name, value in each["figures"].items()
    ]
    parts = [_origin(result), table(["promise", "cases", "failed", "time"], rows)]
    if figures:
        parts.append(table(["campaign", "figure", "value"], figures))
    return "\n".join(parts)


def _origin(result: dict[str, Any]) -> str:
    hardware, versions = result["hardware"], result["versions"]
    return (
        f"`{result['command']}`, commit `{result['commit']}`, {hardware['processor']}, torch {versions['torch']}, "
        f"Python {versions['python']}, seed {result['seed']}, {result['seconds'] / 60:.0f} minutes.\n"
    )


def _cases(report: dict[str, Any]) -> str:
    return f"{report['cases']:,}" + ("" if report["cases"] == report["of"] else f" of {report['of']:,}")


def _failed(report: dict[str, Any]) -> str:
    return f"not run: {report['skipped']}" if report["skipped"] else f"{len(report['failures']):,}"


if __name__ == "__main__":
    main()
