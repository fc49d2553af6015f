"""Render the experiments as ``docs/fidelity.md``: ``python -m benchmarks.fidelity.report``.

Nothing there is typed by hand but each experiment's question and finding, which stand in
`benchmarks.fidelity.experiments`.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.fidelity import asked_report, defaults
from benchmarks.fidelity.experiment import Experiment
from benchmarks.fidelity.experiments import EXPERIMENTS
from benchmarks.report import DOCS, table
from benchmarks.timing import RESULTS

FOLDER = RESULTS / "fidelity"
Result = dict[str, Any]
#: Classes of which a mask has few pixels.
SMALL = (
    *("l_eye", "r_eye", "l_brow", "r_brow", "u_lip", "l_lip"),
    *("l_ear", "r_ear", "ear_r", "neck_l", "eye_g"),
)

_HEAD = """# Fidelity

This page measures the contribution of each part of SISMA. Each row is the mean over seeds of the preset `quick` (in
*faces*, *faces-128* and *faces-256*, of the preset `faces`) at the commit below its table, with the listed settings
changed. The presets have changed since: in all but *simplest*, *alike*, *faces-128* and *faces-256* they are as they
were at first, `quick` with `shared_noise=false`, and `faces` with a small `sisma-s`, TAESD's latents
and neither shared noise nor `mirrored_weighting`. The models were trained
on drawn faces (in *faces...*, on real faces) and measured on unseen masks. ± is the standard deviation over seeds
(weights, order of the data, noise). mIoU comes from the shipped parser (in *faces...*, from parsers trained on real
faces); its floor and ceilings are below each table. Only differences of several times the spread are meaningful.

```bash
python -m benchmarks.fidelity                # the experiments and their variants
python -m benchmarks.fidelity mask-entry     # one of them, resumable: five minutes per run on two cores
python -m benchmarks.fidelity.report         # this page, from benchmarks/results/fidelity/
```
"""

_DEFAULTS = """## Evidence for the presets

The last column names the experiments below. [Paper and assumptions](paper.md) has the defaults of the models and of
the presets `paper` and `stable`. Settings without a measurement are marked. Every experiment except `faces...` used
`quick` and drawn faces only.

"""


def main() -> None:
    """Write the page."""
    DOCS.joinpath("fidelity.md").write_text(page(FOLDER))


def page(folder: Path) -> str:
    """The page as Markdown, from every result of the folder."""
    sections = [_section(name, folder / name) for name in EXPERIMENTS if (folder / name).is_dir()]
    sections += [text for text in [asked_report.section(folder / "asked")] if text]
    return "\n".join([_HEAD, _DEFAULTS + table(["setting", *defaults.PRESETS, "evidence"], defaults.rows()), *sections])


def read(folder: Path, experiment: Experiment) -> dict[str, list[Result]]:
    """Results of each variant, by seed.

    Raises:
        ValueError: a file of a variant that the experiment does not have.
    """
    found: dict[str, list[Result]] = {name: [] for name in experiment.variants}
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        if result["variant"] not in found:
            raise ValueError(f"{file}: the experiment has no variant {result['variant']!r}")
        found[result["variant"]].append(result)
    return {name: results for name, results in found.items() if results}


def _section(name: str, folder: Path) -> str:
    experiment = EXPERIMENTS[name]
    found = read(folder, experiment)
    timed = folder.parent / f"step-time-{name}.json"
    times = json.loads(timed.read_text()) if timed.exists() else {}
    columns = {"variant": list(found)} | _measured(experiment, found)
    if times:
        columns["time"] = [f"{times['ratios'][variant]:.2f}" for variant in found]
    if "milliseconds" in times:
        columns["ms a step"] = [f"{times['milliseconds'][variant]:.0f}" for variant in found]
    anyone = next(iter(found.values()))[0]
    detail = _detailed(experiment, found) if experiment.detailed else ""
    words = "\n".join(f"- *{variant}*: {_code(results[0]['words'])}" for variant, results in found.items())
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return (
        f"## {name}\n\n{experiment.question}\n\n{table(list(columns), rows)}\n{_bounds(stages(anyone)[-1])}\n\n"
        f"{detail}{experiment.finding}\n\nSettings:\n\n{words}\n\n{_origin(name, found)}{_clock(times)}\n"
    )


def _measured(experiment: Experiment, found: dict[str, list[Result]]) -> dict[str, list[str]]:
    """The columns of figures, one entry a variant."""
    ends = [_at(results, len(experiment.stages) - 1) for results in found.values()]
    columns = {
        "parameters": [f"{results[0]['parameters']:,}" for results in found.values()],
        "seeds": [_seeds(results, len(end)) for results, end in zip(found.values(), ends, strict=True)],
    }
    if experiment.equal_time:
        columns["steps"] = [" / ".join(sorted(results[0]["stages"], key=int)) for results in found.values()]
    for at, steps in enumerate(experiment.stages):
        columns[_stage("mIoU", experiment, steps)] = [
            _spread([stage["mask_agreement"]["miou"] for stage in _at(results, at)]) for results in found.values()
        ]
    columns["of the way to the ceiling"] = [
        f"{statistics.mean(s['floor_to_ceiling'] for s in end):.0%}" if end else "–" for end in ends
    ]
    columns["diversity"] = [_spread([stage["diversity"]["same_mask"] for stage in end]) for end in ends]
    if any(ends) and all("distances" in stage for end in ends for stage in end):
        columns["proxy distance"] = [_spread([_proxy(stage)["frechet"]["value"] for stage in end]) for end in ends]
    return columns


def _at(results: list[Result], stage: int) -> list[Result]:
    """What those of the results that went so far measured at a stage."""
    return [stages(result)[stage] for result in results if len(result["stages"]) > stage]


def _seeds(results: list[Result], finished: int) -> str:
    return str(len(results)) if finished == len(results) else f"{len(results)}, {finished} to the end"


def _stage(figure: str, experiment: Experiment, steps: int) -> str:
    """A column of a figure at a stage."""
    if not experiment.equal_time:
        return f"{figure}, {steps} steps"
    return figure if len(experiment.stages) == 1 else f"{figure}, time of {steps} steps"


def _detailed(experiment: Experiment, found: dict[str, list[Result]]) -> str:
    """Tables of small classes, eyes and consistency: at the last stage of all, and at the end of those that got there.

    Below them stands what real images have.
    """
    reached = min(len(result["stages"]) for results in found.values() for result in results)
    tables = [_small(experiment, found)]
    for at in sorted({reached - 1, len(experiment.stages) - 1}):
        if there := {name: seen for name, results in found.items() if (seen := _at(results, at))}:
            tables.append(_consistency(_stage("eyes and consistency", experiment, experiment.stages[at]), there))
    real = stages(next(iter(found.values()))[0])[-1]
    figures = real["consistency"]["autoencoder"]
    mean = f"small {small_classes(real['autoencoder_ceiling']):.3f}, both eyes {figures['both_eyes']:.3f}, "
    parts = f"iris {figures['iris_distance']:.3f}, brows {figures['brow_distance']:.3f}, "
    return "\n".join(tables) + (
        f"\nSmall: mean IoU of {', '.join(SMALL)}. Iris, brows and hair chroma are ratios to real images after the "
        f"autoencoder (1 is as consistent as they are, more is less). Those have {mean}{parts}hair chroma "
        f"{figures['hair_chroma_variance']:.5f}: see [Evaluation](evaluation.md).\n\n"
    )


def _small(experiment: Experiment, found: dict[str, list[Result]]) -> str:
    columns = {"variant": list(found)}
    for at, steps in enumerate(experiment.stages):
        reached = [_at(results, at) for results in found.values()]
        columns[_stage("small", experiment, steps)] = [
            _spread([small_classes(stage["mask_agreement"]) for stage in each]) for each in reached
        ]
    return table(list(columns), [list(row) for row in zip(*columns.values(), strict=True)])


def _consistency(title: str, found: dict[str, list[Result]]) -> str:
    """A table of eyes and consistency from the stages of each variant."""
    columns = {title: list(found)}
    for eye in ("l_eye", "r_eye"):
        columns[eye] = [_spread([stage["mask_agreement"]["iou"][eye] for stage in each]) for each in found.values()]
    eyes = [[stage["consistency"]["generated"]["both_eyes"] for stage in each] for each in found.values()]
    columns["both eyes"] = list(map(_spread, eyes))
    for key, name in (("iris_distance", "iris"), ("brow_distance", "brows"), ("hair_chroma_variance", "hair chroma")):
        columns[name] = [_spread([s["consistency"]["ratio"][key] for s in each], 2) for each in found.values()]
    return table(list(columns), [list(row) for row in zip(*columns.values(), strict=True)])


def small_classes(agreement: Result) -> float:
    """Mean IoU of the small classes that occur in the masks."""
    return statistics.mean(agreement["iou"][name] for name in SMALL if name in agreement["iou"])


def stages(result: Result) -> list[Result]:
    """What was measured, stage by stage."""
    return [result["stages"][steps] for steps in sorted(result["stages"], key=int)]


def _proxy(stage: Result) -> Result:
    return next(iter(stage["distances"].values()))


def _code(words: str) -> str:
    return f"`{words}`" if words else "unchanged"


def _spread(values: list[float], digits: int = 3) -> str:
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _bounds(stage: Result) -> str:
    ceiling, after = stage["ceiling"]["miou"], stage["autoencoder_ceiling"]["miou"]
    proxy = ""
    if "distances" in stage:
        found = _proxy(stage)
        halves = f"one half of the real faces against the other {found['noise_floor']['value']:.2f}."
        proxy = f" Proxy: {found['protocol']}; {halves}"
    return (
        f"Floor (faces against other masks) {stage['floor']['miou']:.3f}; ceiling (real faces) {ceiling:.3f}; real "
        f"faces after the autoencoder {after:.3f}. Diversity: RMS difference between samples of one mask, images in "
        "[-1, 1]." + proxy
    )


def _clock(times: Result) -> str:
    if not times:
        return ""
    timed = times.get("timed", "forward and backward, without the optimizer")
    threads = f", {times['threads']} thread(s)" if "threads" in times else ""
    place = f"commit `{times['commit']}`, {times['hardware']['processor']}{threads}"
    return f" Time is {timed}: `{times['command']}`, {place}."


def _origin(name: str, found: dict[str, list[Result]]) -> str:
    results = [result for some in found.values() for result in some]
    # A result from before stages had commits of their own has one for all.
    known = {stage.get("commit", result["commit"]) for result in results for stage in result["stages"].values()}
    commits = ", ".join(f"`{commit}`" for commit in sorted(known))
    seeds = ", ".join(str(seed) for seed in sorted({result["seed"] for result in results}))
    places = sorted({r["hardware"]["gpu"] or r["hardware"]["processor"] for r in results})
    torches = ", ".join(sorted({result["versions"]["torch"] for result in results}))
    return (
        f"`python -m benchmarks.fidelity {name}`, commit {commits}, seeds {seeds}, {'; '.join(places)}, "
        f"torch {torches}, {results[0]['masks']} masks."
    )


if __name__ == "__main__":
    main()
