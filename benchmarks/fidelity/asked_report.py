"""The section of docs/fidelity.md on style and words, from the results of `benchmarks.fidelity.asked`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.report import table

_HEAD = """## style and words

Do images have the style and the words they were asked for, and does the mask suffer? [A style from another
picture](style.md#measuring-it) defines the figures. *Without*: the same masks and noise, nothing asked.

A style by regions (*asked*) is followed almost to the ceiling, and words go most of the way; of these, the
background's colour is followed least. Agreement with the mask falls by less than 0.02 with either or both. One vector
of the whole picture (*whole*) passes on its tone and main hues, and cannot say which region had which colour. Words
have to be guided from the noise on, because colours are decided there: guided from t = 0.2 on, as the mask is
(*asked-late-guidance*), the same model goes 64 % of the way and not 86 %. For the style it makes little difference.
"""


def section(folder: Path) -> str:
    """The section as Markdown, of every result in a folder; empty without one."""
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    return "\n".join([_HEAD, *(_result(file.stem, json.loads(file.read_text())) for file in files)]) if files else ""


def _result(name: str, result: dict[str, Any]) -> str:
    kinds = [kind for kind in ("style", "words") if kind in result]
    columns = ("found", "without", "floor", "ceiling")
    rows = [
        [
            kind,
            *(f"{result[kind][key]['agreement']:.3f}" for key in columns),
            _percent(result[kind]["floor_to_ceiling"]),
        ]
        for kind in kinds
    ]
    parts = [f"### {name}\n", table(["asked", *columns, "of the way to the ceiling"], rows)]
    mask = {key: f"{value:.3f}" for key, value in result["mask"].items()}
    parts.append(table(["mIoU with the mask", *mask], [["", *mask.values()]]))
    if "style" in result:
        classes = result["style"]["found"]["by_class"]
        cells = [[name, str(each["n"]), *_of_class(result["style"], name)] for name, each in classes.items()]
        parts.append(table(["colour of", "regions", *columns], cells))
    if "words" in result:
        names = result["words"]["found"]["by_attribute"]
        cells = [[name, *(f"{result['words'][key]['by_attribute'][name]:.3f}" for key in columns)] for name in names]
        parts.append(f"Words, by attribute (counted: {', '.join(result['words']['counted'])}):\n")
        parts.append(table(["attribute", *columns], cells))
    return "\n".join([*parts, _origin(result)])


def _of_class(style: dict[str, Any], name: str) -> list[str]:
    found = [style[key]["by_class"].get(name) for key in ("found", "without", "floor", "ceiling")]
    return ["-" if each is None else f"{each['agreement']:.3f}" for each in found]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _origin(result: dict[str, Any]) -> str:
    settings = " ".join(f"{key}={value}" for key, value in result["settings"].items())
    place = result["hardware"]["gpu"] or result["hardware"]["processor"]
    return (
        f"`{result['command']}`, commit `{result['commit']}`, {place}, torch {result['versions']['torch']}, seed "
        f"{result['seed']}, {result['masks']} masks, guidance_scale {result['guidance_scale']}, guidance_start "
        f"{result['guidance_start']}; trained for {result['steps']} steps ({result['seconds']} s) with `{settings}`.\n"
    )
