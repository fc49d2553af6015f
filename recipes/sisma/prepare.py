"""Check image-mask pairs and write them as one prepared folder.

    python -m recipes.sisma.prepare source=CelebAMask-HQ target=data/faces          # the official archive, unpacked
    python -m recipes.sisma.prepare source=my-faces target=data/faces               # images/ and masks/, paired by name
    python -m recipes.sisma.prepare source=drawn target=data/drawn count=64 size=128  # drawn, no download

Every pair is read in full. What is wrong is listed file by file, all of it, and nothing is written then, unless
``on_bad=skip`` leaves those pairs out. The target appears under its name only when it is complete.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import torch
from torch import Tensor

from recipes.sisma.arguments import STOPPED, UsageError, command_line, from_command_line, run_command
from recipes.sisma.split_check import TEST_SHARE, is_test, remedy, shortfall
from ssmgen.atomic import whole_folder
from ssmgen.data.files import IMAGE_SUFFIXES, files_with, listing, other_images, stem_of
from ssmgen.data.folder import NO_PNG, OTHER_KIND, check_target, load_splits, match_stems, write_pair, write_records
from ssmgen.data.images import read_image, read_mask
from ssmgen.data.labels import BISENET19, CELEBAMASK19, LabelSet, remap
from ssmgen.data.transforms import center_crop_resize, check_same_shape
from ssmgen.registry import closest
from ssmgen.training import progress_bar

IMAGES = "CelebA-HQ-img"
PARTS = "CelebAMask-HQ-mask-anno"
MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"
ARCHIVE_SIZE = 30_000
_FIRST_TEST = 28_000  # of first28k
LABEL_ORDERS = {labels.name: labels for labels in (CELEBAMASK19, BISENET19)}

#: What users of CelebAMask-HQ found in it (its issues 5, 84 and 109). Reported where present, and kept.
KNOWN_FAULTS = {
    70: "half of the face is cut off",
    404: "mouth and lips are not labelled",
    481: "hair is not labelled",
    2110: "the face is not aligned",
    4790: "most parts of its mask are empty",
    4995: "its mask does not fit the face",
}
_TWINS = (234, 3329, 5162, 6770, 7384, 7561, 12444, 12885, 13825, 15506, 19199, 20134, 24646)
KNOWN_FAULTS |= {id: f"the same photo as {id + 1}" for id in _TWINS}

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Settings:
    """Keys of the command line.

    Attributes:
        source: folder to read, or ``drawn``.
        target: folder to write; must not exist or be empty.
        layout: of the source: auto, official, folder; with source=drawn: what is written.
        split: auto, first28k, celeba, by-name, or a JSON file such as ``{"train": [...], "test": [...]}``.
        test_share: by-name only: the share of the pairs that are test pairs.
        labels: class order of the source's masks; the target always has celebamask19.
        size: store images and masks at this size; without it, image files are copied unchanged.
        on_bad: stop: write nothing where a pair is bad; skip: leave bad pairs out.
        count: drawn faces only: how many.
        seed: drawn faces only.
    """

    source: str = ""
    target: str = ""
    layout: str = "auto"
    split: str = "auto"
    test_share: float = TEST_SHARE
    labels: str = "celebamask19"
    size: int | None = None
    on_bad: str = "stop"
    count: int | None = None
    seed: int = 0


CHOICES = {"layout": ("auto", "official", "folder"), "on_bad": ("stop", "skip"), "labels": tuple(LABEL_ORDERS)}
SPLITS = ("first28k", "celeba", "by-name")


@dataclass(frozen=True)
class Problem:
    """A file, relative to the source, what is wrong with it, and the pair that cannot be used for it."""

    file: str
    reason: str
    id: str | None = None


@dataclass(frozen=True)
class Pair:
    """An image with its mask, or with the mask's parts by class name."""

    id: str
    image: Path
    mask: Path | dict[str, Path]


@dataclass
class Source:
    """What a folder was found to hold, before any file is opened."""

    root: Path
    layout: str
    pairs: list[Pair]
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def name_of(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


@dataclass(frozen=True)
class Checked:
    """What reading one pair gave: problems, or file hashes and the area of each class as a share of the mask."""

    id: str
    problems: list[Problem]
    hashes: dict[str, str]
    areas: Tensor | None


# --- what the command does ---


def main(argv: list[str]) -> int | None:
    """Check and write; raises ``ValueError`` or ``OSError`` with one message where the user has to act.

    Returns:
        The exit status: `STOPPED` after Ctrl-C, which leaves nothing behind.
    """
    settings = from_command_line(Settings(), argv)
    _check_settings(settings)
    target = Path(settings.target).resolve()
    check_target(target)
    try:
        (_prepare_drawn if settings.source == "drawn" else _prepare_files)(settings, target)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return STOPPED
    return None


def _prepare_files(settings: Settings, target: Path) -> None:
    source = find_source(Path(settings.source), settings.layout)
    asked, settings.split = settings.split, _chosen_split(settings, source)
    splits = split_pairs(settings.split, source, settings.test_share)
    _check_splits(asked, splits)
    in_a_split = {id for ids in splits.values() for id in ids}
    pairs = [pair for pair in source.pairs if pair.id in in_a_split]
    _check_space(target, pairs)
    with whole_folder(target) as folder:
        checked = _check_and_write(pairs, source, settings, folder)
        problems = source.problems + [problem for one in checked for problem in one.problems]
        good = _good_ones(checked, problems, settings.on_bad, folder)
        kept = {one.id for one in good}
        splits = {name: [id for id in ids if id in kept] for name, ids in splits.items()}
        notes = _notes(source, good, splits, LABEL_ORDERS[settings.labels])
        hashes = {name: value for one in good for name, value in one.hashes.items()}
        write_records(folder, CELEBAMASK19, splits, hashes, _about(source, settings, notes, problems))
    _summarize(settings, splits, notes, problems)


def _check_and_write(pairs: list[Pair], source: Source, settings: Settings, folder: Path) -> list[Checked]:
    """Check all pairs; write them too, until the first problem that will stop the run."""
    order, halted = LABEL_ORDERS[settings.labels], Event()
    if source.problems and settings.on_bad == "stop":
        halted.set()

    def work(pair: Pair) -> Checked:
        return _prepare_pair(pair, source, order, settings, folder, halted)

    return list(_in_threads(work, pairs, "checking"))


def _good_ones(checked: list[Checked], problems: list[Problem], on_bad: str, folder: Path) -> list[Checked]:
    """The pairs without a problem; where others are left out, what was written of them is removed."""
    if problems and on_bad == "stop":
        raise ValueError(
            f"{len(problems)} problem(s) found, {len(checked)} pair(s) read; nothing was written.\n{_lines(problems)}\n"
            "Mend the files, or leave these pairs out with on_bad=skip."
        )
    bad = {problem.id for problem in problems}
    for one in checked:
        for name in one.hashes if one.id in bad else ():
            (folder / name).unlink()
    good = [one for one in checked if one.id not in bad]
    if not good:
        raise ValueError(f"no good pair is left; nothing was written.\n{_lines(problems)}")
    return good


def _about(source: Source, settings: Settings, notes: list[str], problems: list[Problem]) -> dict[str, Any]:
    """What the record says of the source; no absolute path, since the folder may move."""
    return {
        "layout": source.layout,
        "folder": source.root.resolve().name,
        "label_order": settings.labels,
        "split": Path(settings.split).name,
        "test_share": settings.test_share if settings.split == "by-name" else None,
        "size": settings.size,
        "notes": notes,
        "left_out": [{"file": problem.file, "reason": problem.reason} for problem in problems],
    }


def _prepare_drawn(settings: Settings, target: Path) -> None:
    """Write drawn faces as a prepared folder, or in the official layout for trying that path without the archive."""
    from ssmgen.data.drawn_faces import draw_face, write_official_layout

    count = settings.count or 64
    if settings.layout == "official":
        with whole_folder(target) as folder:
            write_official_layout(folder, count, settings.size or 512, settings.seed)
        print(f"Wrote {count} drawn faces in the official layout to {settings.target}")
        print(f"Next: {command_line('prepare', f'source={settings.target}', 'target=DIR')}")
        return

    def work(index: int) -> dict[str, str]:
        image, mask = draw_face(index, settings.size or 256, settings.seed)
        return write_pair(folder, f"{index:05d}", image, mask)

    with whole_folder(target) as folder:
        written = list(_in_threads(work, range(count), "drawing"))
        hashes = {name: value for files in written for name, value in files.items()}
        splits = _by_name([f"{index:05d}" for index in range(count)], settings.test_share)
        about = {"layout": "drawn", "split": "by-name", "test_share": settings.test_share}
        about |= {"size": settings.size or 256, "seed": settings.seed}
        write_records(folder, CELEBAMASK19, splits, hashes, about)
    settings.split = "by-name"
    _summarize(settings, splits, [], [])


def _summarize(settings: Settings, splits: dict[str, list[str]], notes: list[str], problems: list[Problem]) -> None:
    if problems:
        print(f"Left out for {len(problems)} problem(s):\n{_lines(problems)}", file=sys.stderr)
    if notes:
        print("Worth knowing:\n" + "\n".join(f"  {note}" for note in notes))
    counts = ", ".join(f"{name} {len(ids)}" for name, ids in splits.items())
    print(f"Wrote {sum(map(len, splits.values()))} pairs to {settings.target}: {counts}")
    words = "faces", f"data={settings.target}"
    missing = shortfall(splits)
    if not missing:
        print(f"Next: {command_line('train', *words)}")
        return
    print(f"Before training: there is {missing}. {remedy(splits, settings.split)}")
    if splits.get("train"):
        shown = () if splits.get("test") else ("sample_every=0",)
        print(f"Or train without an evaluation: {command_line('train', *words, 'evaluate=false', *shown)}")


# --- before the work: settings, target, space ---


def _check_settings(settings: Settings) -> None:
    for key in ("source", "target"):
        if not getattr(settings, key):
            raise UsageError(f"{key}= is missing: write source=DIR target=DIR (or source=drawn target=DIR count=64)")
    for key, choices in CHOICES.items():
        value = getattr(settings, key)
        if value not in choices:
            raise UsageError(f"{key}={value}: expected one of {', '.join(choices)}{closest(value, choices)}")
    known = ("auto", *SPLITS)
    if settings.split not in known and not settings.split.endswith(".json"):
        raise UsageError(
            f"split={settings.split}: expected {', '.join(known)} or a .json file{closest(settings.split, known)}"
        )
    for key in ("size", "count"):
        if getattr(settings, key) is not None and getattr(settings, key) < 1:
            raise UsageError(f"{key}={getattr(settings, key)}: expected at least 1")
    _check_unused(settings)


def _check_unused(settings: Settings) -> None:
    """Refuse a key that would do nothing."""
    drawn = settings.source == "drawn"
    if not 0 < settings.test_share < 1:
        raise UsageError(f"test_share={settings.test_share}: expected a number between 0 and 1")
    if drawn and settings.layout == "official":
        _refuse_test_share(settings, "layout=official, which has no splits")
    idle = ("split", "labels", "on_bad") if drawn else ("count", "seed")
    for key in idle:
        if getattr(settings, key) != getattr(Settings, key):
            raise UsageError(f"{key}= has no effect with source={settings.source}: leave it out")


def _refuse_test_share(settings: Settings, beside: str) -> None:
    if settings.test_share != TEST_SHARE:
        raise UsageError(f"test_share= has no effect with {beside}: leave it out, or give split=by-name")


def _check_space(target: Path, pairs: list[Pair]) -> None:
    parent = next(folder for folder in target.parents if folder.exists())
    needed = sum(pair.image.stat().st_size for pair in pairs if pair.image.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OSError(f"{parent}: {free / 1e6:,.0f} MB free, but the images need {needed / 1e6:,.0f} MB")


# --- finding the pairs ---


def find_source(root: Path, layout: str) -> Source:
    """Find the pairs of a folder; no image is opened yet.

    Args:
        root: the folder; ``CelebAMask-HQ`` inside it, as the archive unpacks, is found too.
        layout: ``official``, ``folder`` or ``auto``.

    Raises:
        FileNotFoundError: the folder or a folder the layout needs does not exist.
        ValueError: nothing to read in it.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: " + ("is a file, expected a folder" if root.exists() else "no such folder"))
    inner = root / "CelebAMask-HQ"
    official = next((at for at in (root, inner) if (at / IMAGES).is_dir() or (at / PARTS).is_dir()), None)
    if layout == "official" or (layout == "auto" and official):
        return find_official(official or root)
    return find_folder(root)


def find_folder(root: Path) -> Source:
    """Pairs of ``images/`` and ``masks/``, or ``x.jpg`` beside ``x.png``, by stem."""
    images, masks = root / "images", root / "masks"
    if images.is_dir() != masks.is_dir():
        missing, present = (masks, images) if images.is_dir() else (images, masks)
        raise FileNotFoundError(f"{missing}: no such folder, though there is {present}; both are needed")
    if not images.is_dir():
        images = masks = root
    matched, problems = match_stems(images, masks)
    source = Source(root, "folder", [Pair(stem, *paths) for stem, paths in matched.items()])
    source.problems = [Problem(source.name_of(path), reason, stem_of(path)) for path, reason in problems]
    if not matched and not problems:
        raise ValueError(
            f"{root}: no images in it; it holds {_contents(root)}. Expected {IMAGES}/ and {PARTS}/ (the official "
            "layout), or images/ and masks/ with files of the same names, or x.jpg beside x.png."
        )
    return source


def find_official(root: Path) -> Source:
    """Pairs of the unpacked CelebAMask-HQ archive, or of a part of it."""
    for name in (IMAGES, PARTS):
        if not (root / name).is_dir():
            raise FileNotFoundError(
                f"{root / name}: no such folder; {root} holds {_contents(root)}. The official layout "
                f"has {IMAGES}/<id>.jpg and {PARTS}/<id // 2000>/<id, 5 digits>_<part>.png; "
                "if the folder was renamed, rename it back."
            )
    source = Source(root, "official", [])
    images = _official_images(source)
    parts = _official_parts(source)
    homeless: dict[int, list[int]] = defaultdict(list)
    for id in sorted(images):
        folder = root / PARTS / str(id // 2000)
        if id in parts:
            source.pairs.append(Pair(str(id), images[id], parts[id]))
        elif folder.is_dir():
            source.problems.append(
                Problem(source.name_of(images[id]), f"has no parts in {PARTS}/{folder.name}", str(id))
            )
        else:
            homeless[id // 2000].append(id)
    for folder_id, ids in homeless.items():
        reason = f"no such folder, but {len(ids)} image(s) need it: {ids[0]} to {ids[-1]}"
        source.problems.append(Problem(f"{PARTS}/{folder_id}", reason))
    if not images and not parts:
        raise ValueError(f"{root}: {IMAGES} and {PARTS} are both empty")
    _note_partial(source, len(parts.keys() - images.keys()))
    return source


def _official_images(source: Source) -> dict[int, Path]:
    images: dict[int, Path] = {}
    folder = source.root / IMAGES
    for path in other_images(folder, IMAGE_SUFFIXES):
        source.problems.append(Problem(source.name_of(path), OTHER_KIND, path.stem))
    for path in files_with(folder, IMAGE_SUFFIXES):
        if not re.fullmatch(r"0|[1-9][0-9]*", path.stem):
            source.problems.append(Problem(source.name_of(path), "is not named <id>.jpg, e.g. 0.jpg or 28000.jpg"))
        elif int(path.stem) in images:
            other = images[int(path.stem)].name
            source.problems.append(Problem(source.name_of(path), f"has the same id as {other}", path.stem))
        else:
            images[int(path.stem)] = path
    return images


def _official_parts(source: Source) -> dict[int, dict[str, Path]]:
    """Part files by id and class name; every file that does not fit the scheme is a problem."""
    parts: dict[int, dict[str, Path]] = defaultdict(dict)
    known = CELEBAMASK19.classes[1:]
    folders = [path for path in listing(source.root / PARTS) if path.is_dir()]
    places = (source.root / PARTS, *folders)
    for path in (path for at in places for path in (*files_with(at, {".png"}), *other_images(at, {".png"}))):
        name = re.fullmatch(r"(\d{5})_(.+)", path.stem)
        if name is None:
            source.problems.append(Problem(source.name_of(path), "is not named <id, 5 digits>_<part>.png"))
            continue
        id, part = int(name[1]), name[2]
        if part not in known:
            reason = f"unknown part {part!r}{closest(part, known)} The parts are {', '.join(known)}."
            source.problems.append(Problem(source.name_of(path), reason, str(id)))
        elif path.suffix.lower() != ".png":
            source.problems.append(Problem(source.name_of(path), NO_PNG, str(id)))
        elif path.parent.name != str(id // 2000):
            reason = f"is in the wrong folder, expected {PARTS}/{id // 2000}"
            source.problems.append(Problem(source.name_of(path), reason, str(id)))
        elif part in parts[id]:
            reason = f"is the same part as {parts[id][part].name}"
            source.problems.append(Problem(source.name_of(path), reason, str(id)))
        else:
            parts[id][part] = path
    return dict(parts)


def _note_partial(source: Source, without_image: int) -> None:
    if len(source.pairs) < ARCHIVE_SIZE:
        source.notes.append(f"a part of the archive: {len(source.pairs)} of its {ARCHIVE_SIZE} pairs")
    if without_image:
        source.notes.append(f"the masks of {without_image} id(s) have no image in {IMAGES} and are left out")


def _contents(folder: Path) -> str:
    names = [path.name + ("/" if path.is_dir() else "") for path in listing(folder)]
    if not names:
        return "nothing"
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# --- splits ---


def split_pairs(split: str, source: Source, test_share: float = TEST_SHARE) -> dict[str, list[str]]:
    """Distribute the pairs; each split keeps the order of the source.

    Args:
        split: ``first28k`` (ids below 28000 train, the rest test; the default of the official layout), ``celeba`` (the
            partition of CelebA, through the mapping file), ``by-name`` (test or not by a hash of the name, so that a
            pair stays where it is when others come; the default of a folder, and of a part of the archive that has
            pairs on one side of id 28000 only), or a JSON file.
        source: the pairs.
        test_share: of ``by-name``.

    Raises:
        FileNotFoundError: the mapping or the JSON file is missing.
        ValueError: a split by number over names that are none, or a file that does not fit the pairs.
    """
    ids = [pair.id for pair in source.pairs]
    if split == "by-name":
        return _by_name(ids, test_share)
    if split.endswith(".json"):
        return _from_file(Path(split), ids, source)
    names = [id for id in ids if not id.isdecimal()]
    if names:
        raise ValueError(
            f"split={split} goes by the dataset's numbers, but {len(names)} of {len(ids)} pairs have other names, e.g. "
            f"{names[0]!r}: use split=by-name or a JSON file"
        )
    if split == "celeba":
        return _celeba(ids, source.root / MAPPING)
    train = [id for id in ids if int(id) < _FIRST_TEST]
    return {"train": train, "test": [id for id in ids if int(id) >= _FIRST_TEST]}


def _chosen_split(settings: Settings, source: Source) -> str:
    """What ``split=auto`` stands for; a part of the archive need not have pairs on both sides of ``first28k``."""
    split = settings.split
    if split == "auto":
        split = "first28k" if source.layout == "official" else "by-name"
        if split == "first28k" and len({int(pair.id) < _FIRST_TEST for pair in source.pairs}) == 1:
            split = "by-name"
            side = "below" if int(source.pairs[0].id) < _FIRST_TEST else "from"
            source.notes.append(f"all its ids are {side} {_FIRST_TEST}, so that it is split by name, not by number")
    if split != "by-name":
        _refuse_test_share(settings, f"split={split}")
    return split


def _check_splits(asked: str, splits: dict[str, list[str]]) -> None:
    """Refuse, before 30,000 pairs are read, a split by number that asks for pairs which are not there."""
    empty = [name for name in ("train", "test") if not splits.get(name)]
    if asked in ("first28k", "celeba") and empty:
        raise ValueError(
            f"split={asked} leaves no pair for {' and '.join(empty)}: this part of the archive has none of its ids. "
            "Use split=by-name or a JSON file."
        )


def _by_name(ids: list[str], test_share: float) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {"train": [], "test": []}
    for id in ids:
        splits["test" if is_test(id, test_share) else "train"].append(id)
    return splits


def _celeba(ids: list[str], mapping: Path) -> dict[str, list[str]]:
    """CelebA's partition, with the limits of the dataset's own script."""
    original = read_mapping(mapping)
    unmapped = [id for id in ids if int(id) not in original]
    if unmapped:
        raise ValueError(f"{mapping}: has no line for {len(unmapped)} image(s): {', '.join(unmapped)}")
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for id in ids:
        index = original[int(id)]
        splits["train" if index < 162_771 else "val" if index < 182_638 else "test"].append(id)
    return splits


def read_mapping(path: Path) -> dict[int, int]:
    """The mapping file: id in CelebA-HQ to index in CelebA.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that does not read ``idx orig_idx orig_file``; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; split=celeba needs it (it is in the archive)")
    mapping = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines()[1:], start=2):
        words = line.split()
        if not words:
            continue
        if len(words) != 3 or not (words[0].isdecimal() and words[1].isdecimal()):
            raise ValueError(f"{path}, line {number}: expected idx, orig_idx, orig_file, got {line!r}")
        mapping[int(words[0])] = int(words[1])
    return mapping


def _from_file(path: Path, ids: list[str], source: Source) -> dict[str, list[str]]:
    splits = load_splits(path)
    present, bad = set(ids), {problem.id for problem in source.problems}
    listed = [id for members in splits.values() for id in members]
    unknown = [id for id in listed if id not in present and id not in bad]
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} id(s) are not in {source.root}: {', '.join(unknown)}")
    rest = len(present - set(listed))
    if rest:
        source.notes.append(f"{rest} pair(s) are in no split of {path.name} and are left out")
    return {name: [id for id in members if id in present] for name, members in splits.items()}


# --- one pair ---


def _prepare_pair(
    pair: Pair, source: Source, order: LabelSet, settings: Settings, folder: Path, halted: Event
) -> Checked:
    """Read, check and, unless the run is going to stop anyway, write one pair."""
    problems: list[Problem] = []
    mask_file = pair.mask if isinstance(pair.mask, Path) else next(iter(pair.mask.values()))
    image = _attempt(lambda: read_image(pair.image), pair, pair.image, source, problems)
    mask = _attempt(lambda: _read_labels(pair, order), pair, mask_file, source, problems)
    if mask is not None:
        _attempt(lambda: _check_not_empty(mask), pair, mask_file, source, problems)
    if image is not None and mask is not None:
        _attempt(lambda: check_same_shape(image, mask), pair, pair.image, source, problems)
    if problems and settings.on_bad == "stop":
        halted.set()
    if problems or image is None or mask is None or halted.is_set():
        return Checked(pair.id, problems, {}, None)
    areas = torch.bincount(mask.flatten(), minlength=len(CELEBAMASK19)) / mask.numel()
    if settings.size is None:
        return Checked(pair.id, [], write_pair(folder, pair.id, pair.image, mask), areas)
    return Checked(pair.id, [], write_pair(folder, pair.id, *center_crop_resize(image, mask, settings.size)), areas)


def _attempt(
    read: Callable[[], Result], pair: Pair, path: Path, source: Source, problems: list[Problem]
) -> Result | None:
    """Call ``read``; an error becomes a problem of the file it names, which may be one part of a mask."""
    try:
        return read()
    except (ValueError, OSError) as error:
        files = [path, *(pair.mask.values() if isinstance(pair.mask, dict) else ())]
        at = next((file for file in files if str(error).startswith(f"{file}: ")), path)
        problems.append(Problem(source.name_of(at), str(error).removeprefix(f"{at}: "), pair.id))
        return None


def _read_labels(pair: Pair, order: LabelSet) -> Tensor:
    """The mask ``(height, width)`` uint8 in the order of `CELEBAMASK19`."""
    if isinstance(pair.mask, dict):
        return paint_parts(pair.mask)
    mask = read_mask(pair.mask, order)
    return mask if order is CELEBAMASK19 else remap(mask, order, CELEBAMASK19)


def paint_parts(parts: dict[str, Path]) -> Tensor:
    """Merge part files into a mask ``(height, width)`` uint8, later classes of `CELEBAMASK19` over earlier ones.

    Args:
        parts: file by class name; black where the part is not, anything else where it is.

    Raises:
        ValueError: a file cannot be read, or differs in size from the others; names it.
    """
    mask: Tensor | None = None
    for id, name in enumerate(CELEBAMASK19.classes):
        if name not in parts:
            continue
        part = read_image(parts[name]).amax(dim=0) != 0
        if mask is None:
            mask = torch.zeros(part.shape, dtype=torch.uint8)
        if part.shape != mask.shape:
            raise ValueError(f"{parts[name]}: is {tuple(part.shape)}, other parts of this mask are {tuple(mask.shape)}")
        mask[part] = id
    if mask is None:
        raise ValueError("a mask needs at least one part")
    return mask


def _check_not_empty(mask: Tensor) -> None:
    if not bool(mask.any()):
        raise ValueError("the mask is empty: background only")


def _in_threads(work: Callable[[Item], Result], items: Any, label: str) -> Iterator[Result]:
    """Results in order, with a progress bar. Threads do: decoding and hashing release the lock."""
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        with progress_bar(len(items), "pair", what=label) as bar:
            for result in pool.map(work, items):
                yield result
                bar.update()
    finally:
        # Without cancelling, an error or Ctrl-C would wait for all of 30,000 pairs.
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)


# --- what is worth knowing ---


def _notes(source: Source, good: list[Checked], splits: dict[str, list[str]], order: LabelSet) -> list[str]:
    notes = list(source.notes)
    if source.layout == "official":
        notes += _known_faults({int(one.id) for one in good})
    else:
        notes += _order_warning(good, order)
    notes += _identical_images(good, splits)
    notes += [f"split {name!r} is empty" for name, ids in splits.items() if not ids]
    return notes


def _known_faults(ids: set[int]) -> list[str]:
    found = [f"{id} ({KNOWN_FAULTS[id]})" for id in sorted(ids & KNOWN_FAULTS.keys())]
    return [f"faults of the dataset that its users reported, kept: {', '.join(found)}"] if found else []


def _order_warning(good: list[Checked], order: LabelSet) -> list[str]:
    """Hair covers much of any face picture; where the other order has its hair id, this one has a small class."""
    areas = torch.stack([one.areas for one in good if one.areas is not None]).mean(0)
    other = BISENET19 if order is CELEBAMASK19 else CELEBAMASK19
    # The areas are in the target's order: ask for the class that the other order's hair id became.
    hair, suspect = areas[CELEBAMASK19.classes.index("hair")], order.classes[other.classes.index("hair")]
    area = areas[CELEBAMASK19.classes.index(suspect)]
    if area <= 2 * hair or area < 0.05:
        return []
    return [
        f"WARNING: {suspect} covers {area:.0%} of the masks and hair {hair:.0%}: they look like the class order "
        f"{other.name}. If they are, prepare them with labels={other.name}."
    ]


def _identical_images(good: list[Checked], splits: dict[str, list[str]]) -> list[str]:
    split_of = {id: name for name, ids in splits.items() for id in ids}
    same: dict[str, list[str]] = defaultdict(list)
    for one in good:
        same[next(value for name, value in one.hashes.items() if name.startswith("images/"))].append(one.id)
    groups = [ids for ids in same.values() if len(ids) > 1]
    across = [ids for ids in groups if len({split_of[id] for id in ids}) > 1]
    if not groups:
        return []
    listed = "; ".join(" = ".join(ids) for ids in groups)
    return [f"identical images in {len(groups)} group(s), {len(across)} of them across splits, kept: {listed}"]


def _lines(problems: list[Problem]) -> str:
    """Every problem by file; a reason that many files share is said once, above all of their names."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for problem in sorted(problems, key=lambda problem: problem.file):
        by_reason[problem.reason].append(problem.file)
    lines = []
    for reason, files in by_reason.items():
        if len(files) > 3:
            lines += [f"  {len(files)} files: {reason}", *(f"    {file}" for file in files)]
        else:
            lines += [f"  {file}: {reason}" for file in files]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
