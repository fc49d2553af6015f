"""Read, check and write pairs in threads, and list their problems."""

from __future__ import annotations

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

from recipes.sisma.prepare.masks import LABEL_ORDERS, check_not_empty, read_labels
from recipes.sisma.prepare.settings import Settings
from recipes.sisma.prepare.sources import Pair, Problem, Source
from ssmgen.data.folder import write_pair
from ssmgen.data.images import read_image
from ssmgen.data.labels import CELEBAMASK19
from ssmgen.data.transforms import center_crop_resize, check_same_shape
from ssmgen.training import progress_bar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class CheckedPair:
    """A pair that was read: its problems, or the hashes of its files and the share of each class ``(19,)``."""

    id: str
    problems: list[Problem]
    hashes: dict[str, str]
    shares: Tensor | None


def check_and_write(pairs: list[Pair], source: Source, settings: Settings, folder: Path) -> list[CheckedPair]:
    """Check all pairs, and write each that is good until a problem is found that will stop the run."""
    stopping = Event()
    if source.problems and settings.on_bad == "stop":
        stopping.set()

    def work(pair: Pair) -> CheckedPair:
        return _check_and_write_pair(pair, source, settings, folder, stopping)

    return list(in_threads(work, pairs, "checking"))


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


def _check_and_write_pair(pair: Pair, source: Source, settings: Settings, folder: Path, stopping: Event) -> CheckedPair:
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
    mask = attempt(part_files[0], read_labels, pair.mask, LABEL_ORDERS[settings.labels])
    if mask is not None:
        attempt(part_files[0], check_not_empty, mask)
    if image is not None and mask is not None:
        attempt(pair.image, check_same_shape, image, mask)
    if problems and settings.on_bad == "stop":
        stopping.set()
    if problems or stopping.is_set():
        return CheckedPair(pair.id, problems, {}, None)
    shares = torch.bincount(mask.flatten(), minlength=len(CELEBAMASK19)) / mask.numel()
    if settings.size is None:
        return CheckedPair(pair.id, [], write_pair(folder, pair.id, pair.image, mask), shares)
    return CheckedPair(
        pair.id, [], write_pair(folder, pair.id, *center_crop_resize(image, mask, settings.size)), shares
    )
