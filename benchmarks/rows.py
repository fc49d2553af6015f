"""The rows of a benchmark: those asked for are measured in turn, and the file is written after each.

A run that is cut off leaves its finished rows. ``--only`` measures rows by name and keeps the others of the file, if
they are of the same commit, versions and hardware.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.timing import write
from recipes.sisma.provenance import provenance

Row = dict[str, Any]
#: Calls that measure a row, by section of the file and name.
Sections = Mapping[str, Mapping[str, Callable[[], Row]]]
_ORIGIN = ("commit", "versions", "hardware")


def run(given: argparse.Namespace, module: str, sections: Sections, **head: Any) -> None:
    """Measure rows and write them, each with its name as ``row``, beside ``head``.

    A row that fails is reported on stderr and does not stop the others.

    Args:
        given: ``only``, the patterns of names or None for all, and ``json``, the file or None.
        module: name of the benchmark.
        sections: what there is to measure.
        head: what the file says beside its rows.

    Raises:
        SystemExit: no row has such a name, or a row failed.
    """
    names = [name for rows in sections.values() for name in rows]
    chosen = [name for name in names if given.only is None or any(fnmatch.fnmatch(name, p) for p in given.only)]
    if not chosen:
        raise SystemExit(f"no row is called {' or '.join(given.only)}; there are:\n" + "\n".join(names))
    found = _earlier(given.json, module) if given.only is not None else {}
    failed = []
    for section, rows in sections.items():
        for name in (name for name in rows if name in chosen):
            try:
                found[section, name] = {"row": name, **rows[name]()}
            except Exception as error:  # out of memory, or torch or Triton could not compile it
                print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
                failed.append(name)
                continue
            content = {
                part: [found[part, each] for each in of if (part, each) in found] for part, of in sections.items()
            }
            write(given.json, module, head | content)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(chosen)} rows failed: {', '.join(failed)}")


def _earlier(file: Path | None, module: str) -> dict[tuple[str, str], Row]:
    """The rows of the file by section and name, if they come from where this run does."""
    if file is None or not file.exists():
        return {}
    content, now = json.loads(file.read_text()), provenance(f"python -m benchmarks.{module}", 0)
    differing = [name for name in _ORIGIN if json.loads(json.dumps(now[name])) != content.get(name)]
    if differing:
        print(
            f"{file}: its rows are dropped, since their {' and '.join(differing)} differ from today's", file=sys.stderr
        )
        return {}
    parts = {part: rows for part, rows in content.items() if isinstance(rows, list)}
    return {(part, row["row"]): row for part, rows in parts.items() for row in rows if "row" in row}
