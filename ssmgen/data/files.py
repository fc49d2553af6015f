"""Listing and pairing files: the same rules for every command and for folders from any operating system."""

import unicodedata
from collections.abc import Collection
from pathlib import Path

from ssmgen.reading import irregular

#: Suffixes of the files that `ssmgen.data.images.read_image` reads, and Pillow's names of their formats.
IMAGE_SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
OTHER_KIND = f"has an unsupported image format; save it as one of {', '.join(IMAGE_SUFFIXES)}"
NO_PNG = "is not a PNG file; masks must be PNG files, because lossy formats alter labels"
_OTHER_IMAGES = {".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jp2"}
# Files that macOS, Windows and network storage add to folders and archives without hiding them by a leading dot.
_SYSTEM_FILES = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin"}


def composed(name: str) -> str:
    """A name in composed form (NFC): macOS stores accents as separate characters, most other systems do not."""
    return unicodedata.normalize("NFC", name)


def stem_of(file: Path) -> str:
    """The name without suffix, by which files are paired."""
    return composed(file.stem)


def listing(folder: Path) -> list[Path]:
    """Entries of a folder sorted by name, without hidden and system files; [] if there is no such folder."""
    if not folder.is_dir():
        return []
    visible = (path for path in folder.iterdir() if not path.name.startswith("."))
    entries = (path for path in visible if path.name.lower() not in _SYSTEM_FILES)
    return sorted(entries, key=lambda path: composed(path.name))


def files_with(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Files in a `listing` that have one of the suffixes; ``.png`` matches ``.PNG`` too."""
    return [path for path in listing(folder) if path.suffix.lower() in suffixes and path.is_file()]


def unreadable(folder: Path, suffixes: Collection[str]) -> list[tuple[Path, str]]:
    """Entries with one of the suffixes that are not files, with the reason: FIFOs, devices, folders, dead links.

    `files_with` leaves them out.
    """
    named = (path for path in listing(folder) if path.suffix.lower() in suffixes)
    return [(path, fault) for path in named if (fault := irregular(path))]


def other_images(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Image files in a folder that have none of ``suffixes``, to be reported: their owner expects them to be read."""
    return files_with(folder, (IMAGE_SUFFIXES.keys() | _OTHER_IMAGES) - set(suffixes))


def pair_files(images: Path, masks: Path) -> tuple[dict[str, tuple[Path, Path]], list[tuple[Path, str]]]:
    """Pair the files of two folders by stem. They may be the same folder: its PNG files are then the masks.

    Accents may be in either form (NFC or NFD) and suffixes in either case.

    Args:
        images: folder of photos.
        masks: folder of PNG masks.

    Returns:
        The pairs by stem, sorted, and the problems: every file that is in no pair, with the reason.
    """
    suffixes = set(IMAGE_SUFFIXES) - ({".png"} if images == masks else set())
    photos, problems = _by_stem(images, suffixes)
    labels, mask_problems = _by_stem(masks, {".png"})
    problems += mask_problems
    odd = [fault for folder in dict.fromkeys((images, masks)) for fault in unreadable(folder, IMAGE_SUFFIXES)]
    named = {stem_of(file) for file, _ in odd}  # their partners are not at fault
    problems += odd
    problems += [(file, OTHER_KIND) for file in other_images(images, IMAGE_SUFFIXES)]
    if images != masks:
        problems += [(file, NO_PNG) for file in other_images(masks, {".png"})]
    problems += [(photos[stem], f"has no mask {stem}.png") for stem in sorted(photos.keys() - labels.keys() - named)]
    kinds = f"({', '.join(IMAGE_SUFFIXES)})"
    lonely = sorted(labels.keys() - photos.keys() - named)
    problems += [(labels[stem], f"has no image {stem} {kinds}") for stem in lonely]
    return {stem: (photos[stem], labels[stem]) for stem in sorted(photos.keys() & labels.keys())}, problems


def _by_stem(folder: Path, suffixes: set[str]) -> tuple[dict[str, Path], list[tuple[Path, str]]]:
    found: dict[str, Path] = {}
    problems = []
    for file in files_with(folder, suffixes):
        first = found.setdefault(stem_of(file), file)
        if first != file:
            problems.append((file, f"has the same stem as {first.name}; a stem identifies one pair"))
    return found, problems
