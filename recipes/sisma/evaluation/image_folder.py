"""Evaluate images made by any model against the real images of the same masks.

``<id>.png`` is the image of a mask; ``<id>--<number>.png`` are several of it, as ``recipes.sisma.sample`` and
``recipes.sisma.evaluate`` name them. Every file is checked before anything is measured.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.sisma.arguments import UsageError
from recipes.sisma.evaluation.images import Images, available, pair_ids, read_held_out, read_images
from recipes.sisma.evaluation.measure import NamedParser, load_metrics, load_named_parser, measure_images
from recipes.sisma.evaluation.nearest import training_images
from recipes.sisma.evaluation.results import description, write_result
from recipes.sisma.evaluation.settings import Settings
from recipes.sisma.image_names import ambiguous_name, split_image_name
from recipes.sisma.pairs import held_out_pairs, training_pairs
from recipes.sisma.presets import Config, checked_size
from recipes.sisma.runs import check_writable
from ssmgen.data.files import IMAGE_SUFFIXES, files_with, stem_of, unreadable

_LISTED = 5


def evaluate_images(
    folder: Path, settings: Settings, *, command: str, parser: NamedParser | None = None
) -> dict[str, Any]:
    """Measure a folder of images and write result, picture and report.

    Args:
        folder: holds ``<id>.png`` for every test mask, or several ``<id>--<number>.png``, which count for the
            diversity.
        settings: ``data``, ``out``, ``masks`` (0 means all, and 128 drawn ones), ``parser`` (empty means none), and the
            distances. Real images are cropped and resized to the size of the generated ones. Images of several sizes
            are buckets: each has the one of them that suits its mask.
        command: recorded as the command.
        parser: used instead of ``settings.parser``.

    Returns:
        The content of ``result.json``.

    Raises:
        FileNotFoundError: no such folder, data, parser or weights of a distance.
        ValueError: images and masks that do not match; images that are grey, have alpha or differ in size in another
            way than their masks; LPIPS without several images a mask; or what `load_metrics` rejects.
    """
    if not settings.data:
        raise UsageError("images= needs data=PREPARED, the folder whose masks they were made from, or data=drawn")
    config = Config(preset="", run="", data=settings.data)
    limit = settings.masks or config.evaluate_masks
    ids = pair_ids(pairs := held_out_pairs(config, limit))
    count = available(pairs, settings.masks or len(ids))
    files, samples = find_images(folder, ids, count)
    by_id = {id: [file, *samples.get(id, ())] for id, file in zip(ids, files, strict=False)}
    sizes = {file: size_of_file(file) for of_mask in by_id.values() for file in of_mask}
    config.image_size = checked_size(",".join(f"{height}x{width}" for height, width in dict.fromkeys(sizes.values())))
    if isinstance(config.size, list):
        _check_buckets(config, by_id, sizes)
    pairs = held_out_pairs(config, limit)
    parser = parser or load_named_parser(settings.parser or "none", pairs.labels)
    metrics = load_metrics(parser, settings, pairs.labels, count, config.size)
    if metrics.lpips is not None and not samples:
        raise ValueError(f"{folder}: LPIPS diversity needs several images a mask, <id>--1.png, <id>--2.png and so on")
    out = Path(settings.out) if settings.out else folder.with_name(f"{folder.name}-evaluation")
    check_writable(out)
    generated = read_images(files)
    # Whether their model saw mirrored images is not known here, and a mirrored copy is a copy.
    training = training_images(config, mirrored=True) if settings.nearest else None
    images = Images(read_held_out(pairs, count, pairs.labels), generated, samples, "given", training)
    result, parsed = measure_images(images, metrics, training_pairs(config) if metrics.distances else [])
    result |= {"images": folder.name, **description(config, command)}
    write_result(out, result, images, parsed)
    return result


def find_images(folder: Path, ids: Sequence[str], count: int) -> tuple[list[Path], dict[str, list[Path]]]:
    """Find one file for each of the first ``count`` ids of a split, and all numbered files of those with several.

    Returns:
        One file for each id: ``<id>``, or the lowest-numbered one. Then the numbered files by id, where there are two.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: ids without an image, images without an id, two files of one name, a name that fits two ids, or
            groups of different sizes.
    """
    single, numbered, unknown = _files_by_id(folder, set(ids))
    selected = list(ids)[:count]
    missing = [id for id in selected if id not in single and id not in numbered]
    if missing or unknown:
        raise ValueError(_mismatch(folder, selected, missing, unknown))
    groups = {id: [file for _, file in sorted(numbered[id].items())] for id in selected if id in numbered}
    files = [single.get(id) or groups[id][0] for id in selected]
    groups = {id: group for id, group in groups.items() if len(group) > 1}
    sizes = {len(group): id for id, group in groups.items()}
    if len(sizes) > 1:
        found = ", ".join(f"{id} has {size}" for size, id in sizes.items())
        raise ValueError(f"{folder}: every mask needs the same number of images for the diversity; {found}")
    return files, groups


def size_of_file(file: Path) -> tuple[int, int]:
    """(height, width) of an image.

    Raises:
        ValueError: an image that cannot be read, or is not RGB; names the file.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            mode, (width, height) = image.mode, image.size
    except OSError as error:
        raise ValueError(f"{file}: cannot be read as an image ({error})") from error
    if mode != "RGB":
        raise ValueError(f"{file}: is of mode {mode}, not RGB; save grey images and those with alpha as 8-bit RGB")
    return height, width


def _check_buckets(config: Config, by_id: dict[str, list[Path]], sizes: dict[Path, tuple[int, int]]) -> None:
    """Reject images of several sizes (height, width) unless each has the one that suits its mask best."""
    one_size = "all must have one size, or each the one of them that suits its mask"
    if config.data == "drawn":
        first, *others = sizes
        odd = next(file for file in others if sizes[file] != sizes[first])
        raise ValueError(f"{odd}: has another size than {first.name}; all images of drawn faces must have one size")
    pairs = held_out_pairs(config, len(by_id))
    for index, files in enumerate(by_id.values()):
        height, width = pairs.size[pairs.bucket_of(index)]  # type: ignore[attr-defined]
        for file in files:
            if sizes[file] != (height, width):
                found = f"{sizes[file][1]} x {sizes[file][0]} pixels, and {width} x {height} suits its mask"
                raise ValueError(f"{file}: is {found}; {one_size}")


def _files_by_id(folder: Path, known: set[str]) -> tuple[dict[str, Path], dict[str, dict[int, Path]], list[str]]:
    """Files named ``<id>``, files named ``<id>--<number>``, and the names of all others."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images")
    files = files_with(folder, IMAGE_SUFFIXES)
    if odd := unreadable(folder, IMAGE_SUFFIXES):
        raise ValueError("\n".join(f"{file}: {reason}" for file, reason in odd))
    if not files:
        raise FileNotFoundError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    single: dict[str, Path] = {}
    numbered: dict[str, dict[int, Path]] = {}
    unknown = []
    for file in files:
        name = stem_of(file)
        id, number = split_image_name(name) or ("", 0)
        if name in known and id in known:
            raise ambiguous_name(name)
        if name in known:
            other = single.setdefault(name, file)
        elif id in known:
            other = numbered.setdefault(id, {}).setdefault(number, file)
        else:
            unknown.append(file.name)
            continue
        if other != file:
            raise ValueError(f"{folder}: {other.name} and {file.name} are two images of one name; keep one")
    return single, numbered, unknown


def _mismatch(folder: Path, ids: Sequence[str], missing: Sequence[str], unknown: Sequence[str]) -> str:
    lines = [f"{folder}: images and masks do not match; each mask needs one <id>.png or several <id>--<number>.png"]
    if missing:
        lines.append(f"  masks without an image, {len(missing)} of {len(ids)}: {_first_names(missing)}")
    if unknown:
        lines.append(f"  images without a mask, {len(unknown)}: {_first_names(unknown)}")
    return "\n".join([*lines, "  With masks=N only the first N masks of the split need one."])


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
