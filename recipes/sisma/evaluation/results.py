"""The files of an evaluation (``result.json``, ``result.png``, ``report.html``, ``nearest.png``), and what is printed.

These belong to the newest evaluation, unless the previous one covers it: same weights, at least as many masks and at
least the same metrics. The newest then goes beside it, as ``result-step-1300-16-masks-mask_agreement.json`` and so on.
Where neither covers the other, the older one is renamed in this way, and a result of earlier weights to
``result-step-<steps>.json``. A name taken by a result that the new one does not cover gets a number.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from recipes.sisma.evaluation.consistency import FIGURES
from recipes.sisma.evaluation.images import Images
from recipes.sisma.evaluation.nearest import save_nearest, sentence
from recipes.sisma.evaluation.report import write_report
from recipes.sisma.presets import Config
from recipes.sisma.provenance import provenance
from recipes.sisma.sheets import save_mask_sheet
from ssmgen.atomic import write_text
from ssmgen.metrics import FID_PROTOCOLS

_SHEET_ROWS, _SHEET_SAMPLES = 6, 4


class ResultFiles(NamedTuple):
    """The files of one result, and a note if another result of the folder keeps or loses its names."""

    json: Path
    picture: Path
    report: Path
    nearest: Path
    note: str = ""


def write_result(folder: Path, result: dict[str, Any], images: Images, parsed: Any) -> None:
    """Write the files of a result and print its summary.

    Args:
        folder: of the run, or of the evaluation of a folder of images.
        result: the content of ``result.json``.
        images, parsed: as in `write_report`.
    """
    files = result_files(folder, result)
    write_text(files.json, json.dumps(result, indent=2) + "\n")
    _save_sheet(files.picture, images)
    if images.training is not None:
        save_nearest(files.nearest, result["nearest"], images, images.training)
    write_report(files.report, result, images, parsed)
    print(summary(result))
    if files.note:
        print(f"note: {files.note}")
    print(f"report: {files.report}\npicture: {files.picture}")
    if images.training is not None:
        print(f"nearest training images: {files.nearest}")


def description(config: Config, command: str) -> dict[str, Any]:
    """What is recorded beside the figures: data, image size, command, seed of the training, versions and hardware."""
    data = "drawn" if config.data == "drawn" else "prepared folder"
    return {"data": data, "image_size": config.image_size, **provenance(command, config.train.seed)}


def summary(result: dict[str, Any]) -> str:
    """The figures in a few lines."""
    parts = _consistency, _distances, _nearest, _diversity
    return "\n".join([_agreement(result), *(line for part in parts for line in part(result))])


def result_files(folder: Path, result: dict[str, Any]) -> ResultFiles:
    """The files for a result, none of which replaces a result that it does not cover: those are renamed."""
    usual = _files(folder)
    before = _read(usual.json)
    if not before or _covers(result, before):
        return usual
    if _covers(before, result):
        beside = _free(folder, _extent(result), result)
        return beside._replace(note=f"{usual.json.name} stays, since it says more; this one is {beside.json.name}")
    other = _subject(before) != _subject(result)
    kept = _free(folder, f"-{_subject(before)}" if other else _extent(before), before)
    for file, new in zip(usual[:4], kept[:4], strict=True):
        if file.exists():
            file.replace(new)
    return usual._replace(note=f"the previous result is now {kept.json.name}")


def _agreement(result: dict[str, Any]) -> str:
    if "mask_agreement" not in result:
        return "mask agreement not measured: give parser=FILE, made by python -m recipes.sisma.parser data=FOLDER"
    generated, ceiling, floor = (result[key]["miou"] for key in ("mask_agreement", "ceiling", "floor"))
    way = result["floor_to_ceiling"]
    if way is None:
        between = "neither better nor worse than chance, as the parser fails on real images"
    else:
        between = f"{round(100 * way)} % of the way from shuffled masks ({floor:.3f}) to real images ({ceiling:.3f})"
    return f"mask agreement on {result['masks']} unseen masks: mIoU {generated:.3f}, {between}"


def _consistency(result: dict[str, Any]) -> list[str]:
    if "consistency" not in result:
        return []  # no faces, or a result of an earlier version
    found = result["consistency"]
    compared = "autoencoder" if "autoencoder" in found else "real"
    both = [
        f"{key.replace('_', ' ')} {figure:.{FIGURES[key]}f} ({found[compared][key]:.{FIGURES[key]}f})"
        for key, figure in found["generated"].items()
    ]
    after = " after the autoencoder" if compared == "autoencoder" else ""
    return [f"consistency (in brackets: of the real images{after}): {', '.join(both)}"] if both else []


def _distances(result: dict[str, Any]) -> list[str]:
    lines = []
    for name, found in result.get("distances", {}).items():
        frechet = "FID" if name in FID_PROTOCOLS else "Frechet distance (a proxy, not FID)"
        pairs = [("frechet", "noise_floor", frechet, 2)]
        if "kernel_noise_floor" in found:  # missing in results of earlier versions
            pairs.append(("kernel", "kernel_noise_floor", "kernel distance", 5))
        for key, floor, what, digits in pairs:
            value, halves = (f"{found[which]['value']:.{digits}f}" for which in (key, floor))
            protocol = found[key]["protocol"]
            lines.append(f"{what} {value}, one half of the real images from the other {halves}: {protocol}")
    return lines


def _nearest(result: dict[str, Any]) -> list[str]:
    return [f"{sentence(result['nearest'])}: {result['nearest']['protocol']}"] if "nearest" in result else []


def _diversity(result: dict[str, Any]) -> list[str]:
    lines = []
    if "lpips" in result:
        lines.append(f"LPIPS diversity {result['lpips']['value']:.3f}: {result['lpips']['protocol']}")
    diversity = result["diversity"]
    same = f"{diversity['same_mask']:.3f} between samples of one mask, " if "same_mask" in diversity else ""
    return [*lines, f"diversity (RMS, images in [-1, 1]): {same}{diversity['other_masks']:.3f} between masks"]


def _save_sheet(file: Path, images: Images) -> None:
    """The first masks that have several images, or the first of all masks."""
    held_out = images.held_out
    shown = [held_out.ids.index(id) for id in list(images.sample_files or held_out.ids)[:_SHEET_ROWS]]
    several = images.samples() if images.sample_files else (image.unsqueeze(0) for image in images.generated)
    groups = [group[:_SHEET_SAMPLES] for _, group in zip(shown, several, strict=False)]
    masks, real = ([parts[i] for i in shown] for parts in (held_out.masks, held_out.images))
    save_mask_sheet(file, masks, groups, real, held_out.labels)


def _covers(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a result has all the figures of another one, of the same weights or images and of as many masks."""
    same = _subject(one) == _subject(other)
    return same and one["masks"] >= other["masks"] and _measured(one) >= _measured(other)


def _extent(result: dict[str, Any]) -> str:
    return "-".join(["", _subject(result), str(result["masks"]), "masks", *sorted(_measured(result))])


def _free(folder: Path, suffix: str, result: dict[str, Any]) -> ResultFiles:
    """Files of these names, numbered where a result that this one does not cover has them."""
    number, files = 1, _files(folder, suffix)
    while (existing := _read(files.json)) and not _covers(result, existing):
        number += 1
        files = _files(folder, f"{suffix}-{number}")
    return files


def _files(folder: Path, suffix: str = "") -> ResultFiles:
    names = f"result{suffix}.json", f"result{suffix}.png", f"report{suffix}.html", f"nearest{suffix}.png"
    return ResultFiles(*(folder / name for name in names))


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and "masks" in found else {}


def _subject(result: dict[str, Any]) -> str:
    """What was measured, as a part of a file's name."""
    return str(result["images"]) if "images" in result else f"step-{result.get('steps')}"


def _measured(result: dict[str, Any]) -> set[str]:
    return ({"mask_agreement", "lpips", "nearest"} & result.keys()) | set(result.get("distances", {}))
