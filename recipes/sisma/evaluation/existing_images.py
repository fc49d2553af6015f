"""Evaluate a folder of existing images against the real images of the same masks, whoever generated them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.sisma.arguments import UsageError
from recipes.sisma.evaluation.generated import SampleGroups, read_images
from recipes.sisma.evaluation.held_out import available, pair_ids, read_held_out
from recipes.sisma.evaluation.image_folder import common_side, find_images
from recipes.sisma.evaluation.measure import Images, NamedParser, load_metrics, load_named_parser, measure_images
from recipes.sisma.evaluation.results import description, write_result
from recipes.sisma.evaluation.settings import Settings
from recipes.sisma.image_names import split_image_name
from recipes.sisma.pairs import held_out_pairs, training_pairs
from recipes.sisma.presets import Config
from recipes.sisma.runs import check_writable


def evaluate_images(
    folder: Path, settings: Settings, *, command: str, parser: NamedParser | None = None
) -> dict[str, Any]:
    """Measure a folder of images and write result, picture and report.

    Args:
        folder: holds ``<id>.png`` for every test mask, or several ``<id>--<number>.png``, which count for the
            diversity.
        settings: ``data``, ``out``, ``masks`` (0 means all, and 128 drawn ones), ``parser`` (empty means none), and the
            distances. Real images are cropped and resized to the size of the generated ones.
        command: recorded as the command.
        parser: used instead of ``settings.parser``.

    Returns:
        The content of ``result.json``.

    Raises:
        FileNotFoundError: no such folder, data, parser or weights of a distance.
        ValueError: images and masks that do not match; images that are grey, have alpha or differ in size; LPIPS
            without several images a mask; or what `load_metrics` rejects.
    """
    if not settings.data:
        raise UsageError("images= needs data=PREPARED, the folder whose masks they were made from, or data=drawn")
    config = Config(preset="", run="", data=settings.data)
    limit = settings.masks or config.evaluate_masks
    ids = pair_ids(pairs := held_out_pairs(config, limit))
    count = available(pairs, settings.masks or len(ids))
    files, groups = find_images(folder, ids, count)
    config.image_size = common_side([*files, *(file for group in groups for file in group)])
    pairs = held_out_pairs(config, limit)
    parser = parser or load_named_parser(settings.parser or "none", pairs.labels)
    metrics = load_metrics(parser, settings, pairs.labels, count, config.image_size)
    if metrics.lpips is not None and not groups:
        raise ValueError(f"{folder}: LPIPS diversity needs several images a mask, <id>--1.png, <id>--2.png and so on")
    out = Path(settings.out) if settings.out else folder.with_name(f"{folder.name}-evaluation")
    check_writable(out)

    generated = read_images(files)
    held_out = read_held_out(pairs, count, pairs.labels)
    sampled_ids = [found[0] for group in groups if (found := split_image_name(group[0].stem))]
    images = Images(held_out, generated, SampleGroups(groups), sampled_ids, "given")

    result, parsed = measure_images(images, metrics, training_pairs(config) if metrics.distances else [])
    result |= {"images": folder.name, **description(config, command)}
    write_result(out, result, images, parsed)
    return result
