"""The prepared folder: image-mask pairs that have been checked once, with a record of their contents.

    images/<id>.jpg      photos, in any format that `read_image` reads
    masks/<id>.png       8-bit labels
    splits.json          {"train": [ids], "test": [ids], ...}
    prepared.json        the source, the label set, counts, SHA-256 of every file, what was left out

`PreparedFolder` reads it. To write one, call `write_pair` for every pair and then `write_records`, inside
`ssmgen.atomic.whole_folder`.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ssmgen.data.buckets import Size, Sizing
from ssmgen.data.files import composed, listing
from ssmgen.data.hashes import file_hashes
from ssmgen.data.images import decode_image, decode_mask, write_png
from ssmgen.data.labels import LabelSet
from ssmgen.reading import irregular, read_bytes, read_json, sha256_of
from ssmgen.registry import closest

_FORMAT = 1
_RECORD = "prepared.json"
_SPLITS = "splits.json"
_CHANGED = "changed after the folder was prepared"
_REMEDY = "Restore what was replaced, or prepare the folder again."


class PreparedFolder(Dataset[tuple[Tensor, Tensor]]):
    """Image-mask pairs of one split, matched by id, never by position.

    Args:
        root: a prepared folder.
        split: name of a split, e.g. ``"train"``.
        size: side, or ``(height, width)``, to which both are centre-cropped and resized; None keeps the largest square
            that image and mask both have pixels for, which may differ between pairs. A list of (height, width), the
            buckets: each pair gets that with the nearest aspect ratio. ``"whole"`` crops and resizes nothing.
        hint: appended to the error if ``root`` is not a prepared folder, e.g. the command that prepares one.

    Attributes:
        labels: the classes of the masks.
        ids: ids of the split's pairs, in the order of ``splits.json``.

    Raises:
        FileNotFoundError: ``root`` is not a prepared folder, or files of the split are missing (all are listed).
        ValueError: unknown or empty split (the splits are listed), damaged records, or buckets that do not fit, see
            `ssmgen.data.buckets.Sizing`.
    """

    def __init__(self, root: str | Path, split: str, size: Size = None, hint: str = "") -> None:
        self.root, self.split = Path(root).expanduser(), split
        self.record = _read_record(self.root, hint)
        self.labels = _labels_from(self.record, self.root / _RECORD)
        self.ids = _ids_of(self.root, split)
        recorded = {Path(name).stem: name for name in self.record["files"] if name.startswith("images/")}
        self._images = {id: recorded.get(id, f"images/{id}.jpg") for id in self.ids}
        self._files = self._find_files()
        self._sizing = Sizing(size, self.mask_files())
        self.size = self._sizing.size

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image ``(3, h, w)`` uint8 RGB and mask ``(h, w)`` uint8.

        Raises:
            ValueError: a file is damaged or is not the one that was prepared, or the mask has a label outside the set;
                the message names the file.
        """
        id = self.ids[index]
        image, mask = self._images[id], f"masks/{id}.png"
        pixels = decode_image(self._files[image], self._prepared(image))
        labels = decode_mask(self._files[mask], self._prepared(mask), self.labels)
        return self._sizing.fitted(index, pixels, labels)

    def bucket_of(self, index: int) -> int:
        """Index of a pair's bucket, 0 if there is one size."""
        return self._sizing.bucket_of(index)

    def mask_files(self) -> list[Path]:
        """The files of the masks, one per pair."""
        return [self._files[f"masks/{id}.png"] for id in self.ids]

    def check_files(self, index: Path | None = None) -> None:
        """Compare the split's files with the hashes that were recorded when they were prepared.

        Args:
            index: see `ssmgen.data.hashes.file_hashes`: with it, only files that changed since the last check are read.

        Raises:
            ValueError: files have other contents or are no regular files; all with other contents are listed.
            OSError: a file is missing or cannot be read.
        """
        actual = {
            composed(name): name for name in (file.relative_to(self.root).as_posix() for file in self._files.values())
        }
        hashes = file_hashes(self.root, sorted(actual.values()), index)
        changed = [name for name in sorted(actual) if hashes[actual[name]] != self.record["files"][name]]
        if changed:
            lines = "\n".join(f"  {name}" for name in changed)
            raise ValueError(f"{self.root}: {len(changed)} file(s) {_CHANGED}:\n{lines}\n{_REMEDY}")

    def _prepared(self, name: str) -> bytes:
        """The content of a file, if it is the one that was prepared."""
        file = self._files[name]
        content = read_bytes(file)
        if hashlib.sha256(content).hexdigest() != self.record["files"][name]:
            raise ValueError(f"{file}: {_CHANGED}. {_REMEDY}")
        return content

    def fingerprint(self) -> str:
        """SHA-256 of ids, recorded file hashes, classes, split and size: equal only for equal data."""
        files = self.record["files"]
        pairs = [[id, files[self._images[id]], files[f"masks/{id}.png"]] for id in self.ids]
        content = [_FORMAT, self.split, self.size, self.labels.classes, pairs]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _find_files(self) -> dict[str, Path]:
        """The split's files by recorded name."""
        # Two listings are faster than checking 60,000 files one by one, and they never contain an id such as "../x".
        parts = [(part, listing(self.root / part)) for part in ("images", "masks")]
        present = {composed(f"{part}/{file.name}"): file for part, files in parts for file in files}
        needed = {name for id in self.ids for name in (self._images[id], f"masks/{id}.png")}
        unrecorded = (needed & present.keys()) - self.record["files"].keys()
        lines = [f"  {name}: missing" for name in sorted(needed - present.keys())]
        lines += [f"  {name}: not recorded in {_RECORD}" for name in sorted(unrecorded)]
        if lines:
            head = f"{self.root}: {len(lines)} file(s) of split {self.split!r} are not as prepared:"
            raise FileNotFoundError("\n".join([head, *lines, "Prepare the folder again."]))
        return {name: present[name] for name in needed}


def load_splits(path: str | Path) -> dict[str, list[str]]:
    """Read a file such as ``{"train": ["a", "b"], "test": ["c"]}``; ids may be numbers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another form, or an id that occurs twice.
    """
    splits = read_json(Path(path).expanduser())
    if not isinstance(splits, dict) or not all(isinstance(ids, list) for ids in splits.values()) or not splits:
        raise ValueError(f'{path}: expected names with lists of ids, such as {{"train": ["a", "b"], "test": ["c"]}}')
    result = {name: [composed(str(id)) for id in ids] for name, ids in splits.items()}
    seen: dict[str, str] = {}
    for name, ids in result.items():
        for id in ids:
            if id in seen:
                raise ValueError(
                    f"{path}: id {id!r} is in {seen[id]!r} and again in {name!r}; an id belongs to one split"
                )
            seen[id] = name
    return result


def check_target(target: Path) -> None:
    """Reject a target folder that cannot be written, before any work is done.

    Raises:
        OSError: ``target`` is a file or a folder that is not empty, or its parent is not writable.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: is a file; expected a new or empty folder")
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target}: exists and is not empty; choose another folder or delete it first")
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{target}: cannot be created: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{target}: cannot be created: no permission to write in {parent}")


def write_pair(root: Path, id: str, image: Path | Tensor, mask: Tensor) -> dict[str, str]:
    """Write one pair and return the SHA-256 of its two files by name.

    Args:
        root: the folder to write in.
        id: name of the pair.
        image: a file to copy unchanged, or ``(3, height, width)`` uint8 to write as PNG.
        mask: ``(height, width)`` uint8 labels.
    """
    suffix = image.suffix.lower() if isinstance(image, Path) else ".png"
    hashes = {}
    for name, content in ((f"images/{id}{suffix}", image), (f"masks/{id}.png", mask)):
        file = root / name
        file.parent.mkdir(exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, file)
        else:
            write_png(file, content)
        hashes[name] = sha256_of(file)
    return hashes


def write_records(
    root: Path, labels: LabelSet, splits: dict[str, list[str]], hashes: dict[str, str], source: dict[str, Any]
) -> None:
    """Write the records that complete a folder of ``images/`` and ``masks/``.

    Args:
        root: the folder.
        labels: the classes of the masks.
        splits: ids by name of the split.
        hashes: SHA-256 by file name relative to ``root``.
        source: further facts about the data, without absolute paths, since the folder may move.
    """
    record = {
        "format": _FORMAT,
        "source": source,
        "labels": asdict(labels),
        "counts": {name: len(ids) for name, ids in splits.items()},
        "files": dict(sorted(hashes.items())),
    }
    for name, value in ((_SPLITS, splits), (_RECORD, record)):
        (root / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_record(root: Path, hint: str) -> dict[str, Any]:
    path = root / _RECORD
    if irregular(path) == "is missing":
        problem = f"not a prepared folder (it has no {_RECORD})" if root.is_dir() else "no such folder"
        raise FileNotFoundError(f"{root}: {problem}" + (f"; {hint}" if hint else ""))
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a record of format {_FORMAT}; prepare the folder again")
    files, source = record.get("files"), record.get("source")
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise ValueError(f"{path}: its files are not listed with their hashes; prepare the folder again")
    if not isinstance(source, dict):
        raise ValueError(f"{path}: its source is not recorded; prepare the folder again")
    record["files"] = {composed(name): digest for name, digest in record["files"].items()}
    return record


def _labels_from(record: dict[str, Any], path: Path) -> LabelSet:
    try:
        return LabelSet.from_stored(record["labels"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the label set is damaged ({error!r}); prepare the folder again") from error


def _ids_of(root: Path, split: str) -> list[str]:
    splits = load_splits(root / _SPLITS)
    listed = ", ".join(f"{name} ({len(ids)} pairs)" for name, ids in splits.items())
    if split not in splits:
        raise ValueError(f"{root} has no split {split!r}{closest(split, splits)} It has: {listed}.")
    if not splits[split]:
        raise ValueError(f"split {split!r} of {root} is empty; it has: {listed}.")
    return splits[split]
