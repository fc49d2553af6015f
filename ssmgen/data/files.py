"""Which files of a folder count: one answer for every command, whatever system the folder comes from."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from pathlib import Path

#: Suffixes of the files `ssmgen.data.images.read_image` takes, with their formats as Pillow calls them.
IMAGE_SUFFIXES = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
}
_OTHER_IMAGES = {".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jp2"}
# What macOS, Windows and network storage leave in folders and archives, besides what a dot hides.
_LEFT_BEHIND = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin"}


def plain_text(name: str) -> str:
    """A name in composed form (NFC): macOS writes an accent as a character of its own, most others do not."""
    return unicodedata.normalize("NFC", name)


def stem_of(file: Path) -> str:
    """The name without suffix that files are paired by."""
    return plain_text(file.stem)


def listing(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name, without what is hidden or left behind by a system; [] if there is none."""
    if not folder.is_dir():
        return []
    seen = (path for path in folder.iterdir() if not path.name.startswith("."))
    kept = (path for path in seen if path.name.lower() not in _LEFT_BEHIND)
    return sorted(kept, key=lambda path: plain_text(path.name))


def files_with(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Files of a `listing` with one of the suffixes, which are given as ``.png`` and found as ``.PNG`` too."""
    return [path for path in listing(folder) if path.suffix.lower() in suffixes and path.is_file()]


def other_images(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Pictures of a folder by their suffix that are none of ``suffixes``: whoever put them there expects them read."""
    return files_with(folder, (IMAGE_SUFFIXES.keys() | _OTHER_IMAGES) - set(suffixes))
