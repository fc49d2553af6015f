"""Evaluate a run: generate images of held-out masks, measure them, and write the result into the run.

The images are kept, so that a stopped evaluation continues where it was. ``RUN/evaluation/<key>/`` holds ``<id>.png``,
``<id>--<k>.png`` and ``record.json``. The key is a hash of everything an image depends on: weights, sampling settings
and the source of the masks; images of other settings are never mixed in. All figures are computed from these files, so
it does not matter when or by which process they were made.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recipes.sisma.evaluation.images import HeldOut, Images, available, by_shape, read_held_out, read_images
from recipes.sisma.evaluation.measure import NamedParser, load_metrics, load_named_parser, measure_images
from recipes.sisma.evaluation.nearest import training_images
from recipes.sisma.evaluation.results import description, write_result
from recipes.sisma.evaluation.settings import Settings
from recipes.sisma.image_names import check_mask_names, image_name
from recipes.sisma.pairs import held_out_pairs, training_pairs
from recipes.sisma.runs import Trained, check_writable, load_run, sampling_of
from ssmgen import MaskToImage, Sampling
from ssmgen.atomic import write_text
from ssmgen.data.images import write_png
from ssmgen.pipeline.mask_to_image import to_output
from ssmgen.training import derived_seed, progress_bar

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
    settings = _checked(settings)
    pipe, trained = load_run(run)
    config = trained.config
    check_writable(run)
    sampling = sampling_of(pipe, settings)
    parser = parser or load_named_parser(settings.parser or config.parser, pipe.recipe.labels)
    wanted = settings.masks or config.evaluate_masks
    pairs = held_out_pairs(config, wanted)
    count = available(pairs, wanted, requested=bool(settings.masks))
    metrics = load_metrics(parser, settings, pipe.recipe.labels, count, config.size)
    held_out = read_held_out(pairs, count, pipe.recipe.labels)
    training = training_images(config, config.flip) if settings.nearest else None
    check_mask_names(held_out.ids, range(1, settings.samples + 1))

    folder = _folder_for(run, trained, sampling, settings)
    images = _generate(pipe, held_out, folder, settings, sampling, processes)
    if images is None:
        return {}

    train, images = training_pairs(config) if metrics.distances else [], replace(images, training=training)
    result, parsed = measure_images(images, metrics, train, lambda real: _round_trip(pipe, real))
    result |= {
        "sampling": asdict(sampling),
        "sampling_seed": settings.seed,
        "seconds": round(trained.seconds if seconds is None else seconds, 1),
        "steps": trained.step,
        "schedule": trained.schedule,
        "parameters": sum(p.numel() for p in pipe.model.parameters()),
        **description(config, command),
    }
    write_result(run, result, images, parsed)
    return result


def _checked(settings: Settings) -> Settings:
    """The settings with the default number of samples filled in, after a check of those that images depend on."""
    samples = settings.samples or (_LPIPS_SAMPLES if settings.lpips else _SAMPLES)
    if settings.diversity_masks < 1 or samples < 2:
        raise ValueError(f"diversity needs at least 1 mask and 2 samples, got {settings.diversity_masks} and {samples}")
    if settings.batch_size < 1 or settings.micro_batch < 0:
        given = f"{settings.batch_size} and {settings.micro_batch}"
        raise ValueError(f"batch_size must be at least 1 and micro_batch at least 0, got {given}")
    return replace(settings, samples=samples)


def _generate(
    pipe: MaskToImage, held_out: HeldOut, folder: Path, settings: Settings, sampling: Sampling, processes: Any
) -> Images | None:
    """This process's share of the images; in the first process then all of them, read from the files."""
    single = one_per_mask(held_out.ids, held_out.masks, settings.seed)
    sampled = single[: settings.diversity_masks]
    specs = [*single, *several_per_mask(sampled, settings.samples)]
    rank, ranks = (processes.process_index, processes.num_processes) if processes else (0, 1)
    if rank == 0:
        several = f"{settings.samples} images of {len(sampled)} of them"
        shared = f", {ranks} processes" if ranks > 1 else ""
        print(f"sampling {len(single)} unseen masks, and {several}, into {folder}{shared}", file=sys.stderr)
    batch_size = settings.micro_batch or settings.batch_size
    draw_missing(pipe, specs, folder, sampling, batch_size=batch_size, process=rank, processes=ranks)
    if processes:
        processes.wait_for_everyone()
    if rank:
        return None
    numbers = range(1, settings.samples + 1)
    samples = {one.name: [folder / f"{image_name(one.name, k)}.png" for k in numbers] for one in sampled}
    generated = read_images([folder / f"{one.name}.png" for one in single])
    return Images(held_out, generated, samples, f"seed={settings.seed}")


def _round_trip(pipe: MaskToImage, images: Tensor) -> Tensor:
    """uint8 images through the autoencoder."""
    batches = (images.float() / 127.5 - 1).to(pipe.device).split(16)
    return torch.cat([to_output(pipe.decode(pipe.autoencoder.encode(batch)), "uint8") for batch in batches])


class ImageSpec(NamedTuple):
    """An image to generate: its name, its mask ``(height, width)`` and the seed of its noise."""

    name: str
    mask: Tensor
    seed: int


def one_per_mask(ids: Sequence[str], masks: Sequence[Tensor], seed: int) -> list[ImageSpec]:
    """An image of every mask, whose noise depends only on ``seed`` and the mask's id, not on its position."""
    of_id = [int(id) if id.isdecimal() and len(id) < 10 else derived_seed(0, "image", id) for id in ids]
    seeds = [derived_seed(seed, "image", one) if seed else one for one in of_id]
    return [ImageSpec(id, mask, one) for id, mask, one in zip(ids, masks, seeds, strict=True)]


def several_per_mask(images: Sequence[ImageSpec], samples: int) -> list[ImageSpec]:
    """Several images of each mask; the noise of each does not depend on ``samples`` and is shared with no other."""
    return [
        ImageSpec(image_name(image.name, k + 1), image.mask, derived_seed(image.seed, "diversity", k))
        for image in images
        for k in range(samples)
    ]


def _folder_for(run: Path, trained: Trained, sampling: Sampling, settings: Settings) -> Path:
    """The folder for these weights, masks and settings; created if necessary."""
    record = {
        "weights": trained.weights,
        "source": held_out_pairs(trained.config, 1).fingerprint(),
        "sampling": asdict(sampling),
        "micro_batch": settings.micro_batch,
        "noise": f"by id, seed {settings.seed}, 64 bits",
    }
    text = json.dumps(record, indent=2, sort_keys=True)
    folder = run / "evaluation" / hashlib.sha256(text.encode()).hexdigest()[:12]
    check_writable(folder)
    write_text(folder / "record.json", text + "\n")
    return folder


def draw_missing(
    pipe: Callable[..., Tensor],
    images: Sequence[ImageSpec],
    folder: Path,
    sampling: Sampling,
    *,
    batch_size: int,
    process: int,
    processes: int,
) -> None:
    """Generate this process's share of the images that have no file yet.

    Rounding depends on the shapes in a call. The batches of each shape are therefore cut by position, whatever files
    exist and however many processes there are: a continued evaluation makes exactly the images it would have made.
    """
    groups = [[images[place] for place in places] for places, _ in by_shape([image.mask for image in images])]
    cut = [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
    batches = cut[process::processes]
    with progress_bar(sum(map(len, batches)), "img", what="sampling", quiet=process > 0) as bar:
        for batch in batches:
            files = [folder / f"{image.name}.png" for image in batch]
            if not all(file.is_file() for file in files):
                masks = torch.stack([image.mask for image in batch]).long()  # three of uint8 would be colours
                seeds = [image.seed for image in batch]
                pixels = pipe(masks, seed=seeds, batch_size=batch_size, output_type="uint8", sampling=sampling)
                for file, image in zip(files, pixels, strict=True):
                    write_png(file, image)
            bar.update(len(batch))
