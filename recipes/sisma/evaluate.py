"""Measure a run or a folder of images: ``python -m recipes.sisma.evaluate run=RUN`` or ``images=FOLDER data=PREPARED``.

    python -m recipes.sisma.evaluate run=runs/quick
    python -m recipes.sisma.evaluate run=runs/paper masks=2000 fid=sdm-oasis lpips=true diversity_masks=2000 weights=DIR
    python -m recipes.sisma.evaluate images=faces data=prepared parser=runs/parser.safetensors
    torchrun --nproc-per-node 2 -m recipes.sisma.evaluate run=runs/quick

Writes ``result.json``, ``result.png`` and ``report.html`` into the run, beside those that say more of the same weights
(`recipes.sisma.results`). A parser labels the generated images; their
agreement with the masks they were made from stands between a floor (the same images against other images' masks) and a
ceiling (the parser on real held-out images).

The images are kept in ``RUN/evaluation``: stopped at any point and given again, the command goes on where it was.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.sisma.arguments import UsageError, command_line, from_command_line, run_command
from recipes.sisma.distances import DistanceSettings
from recipes.sisma.evaluation.image_folder import common_side, find_images
from recipes.sisma.generated import (
    Groups,
    evaluation_folder,
    make_missing,
    one_each,
    pair_ids,
    read_images,
    some_more,
)
from recipes.sisma.image_names import check_mask_names, split_image_name
from recipes.sisma.measure import Images, Judge, load_gauges, load_judge, measure_images
from recipes.sisma.pairs import held_out_pairs, training_pairs
from recipes.sisma.pictures import save_mask_sheet, to_uint8
from recipes.sisma.presets import Config
from recipes.sisma.provenance import provenance
from recipes.sisma.report import write_report
from recipes.sisma.results import place
from recipes.sisma.runs import LoadedRun, all_processes, check_writable, find_run, load_run, sampling_settings
from ssmgen.atomic import write_text
from ssmgen.data import CELEBAMASK19
from ssmgen.metrics import FID_PROTOCOLS
from ssmgen.model_folder import SAMPLING
from ssmgen.training import progress_bar

_SHEET_ROWS, _SHEET_SAMPLES = 6, 4
_SAMPLES, _LPIPS_SAMPLES = 4, 10  # ten make the 45 pairs that the literature counts


@dataclass
class Settings(DistanceSettings):
    """Keys of the command line; what is 0, empty or None is the run's own.

    Attributes:
        run: the run's folder, or ``hf://OWNER/NAME`` for one on the hub.
        images: a folder of images that are there already, measured instead of a run: see `evaluate_images`.
        data: for ``images``: the prepared folder whose test masks they were made from, or ``drawn``.
        out: for ``images``: where the result goes; empty is beside them, ``FOLDER-evaluation``.
        masks: unseen masks.
        parser: ``drawn``, ``none`` or a file.
        solver, steps, shift, guidance_scale, guidance_start: other than the run's.
        diversity_masks, samples: how many of the masks are sampled how many times for the diversity; 0 samples are 4,
            and 10 with ``lpips``.
        seed: of the noise of all images; the spread over several is what a figure can be trusted to.
        batch_size, micro_batch: images in a call of the model, see `evaluate_run`.
    """

    run: str = "runs/quick"
    images: str = ""
    data: str = ""
    out: str = ""
    masks: int = 0
    parser: str = ""
    solver: str | None = None
    steps: int | None = None
    shift: float | None = None
    guidance_scale: float | None = None
    guidance_start: float | None = None
    diversity_masks: int = 16
    samples: int = 0
    seed: int = 0
    batch_size: int = 16
    micro_batch: int = 0


def main(argv: list[str]) -> None:
    """Evaluate a run or a folder of images from the command line."""
    settings = from_command_line(Settings(), argv)
    command = command_line("evaluate", *argv)
    given = [word.partition("=")[0] for word in argv]
    processes = all_processes()
    if settings.images:
        _refuse(given, ("run", *SAMPLING, "samples", "diversity_masks", "seed", "batch_size", "micro_batch"))
        if processes.is_main_process:  # there is nothing to share: the images are there
            evaluate_images(
                Path(settings.images), settings.data, command=command, out=settings.out or None, measure=settings,
                masks=settings.masks or None, parser=settings.parser or "none",
            )  # fmt: skip
        return
    _refuse(given, ("data", "out"), "needs images=FOLDER; a run knows its data and keeps its result")
    with processes.main_process_first():
        run = find_run(settings.run)
    evaluate_run(
        run,
        command=command,
        measure=settings,
        diversity_masks=settings.diversity_masks,
        samples=settings.samples,
        seed=settings.seed,
        batch_size=settings.batch_size,
        micro_batch=settings.micro_batch,
        processes=processes,
        masks=settings.masks or None,
        parser=settings.parser or None,
        **{name: getattr(settings, name) for name in SAMPLING},
    )


def evaluate_run(
    run: Path,
    *,
    command: str,
    masks: int | None = None,
    parser: str | Judge | None = None,
    seconds: float | None = None,
    measure: DistanceSettings | None = None,
    diversity_masks: int = 16,
    samples: int = 0,
    seed: int = 0,
    batch_size: int = 16,
    micro_batch: int = 0,
    processes: Any = None,
    **sampling: Any,
) -> dict[str, Any]:
    """Sample unseen masks, measure, and write result, picture and report into the run, as `recipes.sisma.results` says.

    Args:
        run: the run's folder.
        command: what to record as the command.
        masks: how many unseen masks; the run's own setting where None.
        parser: ``drawn``, ``none``, a file or a `Judge` around any parser; the run's own setting where None.
        seconds: of training, where the caller has just measured them; else read from the checkpoint.
        measure: which distances to real images are measured too; none where None.
        diversity_masks: of so many masks (the first) several images are made.
        samples: how many; 0 is 4, and 10 where LPIPS is measured.
        seed: of the noise; the noise of an image depends on it and on the mask's id alone.
        batch_size: images in a call of the model; another one changes images by rounding only.
        micro_batch: fixes the images in a call whatever ``batch_size`` is, so that machines of different memory agree
            to the last digit; 0 leaves them to ``batch_size``.
        processes: accelerate's `PartialState`: every process makes its share of the images, the first one measures.
        **sampling: ``solver``, ``steps``, ``shift``, ``guidance_scale``, ``guidance_start`` other than the run's.

    Returns:
        What is in ``result.json``; nothing in the processes that only sample.

    Raises:
        FileNotFoundError: no such run, checkpoint, parser or weights of a distance.
        ValueError: fewer than two unseen masks or samples, sizes of batches that are none, a parser of other classes,
            or what `load_gauges` refuses.
    """
    distances = measure or DistanceSettings()
    samples = samples or (_LPIPS_SAMPLES if distances.lpips else _SAMPLES)
    if diversity_masks < 1 or samples < 2:
        raise ValueError(f"diversity needs at least 1 mask and 2 samples, got {diversity_masks} and {samples}")
    if batch_size < 1 or micro_batch < 0:
        raise ValueError(f"batch_size must be at least 1 and micro_batch at least 0, got {batch_size}, {micro_batch}")
    loaded = load_run(run)
    check_writable(run)
    config = loaded.config
    chosen = sampling_settings(config, loaded.model, sampling)
    judge = parser if isinstance(parser, Judge) else load_judge(parser or config.parser)
    pairs = held_out_pairs(config, masks or config.evaluate_masks)
    count = _count(pairs, masks or config.evaluate_masks, asked=masks is not None)
    gauges = load_gauges(judge, distances, CELEBAMASK19, count, config.image_size)
    real, true = _read_pairs(pairs, count)
    ids = pair_ids(pairs)[:count]
    check_mask_names(ids, range(1, samples + 1))
    single = one_each(ids, true, seed)
    repeated = some_more(single[:diversity_masks], samples)
    folder = evaluation_folder(loaded, run, chosen, seed, micro_batch)
    rank, ranks = (processes.process_index, processes.num_processes) if processes else (0, 1)
    if rank == 0:
        shared = f", {ranks} processes" if ranks > 1 else ""
        print(
            f"sampling {count} unseen masks, and {samples} images of {min(count, diversity_masks)} of them, into "
            f"{folder}{shared}",
            file=sys.stderr,
        )
    make_missing(
        loaded,
        [*single, *repeated],
        folder,
        chosen,
        batch_size=micro_batch or batch_size,
        process=rank,
        processes=ranks,
    )
    if processes:
        processes.wait_for_everyone()
    if rank:
        return {}
    files = [[folder / f"{image.name}.png" for image in wanted] for wanted in (single, repeated)]
    groups = Groups([files[1][i : i + samples] for i in range(0, len(repeated), samples)])
    images = Images(ids, true, real, read_images(files[0]), groups, ids[: len(groups)], CELEBAMASK19, f"seed={seed}")
    train = training_pairs(config) if gauges.measures else []
    result, parsed = measure_images(images, gauges, train, lambda photos: _round_trip(loaded, photos))
    result |= {
        "sampling": chosen,
        "sampling_seed": seed,
        "seconds": round(loaded.seconds if seconds is None else seconds, 1),
        "steps": loaded.step,
        "schedule": loaded.schedule,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        **_about(config, command),
    }
    _write(run, result, images, parsed)
    return result


def evaluate_images(
    folder: Path,
    data: str,
    *,
    command: str,
    out: str | Path | None = None,
    masks: int | None = None,
    parser: str | Judge = "none",
    measure: DistanceSettings | None = None,
) -> dict[str, Any]:
    """Measure images that are there already against the real ones of the same ids, whoever made them.

    Args:
        folder: holds ``<id>.png`` for every test mask, or several ``<id>--<number>.png``, which count for the
            diversity.
        data: the prepared folder the masks are from, or ``drawn``. Real images are cut and resized to the generated
            ones' size.
        command: what to record as the command.
        out: where the result goes; ``FOLDER-evaluation`` beside the images where None.
        masks: only the first so many test masks; all where None, and 128 drawn ones.
        parser: as for `evaluate_run`.
        measure: which distances to real images are measured too; none where None.

    Raises:
        FileNotFoundError: no such folder, data, parser or weights of a distance.
        ValueError: images and masks that do not match, images that are grey, have alpha or differ in size, LPIPS
            without several images a mask, or what `load_gauges` refuses.
    """
    if not data:
        raise UsageError("images= needs data=PREPARED, the folder whose masks they were made from, or data=drawn")
    distances = measure or DistanceSettings()
    config = Config(preset="", run="", data=data)
    pairs = held_out_pairs(config, masks or config.evaluate_masks)
    ids = pair_ids(pairs)
    count = _count(pairs, masks or len(ids), asked=True)
    files, groups = find_images(folder, ids, count)
    config.image_size = common_side([*files, *(file for group in groups for file in group)])
    pairs = held_out_pairs(config, masks or config.evaluate_masks)
    labels = pairs.labels
    judge = parser if isinstance(parser, Judge) else load_judge(parser, labels)
    gauges = load_gauges(judge, distances, labels, count, config.image_size)
    if gauges.lpips is not None and not groups:
        raise ValueError(f"{folder}: LPIPS diversity needs several images a mask, <id>--1.png, <id>--2.png and so on")
    target = Path(out) if out else folder.with_name(f"{folder.name}-evaluation")
    check_writable(target)
    generated = read_images(files)
    real, true = _read_pairs(pairs, count)
    names = [found[0] for group in groups if (found := split_image_name(group[0].stem))]
    images = Images(ids[:count], true, real, generated, Groups(groups), names, labels, "given")
    result, parsed = measure_images(images, gauges, training_pairs(config) if gauges.measures else [])
    result |= {"images": folder.name, **_about(config, command)}
    _write(target, result, images, parsed)
    return result


def summary(result: dict[str, Any]) -> str:
    """What a person reads first."""
    lines = []
    if "mask_agreement" in result:
        generated, ceiling, floor = (result[key]["miou"] for key in ("mask_agreement", "ceiling", "floor"))
        way = result["floor_to_ceiling"]
        between = "neither better nor worse than chance, as the parser fails on real images" if way is None else (
            f"{round(100 * way)} % of the way from shuffled masks ({floor:.3f}) to real images ({ceiling:.3f})"
        )  # fmt: skip
        lines.append(f"mask agreement on {result['masks']} unseen masks: mIoU {generated:.3f}, {between}")
    else:
        lines.append(
            "mask agreement not measured: give parser=FILE, made by python -m recipes.sisma.parser data=FOLDER"
        )
    for name, found in result.get("distances", {}).items():
        what = "FID" if name in FID_PROTOCOLS else "Frechet distance (a proxy, not FID)"
        lines.append(
            f"{what} {found['frechet']['value']:.2f}, one half of the real images from the other "
            f"{found['noise_floor']['value']:.2f}: {found['protocol']}"
        )
        if "kernel_noise_floor" in found:  # results of earlier versions have none
            lines.append(
                f"kernel distance {found['kernel']['value']:.5f}, one half of the real images from the other "
                f"{found['kernel_noise_floor']['value']:.5f}: {found['kernel']['protocol']}"
            )
    if "lpips" in result:
        lines.append(f"LPIPS diversity {result['lpips']['value']:.3f}: {result['lpips']['protocol']}")
    diversity = result["diversity"]
    same = f"{diversity['same_mask']:.3f} between samples of one mask, " if "same_mask" in diversity else ""
    lines.append(f"diversity (RMS, images in [-1, 1]): {same}{diversity['other_masks']:.3f} between masks")
    return "\n".join(lines)


def _refuse(given: Sequence[str], keys: Sequence[str], why: str = "has no meaning for images that are there") -> None:
    """Keys that would silently do nothing."""
    idle = [key for key in given if key in keys]
    if idle:
        raise UsageError(f"{idle[0]}= {why}")


def _count(pairs: Any, wanted: int, *, asked: bool) -> int:
    """How many masks there are of those wanted, said where fewer than asked for."""
    if asked and wanted > len(pairs):
        print(f"note: there are {len(pairs)} unseen masks, not {wanted}", file=sys.stderr)
    return min(wanted, len(pairs))


def _read_pairs(pairs: Any, count: int) -> tuple[Tensor, Tensor]:
    """Real images and masks, stacked."""
    items = []
    with progress_bar(count, "img", what="real images") as bar:
        for index in range(count):
            items.append(pairs[index])
            bar.update()
    return torch.stack([image for image, _ in items]), torch.stack([mask for _, mask in items])


@torch.no_grad()
def _round_trip(loaded: LoadedRun, images: Tensor) -> Tensor:
    device = next(loaded.model.parameters()).device
    batches = (images.float() / 127.5 - 1).to(device).split(16)
    return to_uint8(torch.cat([loaded.autoencoder.decode(loaded.autoencoder.encode(batch)) for batch in batches]))


def _about(config: Config, command: str) -> dict[str, Any]:
    data = "drawn" if config.data == "drawn" else "prepared folder"
    return {"data": data, "image_size": config.image_size, **provenance(command, config.seed)}


def _write(folder: Path, result: dict[str, Any], images: Images, parsed: Tensor | None) -> None:
    """The files of the result, as `place` names them, and what a person reads first."""
    files = place(folder, result)
    write_text(files.json, json.dumps(result, indent=2) + "\n")
    _save_sheet(files.picture, images)
    write_report(files.report, result, images, parsed)
    print(summary(result))
    if files.note:
        print(f"note: {files.note}")
    print(f"report: {files.report}")
    print(f"picture: {files.picture}")


def _save_sheet(file: Path, images: Images) -> None:
    """The first masks that have several images, or the first of all."""
    several = images.several or [image.unsqueeze(0) for image in images.generated[:_SHEET_ROWS]]
    place = {id: index for index, id in enumerate(images.ids)}
    shown = [place[name] for name in (images.names or images.ids)[:_SHEET_ROWS]]
    groups = [group[:_SHEET_SAMPLES] for group in several[: len(shown)]]
    save_mask_sheet(file, images.true[shown], groups, images.real[shown], images.labels)


if __name__ == "__main__":
    run_command(main)
