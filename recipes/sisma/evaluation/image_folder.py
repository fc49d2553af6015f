"""Find images made by any model in a folder, by the ids of their masks.

``<id>.png`` is the image of a mask; ``<id>--<number>.png`` are several of it, as ``recipes.sisma.sample`` and
``recipes.sisma.evaluate`` name them. Every file is checked before anything is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.sisma.image_names import ambiguous_name, split_image_name
from ssmgen.data.files import IMAGE_SUFFIXES, files_with, stem_of

_LISTED = 5


def find_images(folder: Path, ids: Sequence[str], count: int) -> tuple[list[Path], list[list[Path]]]:
    """Find one file for each of the first ``count`` ids, and all numbered files of the ids that have several.

    Args:
        folder: the folder of images.
        ids: all ids of the split.
        count: how many of them are measured.

    Returns:
        One file for each id: ``<id>``, or the lowest-numbered one. Then the groups of numbered files, for the ids with
        at least two.

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
    files = [single.get(id) or numbered[id][min(numbered[id])] for id in selected]
    groups = {
        id: [file for _, file in sorted(numbered[id].items())] for id in selected if len(numbered.get(id, ())) > 1
    }
    sizes = {len(group): id for id, group in groups.items()}
    if len(sizes) > 1:
        raise ValueError(
            f"{folder}: every mask needs the same number of images for the diversity; "
            + ", ".join(f"{id} has {size}" for size, id in sizes.items())
        )
    return files, list(groups.values())


def common_side(files: Sequence[Path]) -> int:
    """The side in pixels that all images share.

    Raises:
        ValueError: an image that cannot be read, is not RGB or not square, or differs in size; names the file.
    """
    from PIL import Image

    side = 0
    for file in files:
        try:
            with Image.open(file) as image:
                mode, size = image.mode, image.size
        except OSError as error:
            raise ValueError(f"{file}: cannot be read as an image ({error})") from error
        if mode != "RGB":
            raise ValueError(f"{file}: is of mode {mode}, not RGB; save grey images and those with alpha as 8-bit RGB")
        if size[0] != size[1]:
            raise ValueError(f"{file}: is {size[0]} x {size[1]} pixels; images must be square")
        if side not in (0, size[0]):
            raise ValueError(f"{file}: is {size[0]} pixels wide, {files[0].name} is {side}; all must have one size")
        side = size[0]
    return side


def _files_by_id(folder: Path, known: set[str]) -> tuple[dict[str, Path], dict[str, dict[int, Path]], list[str]]:
    """Files named ``<id>``, files named ``<id>--<number>``, and the names of all others."""
    single: dict[str, Path] = {}
    numbered: dict[str, dict[int, Path]] = {}
    unknown = []
    for file in _image_files(folder):
        name = stem_of(file)
        id, number = split_image_name(name) or ("", 0)
        if name in known and id in known:
            raise ambiguous_name(name)
        if name in known:
            _add_unique(single, name, file)
        elif id in known:
            _add_unique(numbered.setdefault(id, {}), number, file)
        else:
            unknown.append(file.name)
    return single, numbered, unknown


def _add_unique(files: dict[Any, Path], key: Any, file: Path) -> None:
    if key in files:
        raise ValueError(f"{file.parent}: {files[key].name} and {file.name} are two images of one name; keep one")
    files[key] = file


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images")
    files = files_with(folder, IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return files


def _mismatch(folder: Path, ids: Sequence[str], missing: Sequence[str], unknown: Sequence[str]) -> str:
    lines = [f"{folder}: images and masks do not match; each mask needs one <id>.png or several <id>--<number>.png"]
    if missing:
        lines.append(f"  masks without an image, {len(missing)} of {len(ids)}: {_first_names(missing)}")
    if unknown:
        lines.append(f"  images without a mask, {len(unknown)}: {_first_names(unknown)}")
    return "\n".join([*lines, "  With masks=N only the first N masks of the split need one."])


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
