"""The one lister of files: the same rules for every command and for folders from any operating system."""

import unicodedata
from collections.abc import Collection
from pathlib import Path

#: Suffixes of the files that `ssmgen.data.images.read_image` reads, and Pillow's names of their formats.
IMAGE_SUFFIXES = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
}
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


def other_images(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Image files in a folder that have none of ``suffixes``, to be reported: their owner expects them to be read."""
    return files_with(folder, (IMAGE_SUFFIXES.keys() | _OTHER_IMAGES) - set(suffixes))
