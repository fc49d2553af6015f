"""Where the result of an evaluation goes, so that it replaces none that says more.

``result.json``, ``result.png`` and ``report.html`` are those of the evaluation that says most of the newest weights: on
the most masks, with everything that was measured before. One that says less goes beside them, as
``result-<masks>-masks.json`` and so on, and results of earlier weights stay as ``result-step-<steps>.json``.
"""

from __future__ import annotations

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
    """The files for a result; those of earlier weights that have its names are renamed.

    Args:
        folder: of the run, or of the evaluation of a folder of images.
        result: what goes into ``result.json``.
    """
    usual = _files(folder)
    before = _read(usual["json"])
    if not before:
        return Place(**usual)
    if (subject := _subject(before)) != _subject(result):
        kept = _files(folder, f"-{subject}")
        for name, file in usual.items():
            if file.exists():
                file.replace(kept[name])
        return Place(**usual, note=f"the result of other weights or images stays as {kept['json'].name}")
    lost = sorted(_measured(before) - _measured(result))
    if before["masks"] <= result["masks"] and not lost:
        return Place(**usual)
    own = _files(folder, f"-{result['masks']}-masks")
    more = f"{before['masks']} masks" + (f" and has {', '.join(lost)}" if lost else "")
    return Place(**own, note=f"{usual['json'].name} stays, since it is on {more}; this one is {own['json'].name}")


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
