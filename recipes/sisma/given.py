"""Images that somebody else made, found in a folder by the ids of the masks they were made from.

``<id>.png`` is the image of a mask; ``<id>--<number>.png`` are more of it, as ``recipes.sisma.sample`` and
``recipes.sisma.evaluate`` call them. Everything is looked at before anything is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.sisma.names import ambiguous, parted
from ssmgen.data.files import IMAGE_SUFFIXES, files_with, stem_of

_LISTED = 5


def find_given(folder: Path, ids: Sequence[str], count: int) -> tuple[list[Path], list[list[Path]]]:
    """One file for each of the first ``count`` ids, and for those that have several images, all the numbered ones.

    Args:
        folder: of the images.
        ids: of the split.
        count: how many of them are measured.

    Returns:
        The files of the ids: ``<id>``, or where that is not there the one with the lowest number; and the groups of
        numbered files of the ids that have at least two.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: ids without an image, images without an id, a name given twice or that could be of two ids, or
            groups of different sizes.
    """
    single: dict[str, Path] = {}
    numbered: dict[str, dict[int, Path]] = {}
    known, strangers = set(ids), []
    for file in _image_files(folder):
        name = stem_of(file)
        id, number = parted(name) or ("", 0)
        if name in known and id in known:
            raise ambiguous(name)
        if name in known:
            _take(single, name, file)
        elif id in known:
            _take(numbered.setdefault(id, {}), number, file)
        else:
            strangers.append(file.name)
    chosen = list(ids)[:count]
    missing = [id for id in chosen if id not in single and id not in numbered]
    if missing or strangers:
        raise ValueError(_mismatch(folder, chosen, missing, strangers))
    one = [single.get(id) or numbered[id][min(numbered[id])] for id in chosen]
    groups = {id: [file for _, file in sorted(numbered[id].items())] for id in chosen if len(numbered.get(id, ())) > 1}
    sizes = {len(files): id for id, files in groups.items()}
    if len(sizes) > 1:
        raise ValueError(
            f"{folder}: every mask needs the same number of images for the diversity; "
            + ", ".join(f"{id} has {size}" for size, id in sizes.items())
        )
    return one, list(groups.values())


def common_side(files: Sequence[Path]) -> int:
    """The side in pixels that all images share.

    Raises:
        ValueError: an image that is grey, has alpha or is no image, one that is not square, or one of another size;
            names the file.
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


def _take(found: dict[Any, Path], key: Any, file: Path) -> None:
    if key in found:
        raise ValueError(f"{file.parent}: {found[key].name} and {file.name} are two images of one name; keep one")
    found[key] = file


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images")
    files = files_with(folder, IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return files


def _mismatch(folder: Path, ids: Sequence[str], missing: Sequence[str], strangers: Sequence[str]) -> str:
    lines = [f"{folder}: the images and the masks do not match, one <id>.png or several <id>--<number>.png a mask"]
    if missing:
        lines.append(f"  masks without an image, {len(missing)} of {len(ids)}: {_some(missing)}")
    if strangers:
        lines.append(f"  images without a mask, {len(strangers)}: {_some(strangers)}")
    return "\n".join([*lines, "  With masks=N only the first N masks of the split need one."])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
