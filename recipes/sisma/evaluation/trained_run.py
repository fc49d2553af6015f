"""Evaluate a run: generate images of held-out masks, measure them, and write the result into the run."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.sisma.evaluation.generated import (
    SampleGroups,
    draw_missing,
    evaluation_folder,
    one_per_mask,
    read_images,
    several_per_mask,
)
from recipes.sisma.evaluation.held_out import HeldOut, available, read_held_out
from recipes.sisma.evaluation.measure import Images, NamedParser, load_metrics, load_named_parser, measure_images
from recipes.sisma.evaluation.results import description, write_result
from recipes.sisma.evaluation.settings import Settings
from recipes.sisma.image_names import check_mask_names
from recipes.sisma.pairs import held_out_pairs, training_pairs
from recipes.sisma.runs import Trained, check_writable, load_run, sampling_of
from ssmgen import MaskToImage, Sampling
from ssmgen.pipeline.mask_to_image import to_output

_SAMPLES, _LPIPS_SAMPLES = 4, 10  # ten give the 45 pairs of the literature


def evaluate_run(
    run: Path,
    settings: Settings,
    *,
    command: str,
    parser: NamedParser | None = None,
    seconds: float | None = None,
    processes: Any = None,
) -> dict[str, Any]:
    """Generate images of held-out masks, measure them, and write result, picture and report into the run.

    Args:
        run: the run's folder.
        settings: what to generate and to measure.
        command: recorded as the command.
        parser: used instead of ``settings.parser``.
        seconds: training time if the caller knows it better than the checkpoint.
        processes: accelerate's `PartialState`: every process generates its share of the images, the first one measures.

    Returns:
        The content of ``result.json``; empty in the processes that only generate images.

    Raises:
        FileNotFoundError: no such run, checkpoint, parser or weights of a distance.
        ValueError: settings out of range, or what `load_metrics` rejects.
    """
    samples = _checked_samples(settings)
    pipe, trained = load_run(run)
    config = trained.config
    check_writable(run)
    sampling = sampling_of(pipe, settings)
    parser = parser or load_named_parser(settings.parser or config.parser)
    pairs = held_out_pairs(config, settings.masks or config.evaluate_masks)
    count = available(pairs, settings.masks or config.evaluate_masks, requested=bool(settings.masks))
    metrics = load_metrics(parser, settings, pipe.recipe.labels, count, config.image_size)
    held_out = read_held_out(pairs, count, pipe.recipe.labels)
    check_mask_names(held_out.ids, range(1, samples + 1))

    folder = evaluation_folder(run, trained, sampling, settings.seed, settings.micro_batch)
    images = _draw(pipe, held_out, folder, settings, samples, sampling, processes)
    if images is None:
        return {}

    train = training_pairs(config) if metrics.distances else []
    result, parsed = measure_images(images, metrics, train, lambda real: _round_trip(pipe, real))
    result |= {
        "sampling": asdict(sampling),
        "sampling_seed": settings.seed,
        **_training(pipe, trained, seconds),
        **description(config, command),
    }
    write_result(run, result, images, parsed)
    return result


def _checked_samples(settings: Settings) -> int:
    """The number of images of a mask in the diversity, after a check of the settings it depends on."""
    samples = settings.samples or (_LPIPS_SAMPLES if settings.lpips else _SAMPLES)
    if settings.diversity_masks < 1 or samples < 2:
        raise ValueError(f"diversity needs at least 1 mask and 2 samples, got {settings.diversity_masks} and {samples}")
    if settings.batch_size < 1 or settings.micro_batch < 0:
        raise ValueError(
            f"batch_size must be at least 1 and micro_batch at least 0, got {settings.batch_size} and "
            f"{settings.micro_batch}"
        )
    return samples


def _draw(
    pipe: MaskToImage,
    held_out: HeldOut,
    folder: Path,
    settings: Settings,
    samples: int,
    sampling: Sampling,
    processes: Any,
) -> Images | None:
    """This process's share of the images; in the first process then all of them, read from the files."""
    single = one_per_mask(held_out.ids, held_out.masks, settings.seed)
    several = several_per_mask(single[: settings.diversity_masks], samples)
    rank, ranks = (processes.process_index, processes.num_processes) if processes else (0, 1)
    if rank == 0:
        shared = f", {ranks} processes" if ranks > 1 else ""
        print(
            f"sampling {len(single)} unseen masks, and {samples} images of {len(several) // samples} of them, into "
            f"{folder}{shared}",
            file=sys.stderr,
        )
    batch_size = settings.micro_batch or settings.batch_size
    specs = [*single, *several]
    draw_missing(pipe, specs, folder, sampling, batch_size=batch_size, process=rank, processes=ranks)
    if processes:
        processes.wait_for_everyone()
    if rank:
        return None
    files = [folder / f"{image.name}.png" for image in specs]
    groups = SampleGroups([files[i : i + samples] for i in range(len(single), len(files), samples)])
    generated = read_images(files[: len(single)])
    return Images(held_out, generated, groups, held_out.ids[: len(groups)], f"seed={settings.seed}")


def _round_trip(pipe: MaskToImage, images: Tensor) -> Tensor:
    """uint8 images through the autoencoder."""
    batches = (images.float() / 127.5 - 1).to(pipe.device).split(16)
    return torch.cat([to_output(pipe.decode(pipe.autoencoder.encode(batch)), "uint8") for batch in batches])


def _training(pipe: MaskToImage, trained: Trained, seconds: float | None) -> dict[str, Any]:
    return {
        "seconds": round(trained.seconds if seconds is None else seconds, 1),
        "steps": trained.step,
        "schedule": trained.schedule,
        "parameters": sum(p.numel() for p in pipe.model.parameters()),
    }
