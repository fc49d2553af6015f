"""Measure a run: ``python -m recipes.sisma.evaluate run=RUN [masks=128] [parser=FILE] [solver=...] [steps=...]``.

    python -m recipes.sisma.evaluate run=runs/quick
    python -m recipes.sisma.evaluate run=runs/paper masks=2000 fid=sdm-oasis lpips=true samples=10 weights=FOLDER

Writes ``result.json``, ``result.png`` and ``report.html`` into the run. A parser labels the generated images; their
agreement with the masks they were made from stands between a floor (the same images against other images' masks) and a
ceiling (the parser on real held-out images).

The images are kept in ``RUN/evaluation``: stopped at any point and given again, the command goes on where it was.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.sisma.arguments import from_command_line, run_command
from recipes.sisma.distances import DistanceSettings, distances, load_lpips, load_measures, lpips_diversity
from recipes.sisma.generated import Wanted, evaluation_folder, make_missing, read_images
from recipes.sisma.pairs import held_out_pairs, training_pairs
from recipes.sisma.parser import SHIPPED, FaceParser, load_parser
from recipes.sisma.pictures import save_sheet, to_uint8
from recipes.sisma.provenance import provenance
from recipes.sisma.report import write_report
from recipes.sisma.runs import LoadedRun, check_writable, find_run, load_run
from ssmgen.data import CELEBAMASK19
from ssmgen.metrics import FID_PROTOCOLS, MaskAgreement, pairwise_rms
from ssmgen.training import derived_seed

_SHEET_ROWS, _SHEET_SAMPLES = 6, 4


@dataclass
class Settings(DistanceSettings):
    """Keys of the command line; 0, empty and a negative ``guidance_scale`` take the run's own.

    Attributes:
        run: the run's folder, or ``hf://OWNER/NAME`` for one on the hub.
        masks: unseen masks.
        parser: ``drawn``, ``none`` or a file.
        solver, steps, shift, guidance_scale: other than the run's.
        diversity_masks, samples: how many of the masks are sampled how many times for the diversity.
        batch_size, micro_batch: images in a call of the model, see `evaluate_run`.
    """

    run: str = "runs/quick"
    masks: int = 0
    parser: str = ""
    solver: str = ""
    steps: int = 0
    shift: float = 0.0
    guidance_scale: float = -1.0
    diversity_masks: int = 16
    samples: int = 4
    batch_size: int = 16
    micro_batch: int = 0


def main(argv: list[str]) -> None:
    """Evaluate a run from the command line."""
    settings = from_command_line(Settings(), argv)
    evaluate_run(
        find_run(settings.run),
        command=f"python -m recipes.sisma.evaluate {' '.join(argv)}".strip(),
        measure=settings,
        diversity_masks=settings.diversity_masks,
        samples=settings.samples,
        batch_size=settings.batch_size,
        micro_batch=settings.micro_batch,
        **{key: value for key in ("masks", "parser", "solver", "steps", "shift") if (value := getattr(settings, key))},
        **({"guidance_scale": settings.guidance_scale} if settings.guidance_scale >= 0 else {}),
    )


def evaluate_run(
    run: Path,
    *,
    command: str,
    masks: int | None = None,
    parser: str | None = None,
    seconds: float | None = None,
    measure: DistanceSettings | None = None,
    diversity_masks: int = 16,
    samples: int = 4,
    batch_size: int = 16,
    micro_batch: int = 0,
    **sampling: Any,
) -> dict[str, Any]:
    """Sample unseen masks, measure, and write ``result.json``, ``result.png`` and ``report.html``.

    Args:
        run: the run's folder.
        command: what to record as the command.
        masks: how many unseen masks; the run's own setting where None.
        parser: ``drawn``, ``none`` or a file; the run's own setting where None.
        seconds: of training, where the caller has just measured them; else read from the checkpoint.
        measure: which distances to real images are measured too; none where None.
        diversity_masks: of so many masks (the first) several images are made.
        samples: how many.
        batch_size: images in a call of the model; another one changes images by rounding only.
        micro_batch: fixes the images in a call whatever ``batch_size`` is, so that machines of different memory agree
            to the last digit; 0 leaves them to ``batch_size``.
        **sampling: ``solver``, ``steps``, ``shift``, ``guidance_scale`` other than the run's.

    Raises:
        FileNotFoundError: no such run, checkpoint, parser or weights of a distance.
        ValueError: fewer than two unseen masks or samples, sizes of batches that are none, a parser of other classes,
            or what `load_measures` refuses.
    """
    measure = measure or DistanceSettings()
    if diversity_masks < 1 or samples < 2:
        raise ValueError(f"diversity needs at least 1 mask and 2 samples, got {diversity_masks} and {samples}")
    if batch_size < 1 or micro_batch < 0:
        raise ValueError(f"batch_size must be at least 1 and micro_batch at least 0, got {batch_size}, {micro_batch}")
    loaded = load_run(run)
    check_writable(run)
    config = loaded.config
    judge = load_judge(parser or config.parser)
    pairs = held_out_pairs(config, masks or config.evaluate_masks)
    count = min(masks or config.evaluate_masks, len(pairs))
    if count < 2:
        raise ValueError(f"evaluation needs at least 2 unseen masks, got {count}")
    measures, lpips = load_measures(measure, count), load_lpips(measure)
    items = [pairs[i] for i in range(count)]
    real, true = torch.stack([image for image, _ in items]), torch.stack([mask for _, mask in items])
    chosen = _sampling(config, sampling)
    folder = evaluation_folder(loaded, run, chosen, micro_batch)
    single = _wanted(pairs, true)
    repeated = _repeated(single[:diversity_masks], samples)
    print(f"sampling {count} unseen masks, and {samples} images of some, into {folder}", file=sys.stderr)
    make_missing(loaded, [*single, *repeated], folder, chosen, batch_size=micro_batch or batch_size)
    generated = read_images(single, folder)
    several = read_images(repeated, folder).unflatten(0, (-1, samples))

    result: dict[str, Any] = {"masks": count, "sampling": chosen}
    parsed = None if judge is None else _parse(judge[0], generated)
    if judge is not None and parsed is not None:
        result |= _agreement(loaded, judge, parsed, real, true)
    ids = [image.name for image in single]
    if measures:
        train = training_pairs(config)
        result["distances"] = {m.name: distances(m, ids, generated, real, train, config.seed) for m in measures}
    if lpips is not None:
        result["lpips"] = lpips_diversity(lpips, ids[: len(several)], several)
    result["diversity"] = _diversity(several, generated[: 8 * diversity_masks])
    result |= {
        "seconds": round(loaded.seconds if seconds is None else seconds, 1),
        "steps": loaded.step,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        **provenance(command, config.seed),
    }
    _write_json(run / "result.json", result)
    save_sheet(run / "result.png", *_sheet(several, real, true))
    report = write_report(run, result, generated, several, real, true, parsed)
    print(summary(result))
    print(f"report: {report}")
    print(f"picture: {run / 'result.png'}")
    return result


def summary(result: dict[str, Any]) -> str:
    """What a person reads first."""
    lines = []
    if "mask_agreement" in result:
        generated, ceiling, floor = (result[key]["miou"] for key in ("mask_agreement", "ceiling", "floor"))
        lines.append(
            f"mask agreement on {result['masks']} unseen masks: mIoU {generated:.3f}, "
            f"{100 * result['floor_to_ceiling']:.0f} % of the way from shuffled masks ({floor:.3f}) to real images "
            f"({ceiling:.3f})"
        )
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
    if "lpips" in result:
        lines.append(f"LPIPS diversity {result['lpips']['value']:.3f}: {result['lpips']['protocol']}")
    diversity = result["diversity"]
    lines.append(
        f"diversity (RMS, images in [-1, 1]): {diversity['same_mask']:.3f} between samples of one mask, "
        f"{diversity['other_masks']:.3f} between masks"
    )
    return "\n".join(lines)


def _agreement(
    loaded: LoadedRun, judge: tuple[FaceParser, dict[str, Any]], of_generated: Tensor, real: Tensor, true: Tensor
) -> dict[str, Any]:
    parser, card = judge
    of_real = _parse(parser, real)
    decoded = to_uint8(_round_trip(loaded, real))
    result = {
        "mask_agreement": _agree(of_generated, true),
        "ceiling": _agree(of_real, true),
        "autoencoder_ceiling": _agree(_parse(parser, decoded), true),
        "floor": _agree(of_generated, true.roll(1, dims=0)),
        "parser": card,
    }
    low, high = result["floor"]["miou"], result["ceiling"]["miou"]
    result["floor_to_ceiling"] = (result["mask_agreement"]["miou"] - low) / (high - low)
    return result


def _round_trip(loaded: LoadedRun, images: Tensor) -> Tensor:
    device = next(loaded.model.parameters()).device
    batches = (images.float() / 127.5 - 1).to(device).split(16)
    return torch.cat([loaded.autoencoder.decode(loaded.autoencoder.encode(batch)) for batch in batches])


def _parse(parser: FaceParser, images: Tensor) -> Tensor:
    return torch.cat([parser.parse(batch.float() / 127.5 - 1) for batch in images.split(16)])


def _agree(predicted: Tensor, true: Tensor) -> dict[str, Any]:
    agreement = MaskAgreement(CELEBAMASK19.classes)
    agreement.update(predicted, true)
    return agreement.result()


def _wanted(pairs: Any, masks: Tensor) -> list[Wanted]:
    """One image of every mask; each has noise of its own, whatever else is sampled."""
    ids = getattr(pairs, "ids", [f"{index:05d}" for index in range(len(masks))])
    return [Wanted(str(id), mask, seed) for seed, (id, mask) in enumerate(zip(ids, masks, strict=False))]


def _repeated(images: list[Wanted], samples: int) -> list[Wanted]:
    """Several images of each mask, with noise that no other image has, however many are asked for."""
    return [
        Wanted(f"{image.name}-{k + 1}", image.mask, derived_seed(image.seed, "diversity", k))
        for image in images
        for k in range(samples)
    ]


def _diversity(several: Tensor, generated: Tensor) -> dict[str, float]:
    scaled = several.float() / 127.5 - 1
    return {
        "same_mask": sum(pairwise_rms(images) for images in scaled) / len(scaled),
        "other_masks": pairwise_rms(generated.float() / 127.5 - 1),
    }


def _sheet(several: Tensor, real: Tensor, true: Tensor) -> tuple[list[list[Tensor]], list[str]]:
    rows = [
        [CELEBAMASK19.colorize(mask), *images[:_SHEET_SAMPLES], photo]
        for images, photo, mask in zip(several[:_SHEET_ROWS], real, true, strict=False)
    ]
    return rows, ["mask", *[f"generated {i + 1}" for i in range(len(rows[0]) - 2)], "a real one"]


def _sampling(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    names = {"solver": "solver", "steps": "solver_steps", "shift": "shift", "guidance_scale": "guidance_scale"}
    return {key: getattr(config, name) for key, name in names.items()} | given


def load_judge(name: str) -> tuple[FaceParser, dict[str, Any]] | None:
    """The parser a ``parser=`` names: ``drawn`` is the shipped one, ``none`` is none, else a file."""
    if name == "none":
        return None
    file = SHIPPED if name == "drawn" else Path(name)
    parser, card = load_parser(file)
    if card["num_classes"] != len(CELEBAMASK19):
        raise ValueError(f"{file}: tells {card['num_classes']} classes apart, the masks have {len(CELEBAMASK19)}")
    return parser, card


def _write_json(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.rename(file)


if __name__ == "__main__":
    run_command(main)
