"""Read, check and write pairs in threads, list their problems, and note what a user should know of those kept."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import torch
from torch import Tensor

from recipes.sisma.prepare.readers import Reader
from recipes.sisma.prepare.settings import Settings
from recipes.sisma.prepare.sources import Pair, Problem, Source
from ssmgen.data.folder import write_pair
from ssmgen.data.images import read_image
from ssmgen.data.labels import sides_crossed
from ssmgen.data.transforms import center_crop_resize, check_same_shape
from ssmgen.training import progress_bar

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Faults that users of CelebAMask-HQ reported (its issues 5, 84 and 109).
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


@dataclass(frozen=True)
class CheckedPair:
    """A pair that was read: its problems, or the hashes of its files and the shares of the reader's source classes.

    ``crossed`` tells that left and right were the wrong way round in its mask.
    """

    id: str
    problems: list[Problem]
    hashes: dict[str, str]
    shares: Tensor | None
    crossed: bool = False


def check_and_write(
    pairs: list[Pair], source: Source, reader: Reader, settings: Settings, folder: Path
) -> list[CheckedPair]:
    """Check all pairs, and write each that is good until a problem is found that will stop the run."""
    stopping = Event()
    if source.problems and settings.on_bad == "stop":
        stopping.set()

    def write(pair: Pair) -> CheckedPair:
        return _write_if_good(pair, source, reader, settings, folder, stopping)

    return list(in_threads(write, pairs, "checking"))


def select_good(checked: list[CheckedPair], problems: list[Problem], on_bad: str, folder: Path) -> list[CheckedPair]:
    """Select the pairs without a problem, and delete the written files of the others.

    Raises:
        ValueError: there are problems and ``on_bad`` is ``stop``, or no pair is good; lists all problems.
    """
    if problems and on_bad == "stop":
        raise ValueError(
            f"{len(problems)} problem(s) found, {len(checked)} pair(s) read; nothing was written.\n"
            f"{list_problems(problems)}\nRepair the files, or leave these pairs out with on_bad=skip."
        )
    bad = {problem.id for problem in problems}
    for pair in checked:
        for name in pair.hashes if pair.id in bad else ():
            (folder / name).unlink()
    good = [pair for pair in checked if pair.id not in bad]
    if not good:
        raise ValueError(f"no good pair is left; nothing was written.\n{list_problems(problems)}")
    return good


def list_problems(problems: list[Problem]) -> str:
    """One line for each problem, sorted by file; a reason that many files share stands once, above their names."""
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


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], label: str) -> Iterator[Result]:
    """Yield results in order, with a progress bar. Threads suffice: decoding and hashing release the lock."""
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


def _write_if_good(
    pair: Pair, source: Source, reader: Reader, settings: Settings, folder: Path, stopping: Event
) -> CheckedPair:
    problems: list[Problem] = []
    part_files = list(pair.mask.values()) if isinstance(pair.mask, dict) else [pair.mask]

    def attempt(path: Path, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function; its error becomes a problem of the file that it names, or of ``path``."""
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            file = next((file for file in (path, *part_files) if str(error).startswith(f"{file}: ")), path)
            problems.append(Problem(source.relative_name(file), str(error).removeprefix(f"{file}: "), pair.id))
            return None

    image = attempt(pair.image, read_image, pair.image)
    mask, shares = None, None
    if (found := attempt(part_files[0], reader.read, pair.mask)) is not None:
        mask = reader.merge(found)
        shares = torch.bincount(found.flatten(), minlength=len(reader.source)) / found.numel()
        if reader.empty.issuperset(shares.nonzero().flatten().tolist()):
            only = ", ".join(reader.labels.classes[id] for id in mask.unique().tolist())
            problems.append(Problem(source.relative_name(part_files[0]), f"the mask is empty: {only} only", pair.id))
    if image is not None and mask is not None:
        attempt(pair.image, check_same_shape, image, mask)
    if problems and settings.on_bad == "stop":
        stopping.set()
    if problems or stopping.is_set():
        return CheckedPair(pair.id, problems, {}, None)
    if (crossed := sides_crossed(mask, reader.labels)) and settings.sides == "fix":
        mask = reader.labels.swap_table()[mask.long()]
    content = (pair.image, mask) if settings.size is None else center_crop_resize(image, mask, settings.size)
    return CheckedPair(pair.id, [], write_pair(folder, pair.id, *content), shares, crossed)


def find_notes(
    source: Source, good: list[CheckedPair], splits: dict[str, list[str]], reader: Reader, sides: str
) -> list[str]:
    """The notes of the source, and those on its good pairs."""
    notes = list(source.notes)
    if source.layout == "official":
        known = sorted({int(pair.id) for pair in good} & KNOWN_FAULTS.keys())
        faults = ", ".join(f"{id} ({KNOWN_FAULTS[id]})" for id in known)
        notes += [f"faults of the dataset that its users reported, kept: {faults}"] if known else []
    shares = torch.stack([pair.shares for pair in good if pair.shares is not None]).mean(0)
    notes += reader.notes(shares, source.layout)
    notes += _crossed_sides(crossed_ids(good), sides)
    notes += _identical_images(good, splits)
    notes += [f"split {name!r} is empty" for name, ids in splits.items() if not ids]
    return notes


def _crossed_sides(ids: list[str], sides: str) -> list[str]:
    if not ids:
        return []
    done = "swapped" if sides == "fix" else "kept (sides=fix swaps them)"
    more = f" and {len(ids) - 3} more, listed in prepared.json" if len(ids) > 3 else ""
    return [f"left and right are the wrong way round in {len(ids)} mask(s), {done}: {', '.join(ids[:3])}{more}"]


def crossed_ids(good: list[CheckedPair]) -> list[str]:
    """Ids of the pairs in whose masks left and right were the wrong way round."""
    return [pair.id for pair in good if pair.crossed]


def _identical_images(good: list[CheckedPair], splits: dict[str, list[str]]) -> list[str]:
    split_of = {id: name for name, ids in splits.items() for id in ids}
    by_hash: dict[str, list[str]] = defaultdict(list)
    for pair in good:
        by_hash[next(value for name, value in pair.hashes.items() if name.startswith("images/"))].append(pair.id)
    groups = [ids for ids in by_hash.values() if len(ids) > 1]
    if not groups:
        return []
    across = sum(len({split_of[id] for id in ids}) > 1 for ids in groups)
    listed = "; ".join(" = ".join(ids) for ids in groups)
    return [f"identical images in {len(groups)} group(s), {across} of them across splits, kept: {listed}"]
