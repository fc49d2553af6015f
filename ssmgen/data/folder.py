"""The prepared folder: image-mask pairs that were checked once, with a record of what they are.

    images/<id>.jpg      the photos, in any format `read_image` takes
    masks/<id>.png       8-bit labels
    splits.json          {"train": [ids], "test": [ids], ...}
    prepared.json        where it came from, the label set, counts, SHA-256 of every file, what was skipped

`PreparedFolder` reads it. It is written inside `ssmgen.atomic.whole_folder`: `write_pair` for every pair, then
`write_records`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ssmgen.data.files import IMAGE_SUFFIXES, files_with, listing, other_images, plain_text, stem_of
from ssmgen.data.images import read_image, read_mask, write_png
from ssmgen.data.labels import LabelSet
from ssmgen.data.transforms import center_crop_resize
from ssmgen.registry import closest

_FORMAT = 1
_RECORD = "prepared.json"
_SPLITS = "splits.json"
OTHER_KIND = f"is an image of a kind that is not read; save it as one of {', '.join(IMAGE_SUFFIXES)}"
NO_PNG = "is not a PNG file; masks must be PNG, since lossy formats alter labels"


class PreparedFolder(Dataset[tuple[Tensor, Tensor]]):
    """Image-mask pairs of one split, paired by id, never by position.

    Args:
        root: a folder that ``python -m recipes.sisma.prepare`` wrote.
        split: name of a split, e.g. ``"train"``.
        size: side, or ``(height, width)``, that both are centre-cropped and resized to; None keeps the largest square
            that image and mask both have pixels for, which may differ from pair to pair.

    Attributes:
        labels: the classes of the masks.
        ids: the pairs of the split, in the order of ``splits.json``.

    Raises:
        FileNotFoundError: no prepared folder there, or files of the split are missing (all are listed).
        ValueError: unknown or empty split (the splits are listed), or damaged records.
    """

    def __init__(self, root: str | Path, split: str, size: int | tuple[int, int] | None = None) -> None:
        self.root, self.split, self.size = Path(root).expanduser(), split, size
        self.record = _read_record(self.root)
        self.labels = _labels_from(self.record, self.root / _RECORD)
        self.ids = _ids_of(self.root, split)
        recorded = {Path(name).stem: name for name in self.record["files"] if name.startswith("images/")}
        self._images = {id: recorded.get(id, f"images/{id}.jpg") for id in self.ids}
        self._files = self._find_files()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image ``(3, h, w)`` uint8 RGB and mask ``(h, w)`` uint8.

        Raises:
            ValueError: a file is damaged, or the mask has a label outside the set; names the file.
        """
        id = self.ids[index]
        image = read_image(self._files[self._images[id]])
        mask = read_mask(self._files[f"masks/{id}.png"], self.labels)
        return center_crop_resize(image, mask, self.size)

    def fingerprint(self) -> str:
        """SHA-256 over ids, recorded file hashes, label set, split and size: equal only for equal data."""
        files = self.record["files"]
        pairs = [[id, files[self._images[id]], files[f"masks/{id}.png"]] for id in self.ids]
        size = list(self.size) if isinstance(self.size, tuple) else self.size
        what = [_FORMAT, self.split, size, list(self.labels.classes), pairs]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def _find_files(self) -> dict[str, Path]:
        """The split's files by their recorded names."""
        # Two listings are faster than a look at each of 60,000 files, and an id such as "../x" is in neither.
        parts = [(part, listing(self.root / part)) for part in ("images", "masks")]
        present = {plain_text(f"{part}/{file.name}"): file for part, files in parts for file in files}
        wanted = {name for id in self.ids for name in (self._images[id], f"masks/{id}.png")}
        missing = sorted(wanted - present.keys())
        unrecorded = sorted((wanted & present.keys()) - self.record["files"].keys())
        if missing or unrecorded:
            lines = [f"  {name}: missing" for name in missing]
            lines += [f"  {name}: not recorded in {_RECORD}" for name in unrecorded]
            raise FileNotFoundError(
                f"{self.root}: {len(lines)} file(s) of split {self.split!r} are not as prepared:\n"
                + "\n".join(lines)
                + "\nPrepare the folder again."
            )
        return {name: present[name] for name in wanted}


def load_splits(path: str | Path) -> dict[str, list[str]]:
    """Read a file such as ``{"train": ["a", "b"], "test": ["c"]}``; ids may be numbers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not that form, or an id that occurs twice.
    """
    splits = _read_json(Path(path).expanduser())
    if not isinstance(splits, dict) or not all(isinstance(ids, list) for ids in splits.values()) or not splits:
        raise ValueError(f'{path}: expected names with lists of ids, such as {{"train": ["a", "b"], "test": ["c"]}}')
    result = {name: [plain_text(str(id)) for id in ids] for name, ids in splits.items()}
    seen: dict[str, str] = {}
    for name, ids in result.items():
        for id in ids:
            if id in seen:
                raise ValueError(
                    f"{path}: id {id!r} is in {seen[id]!r} and again in {name!r}; each belongs to one split"
                )
            seen[id] = name
    return result


def check_target(target: Path) -> None:
    """Refuse, before any work, a folder that could not be written at the end.

    Raises:
        OSError: ``target`` is a file or a folder with something in it, or its parent cannot be written; says which.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: is a file; expected a new or an empty folder")
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target}: exists and is not empty; choose another folder or delete it first")
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{target}: cannot be made, since {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{target}: cannot be made, no permission to write in {parent}")


def write_pair(root: Path, id: str, image: Path | Tensor, mask: Tensor) -> dict[str, str]:
    """Write one pair and return the SHA-256 of its files by name.

    Args:
        root: the folder.
        id: the pair's name.
        image: a file to copy unchanged, or ``(3, height, width)`` uint8 to write as PNG.
        mask: ``(height, width)`` uint8 labels.
    """
    suffix = image.suffix.lower() if isinstance(image, Path) else ".png"
    image_file, mask_file = root / f"images/{id}{suffix}", root / f"masks/{id}.png"
    for file in (image_file, mask_file):
        file.parent.mkdir(exist_ok=True)
    if isinstance(image, Path):
        shutil.copyfile(image, image_file)
    else:
        write_png(image_file, image)
    write_png(mask_file, mask)
    return {file.relative_to(root).as_posix(): _file_hash(file) for file in (image_file, mask_file)}


def write_records(
    root: Path, labels: LabelSet, splits: dict[str, list[str]], hashes: dict[str, str], source: dict[str, Any]
) -> None:
    """Complete a folder of ``images/`` and ``masks/`` with its records.

    Args:
        root: the folder.
        labels: the classes of the masks.
        splits: name to ids.
        hashes: SHA-256 by file name relative to ``root``.
        source: what else is to be known about the data; no absolute path, since the folder may move.
    """
    record = {
        "format": _FORMAT,
        "source": source,
        "labels": {
            "name": labels.name,
            "classes": labels.classes,
            "palette": labels.palette,
            "mirrored": labels.mirrored,
        },
        "counts": {name: len(ids) for name, ids in splits.items()},
        "files": dict(sorted(hashes.items())),
    }
    _write_json(root / _SPLITS, splits)
    _write_json(root / _RECORD, record)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def match_stems(images: Path, masks: Path) -> tuple[dict[str, tuple[Path, Path]], list[tuple[Path, str]]]:
    """Pair the files of two folders by stem; the two may be one folder, where masks are its PNG files.

    Accents may be written either way (NFC or NFD), suffixes in upper or lower case; see `ssmgen.data.files`.

    Args:
        images: folder of photos.
        masks: folder of PNG masks.

    Returns:
        the pairs by stem, in sorted order, and what is wrong: every file without a partner, with the reason.
    """
    suffixes = set(IMAGE_SUFFIXES) - ({".png"} if images == masks else set())
    photos, problems = _by_stem(images, suffixes)
    labels, more = _by_stem(masks, {".png"})
    problems += more
    problems += [(file, OTHER_KIND) for file in other_images(images, IMAGE_SUFFIXES)]
    if images != masks:
        problems += [(file, NO_PNG) for file in other_images(masks, {".png"})]
    problems += [(photos[stem], f"has no mask {stem}.png") for stem in sorted(photos.keys() - labels.keys())]
    problems += [
        (labels[stem], f"has no image {stem} ({', '.join(IMAGE_SUFFIXES)})")
        for stem in sorted(labels.keys() - photos.keys())
    ]
    return {stem: (photos[stem], labels[stem]) for stem in sorted(photos.keys() & labels.keys())}, problems


def _by_stem(folder: Path, suffixes: set[str]) -> tuple[dict[str, Path], list[tuple[Path, str]]]:
    found: dict[str, Path] = {}
    problems = []
    for file in files_with(folder, suffixes):
        stem = stem_of(file)
        if stem in found:
            problems.append((file, f"has the same stem as {found[stem].name}; stems name the pairs"))
        found.setdefault(stem, file)
    return found, problems


def _read_record(root: Path) -> dict[str, Any]:
    path = root / _RECORD
    if not path.is_file():
        state = "is not a prepared folder" if root.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{root}: {state} (expected {_RECORD} in it); make one with "
            f"python -m recipes.sisma.prepare source=DIR {shlex.quote(f'target={root}')}"
        )
    record = _read_json(path)
    if not isinstance(record, dict) or record.get("format") != _FORMAT or not isinstance(record.get("files"), dict):
        raise ValueError(f"{path}: is no record of format {_FORMAT}; prepare the folder again")
    record["files"] = {plain_text(name): digest for name, digest in record["files"].items()}
    return record


def _labels_from(record: dict[str, Any], path: Path) -> LabelSet:
    try:
        given = record["labels"]
        palette = tuple((int(r), int(g), int(b)) for r, g, b in given["palette"])
        mirrored = tuple((int(left), int(right)) for left, right in given["mirrored"])
        return LabelSet(str(given["name"]), tuple(map(str, given["classes"])), palette, mirrored)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its label set is damaged ({error!r}); prepare the folder again") from error


def _ids_of(root: Path, split: str) -> list[str]:
    splits = load_splits(root / _SPLITS)
    listed = ", ".join(f"{name} ({len(ids)} pairs)" for name, ids in splits.items())
    if split not in splits:
        raise ValueError(f"{root} has no split {split!r}{closest(split, splits)} It has: {listed}.")
    if not splits[split]:
        raise ValueError(f"split {split!r} of {root} is empty; it has: {listed}.")
    return splits[split]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # an editor on Windows may add a byte-order mark
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is not readable JSON ({error})") from error


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
