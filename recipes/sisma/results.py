"""Where the result of an evaluation goes, so that it replaces none that says more.

``result.json``, ``result.png`` and ``report.html`` are those of the newest evaluation, unless the one before says more
of the same weights: on more masks, or on as many with more that was measured. Then the newest goes beside it, as
``result-step-1300-16-masks-mask_agreement.json`` and so on. Where each says something that the other does not, the
older one is renamed in this way, and that of earlier weights to ``result-step-<steps>.json``. A name that is taken by a
result which is not repeated gets a number.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAMES = {"json": "result{}.json", "picture": "result{}.png", "report": "report{}.html"}


@dataclass(frozen=True)
class Place:
    """The files of one result, and a sentence on others where there are; empty where there are none."""

    json: Path
    picture: Path
    report: Path
    note: str = ""


def place(folder: Path, result: dict[str, Any]) -> Place:
    """The files for a result; those that have its names and say something else are renamed.

    Args:
        folder: of the run, or of the evaluation of a folder of images.
        result: what goes into ``result.json``.

    Returns:
        The files, none of which takes the place of a result that says anything else.
    """
    usual = _files(folder)
    before = _read(usual["json"])
    if not before or _covers(result, before):
        return Place(**usual)
    if _covers(before, result):
        own = _free(folder, _extent(result), result)
        return Place(**own, note=f"{usual['json'].name} stays, since it says more; this one is {own['json'].name}")
    other = _subject(before) != _subject(result)
    kept = _free(folder, f"-{_subject(before)}" if other else _extent(before), before)
    for name, file in usual.items():
        if file.exists():
            file.replace(kept[name])
    return Place(**usual, note=f"the result before is now {kept['json'].name}")


def _covers(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether all that a result says of its weights or images another one says too, of as many masks."""
    same = _subject(one) == _subject(other)
    return same and one["masks"] >= other["masks"] and _measured(one) >= _measured(other)


def _extent(result: dict[str, Any]) -> str:
    return "-".join(["", _subject(result), str(result["masks"]), "masks", *sorted(_measured(result))])


def _free(folder: Path, suffix: str, result: dict[str, Any]) -> dict[str, Path]:
    """Files of these names, with a number where another result has them that this one does not repeat."""
    for number in itertools.count(1):
        files = _files(folder, suffix if number == 1 else f"{suffix}-{number}")
        there = _read(files["json"])
        if not there or _covers(result, there):
            return files
    raise AssertionError("numbers have no end")


def _files(folder: Path, suffix: str = "") -> dict[str, Path]:
    return {key: folder / name.format(suffix) for key, name in _NAMES.items()}


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "masks" in found else {}


def _subject(result: dict[str, Any]) -> str:
    """What was measured, as a part of a file's name."""
    return str(result["images"]) if "images" in result else f"step-{result.get('steps')}"


def _measured(result: dict[str, Any]) -> set[str]:
    found: Iterable[str] = [key for key in ("mask_agreement", "lpips") if key in result]
    return {*found, *result.get("distances", {})}
