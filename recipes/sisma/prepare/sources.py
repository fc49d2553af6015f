"""Find the image-mask pairs of a folder by the names of its files; none is opened."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from ssmgen.data.files import (
    IMAGE_SUFFIXES,
    NO_PNG,
    OTHER_KIND,
    files_with,
    listing,
    other_images,
    pair_files,
    stem_of,
    unreadable,
)
from ssmgen.data.labels import CELEBAMASK19
from ssmgen.registry import closest

IMAGES = "CelebA-HQ-img"
PARTS = "CelebAMask-HQ-mask-anno"
_ARCHIVE_SIZE = 30_000
_IDS_PER_FOLDER = 2000  # of parts


@dataclass(frozen=True)
class Problem:
    """A file, relative to the source, its fault, and the id of the pair that cannot be used because of it."""

    file: str
    reason: str
    id: str | None = None


@dataclass(frozen=True)
class Pair:
    """An image with its mask: a file of labels, or part files by class name."""

    id: str
    image: Path
    mask: Path | dict[str, Path]


@dataclass
class Source:
    """The pairs of a folder, the faults of its file names, and notes for the user."""

    root: Path
    layout: str
    pairs: list[Pair] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def relative_name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def add_problem(self, path: Path, reason: str, id: str | None = None) -> None:
        self.problems.append(Problem(self.relative_name(path), reason, id))


def find_source(root: Path, layout: str) -> Source:
    """Find the pairs in a folder, or in its ``CelebAMask-HQ``; ``layout`` is ``official``, ``folder`` or ``auto``.

    Raises:
        FileNotFoundError: the folder, or a folder that the layout needs, does not exist.
        ValueError: no pairs in it.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: " + ("is a file, expected a folder" if root.exists() else "no such folder"))
    inner = root / "CelebAMask-HQ"
    official = next((at for at in (root, inner) if (at / IMAGES).is_dir() or (at / PARTS).is_dir()), None)
    if layout == "official" or (layout == "auto" and official):
        return _find_official(official or root)
    return _find_folder(root)


def _find_folder(root: Path) -> Source:
    """Pair ``images/`` and ``masks/``, or ``x.jpg`` and ``x.png`` in one folder, by stem."""
    images, masks = root / "images", root / "masks"
    if images.is_dir() != masks.is_dir():
        missing, present = (masks, images) if images.is_dir() else (images, masks)
        raise FileNotFoundError(f"{missing}: no such folder, but {present} exists; both are needed")
    if not images.is_dir():
        images = masks = root
    matched, problems = pair_files(images, masks)
    source = Source(root, "folder", [Pair(stem, *paths) for stem, paths in matched.items()])
    for path, reason in problems:
        source.add_problem(path, reason, stem_of(path))
    if not matched and not problems:
        raise ValueError(
            f"{root}: no images in it; it holds {_contents(root)}. Expected {IMAGES}/ and {PARTS}/ (the official "
            "layout), or images/ and masks/ with files of the same names, or x.jpg beside x.png."
        )
    return source


def _find_official(root: Path) -> Source:
    """Pair the images and parts of the unpacked CelebAMask-HQ archive, or of a part of it, by id."""
    for name in (IMAGES, PARTS):
        if not (root / name).is_dir():
            raise FileNotFoundError(
                f"{root / name}: no such folder; {root} holds {_contents(root)}. The official layout has "
                f"{IMAGES}/<id>.jpg and {PARTS}/<id // {_IDS_PER_FOLDER}>/<id, 5 digits>_<part>.png; if the folder was "
                "renamed, rename it back."
            )
    source = Source(root, "official")
    images, parts = _official_images(source), _official_parts(source)
    if not images and not parts:
        raise ValueError(f"{root}: {IMAGES} and {PARTS} are both empty")
    source.pairs = [Pair(str(id), images[id], parts[id]) for id in sorted(images.keys() & parts.keys())]
    _add_images_without_parts(source, {id: images[id] for id in sorted(images.keys() - parts.keys())})
    if len(source.pairs) < _ARCHIVE_SIZE:
        source.notes.append(f"a part of the archive: {len(source.pairs)} of its {_ARCHIVE_SIZE} pairs")
    if without_image := len(parts.keys() - images.keys()):
        source.notes.append(f"the masks of {without_image} id(s) have no image in {IMAGES} and are left out")
    return source


def _official_images(source: Source) -> dict[int, Path]:
    """Images by id; every other file is a problem."""
    images: dict[int, Path] = {}
    folder = source.root / IMAGES
    for path in other_images(folder, IMAGE_SUFFIXES):
        source.add_problem(path, OTHER_KIND, path.stem)
    for path, reason in unreadable(folder, IMAGE_SUFFIXES):
        source.add_problem(path, reason, path.stem)
    for path in files_with(folder, IMAGE_SUFFIXES):
        if not re.fullmatch(r"0|[1-9][0-9]*", path.stem):
            source.add_problem(path, "is not named <id>.jpg, e.g. 0.jpg or 28000.jpg")
        elif int(path.stem) in images:
            source.add_problem(path, f"has the same id as {images[int(path.stem)].name}", path.stem)
        else:
            images[int(path.stem)] = path
    return images


def _official_parts(source: Source) -> dict[int, dict[str, Path]]:
    """Part files by id and class name; every other file is a problem."""
    parts: dict[int, dict[str, Path]] = defaultdict(dict)
    root = source.root / PARTS
    folders = (root, *(path for path in listing(root) if path.is_dir()))
    for path, reason in (fault for at in folders for fault in unreadable(at, IMAGE_SUFFIXES)):
        id = path.stem[:5]
        source.add_problem(path, reason, str(int(id)) if id.isdecimal() else None)
    for path in (path for at in folders for path in (*files_with(at, {".png"}), *other_images(at, {".png"}))):
        name = re.fullmatch(r"(\d{5})_(.+)", path.stem)
        if name is None:
            source.add_problem(path, "is not named <id, 5 digits>_<part>.png")
            continue
        id, part = int(name[1]), name[2]
        if reason := _part_fault(path, id, part, parts.get(id, {}).get(part)):
            source.add_problem(path, reason, str(id))
        else:
            parts[id][part] = path
    return dict(parts)


def _part_fault(path: Path, id: int, part: str, other: Path | None) -> str:
    """What is wrong with a part file; empty if nothing is. ``other`` is a file of the same part, if any."""
    if part not in (known := CELEBAMASK19.classes[1:]):
        return f"unknown part {part!r}{closest(part, known)} The parts are {', '.join(known)}."
    if path.suffix.lower() != ".png":
        return NO_PNG
    if path.parent.name != str(id // _IDS_PER_FOLDER):
        return f"is in the wrong folder, expected {PARTS}/{id // _IDS_PER_FOLDER}"
    return f"is the same part as {other.name}" if other else ""


def _add_images_without_parts(source: Source, images: dict[int, Path]) -> None:
    """Add a problem for each image, or one for all images whose folder of parts does not exist."""
    without_folder: dict[int, list[int]] = defaultdict(list)
    for id, path in images.items():
        number = id // _IDS_PER_FOLDER
        if (source.root / PARTS / str(number)).is_dir():
            source.add_problem(path, f"has no parts in {PARTS}/{number}", str(id))
        else:
            without_folder[number].append(id)
    for number, ids in without_folder.items():
        reason = f"no such folder, but {len(ids)} image(s) need it: {ids[0]} to {ids[-1]}"
        source.add_problem(source.root / PARTS / str(number), reason)


def _contents(folder: Path) -> str:
    names = [path.name + ("/" if path.is_dir() else "") for path in listing(folder)]
    return (", ".join(names[:8]) or "nothing") + (f" and {len(names) - 8} more" if len(names) > 8 else "")
