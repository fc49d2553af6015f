"""Check image-mask pairs and write them as one prepared folder.

    python -m recipes.sisma.prepare source=CelebAMask-HQ target=data/faces          # the official archive, unpacked
    python -m recipes.sisma.prepare source=my-faces target=data/faces               # images/ and masks/, paired by name
    python -m recipes.sisma.prepare source=my-photos target=data/photos labels=names.json merge=few.txt
    python -m recipes.sisma.prepare source=drawn target=data/drawn count=64 size=128  # drawn, no download

Every pair is read in full. If any has a problem, all problems are listed by file and nothing is written;
``on_bad=skip`` leaves those pairs out instead. The target appears under its name only when it is complete.
"""

import sys
from pathlib import Path
from typing import Any

from recipes.sisma.arguments import UsageError, command_line, from_command_line
from recipes.sisma.prepare.checks import (
    check_and_write,
    crossed_ids,
    find_notes,
    in_threads,
    list_problems,
    select_good,
)
from recipes.sisma.prepare.readers import DataSet, Reader, reader_of
from recipes.sisma.prepare.settings import Settings, check_settings, check_test_share
from recipes.sisma.prepare.sources import Pair, Problem, Source, find_source
from recipes.sisma.prepare.splits import check_splits, choose_method, remedy, shortfall, split_by_name, split_pairs
from ssmgen.atomic import check_space, whole_folder
from ssmgen.data.drawn_faces import draw_face, write_official_layout
from ssmgen.data.folder import check_target, write_pair, write_records
from ssmgen.data.labels import CELEBAMASK19
from ssmgen.signals import status_of

FACES = DataSet("recipes.sisma", ("faces",), Settings(), reader_of, drawn_faces=True)


def main(argv: list[str], data_set: DataSet = FACES) -> int | None:
    """Check and write the pairs of a source. A request to stop leaves nothing behind; its status is then returned.

    Args:
        argv: the command line, see `Settings`.
        data_set: a recipe's.

    Raises:
        ValueError, OSError: one message with all that the user has to fix.
    """
    settings = from_command_line(data_set.settings, argv)
    check_settings(settings, data_set.settings, data_set.drawn_faces)
    target = Path(settings.target).resolve()
    check_target(target)
    try:
        if settings.source == "drawn":
            _prepare_drawn(settings, target)
        else:
            _prepare_files(settings, target, data_set)
    except KeyboardInterrupt as stopped:
        print(f"{str(stopped) or 'stopped'}; nothing was written", file=sys.stderr)
        return status_of(stopped)
    return None


def _prepare_files(settings: Settings, target: Path, data_set: DataSet) -> None:
    reader = data_set.reader(settings)
    if settings.sides == "fix" and set(reader.labels.classes) != set(CELEBAMASK19.classes):
        raise UsageError("sides=fix knows the sides of the 19 classes of faces only: leave it out")
    source = find_source(Path(settings.source), settings.layout)
    requested, settings.split = settings.split, choose_method(settings.split, source)
    if settings.split != "by-name":
        check_test_share(settings, data_set.settings, f"split={settings.split}")
    splits = split_pairs(settings.split, source, settings.test_share)
    check_splits(requested, splits)
    in_a_split = {id for ids in splits.values() for id in ids}
    pairs = [pair for pair in source.pairs if pair.id in in_a_split]
    _check_space(target, pairs)
    with whole_folder(target) as folder:
        checked = check_and_write(pairs, source, reader, settings, folder)
        problems = source.problems + [problem for pair in checked for problem in pair.problems]
        good = select_good(checked, problems, settings.on_bad, folder)
        kept = {pair.id for pair in good}
        splits = {name: [id for id in ids if id in kept] for name, ids in splits.items()}
        notes = find_notes(source, good, splits, reader, settings.sides)
        hashes = {name: value for pair in good for name, value in pair.hashes.items()}
        record = _source_record(source, reader, settings, notes, problems) | {"crossed": crossed_ids(good)}
        write_records(folder, reader.labels, splits, hashes, record)
    _summarize(settings, data_set, splits, notes, problems)


def _source_record(
    source: Source, reader: Reader, settings: Settings, notes: list[str], problems: list[Problem]
) -> dict[str, Any]:
    """The record of the source; without absolute paths, since the folder may move."""
    return {
        "layout": source.layout,
        "folder": source.root.resolve().name,
        **reader.record(),
        "split": Path(settings.split).name,
        "test_share": settings.test_share if settings.split == "by-name" else None,
        "size": settings.size,
        "sides": settings.sides,
        "notes": notes,
        "left_out": [{"file": problem.file, "reason": problem.reason} for problem in problems],
    }


def _prepare_drawn(settings: Settings, target: Path) -> None:
    """Write drawn faces as a prepared folder, or in the official layout to try that path without the archive."""
    count = settings.count or 64
    if settings.layout == "official":
        with whole_folder(target) as folder:
            write_official_layout(folder, count, settings.size or 512, settings.seed)
        print(f"Wrote {count} drawn faces in the official layout to {settings.target}")
        print(f"Next: {command_line('prepare', f'source={settings.target}', 'target=DIR')}")
        return

    settings.split, size = "by-name", settings.size or 256

    def write(index: int) -> dict[str, str]:
        return write_pair(folder, f"{index:05d}", *draw_face(index, size, settings.seed))

    with whole_folder(target) as folder:
        written = list(in_threads(write, range(count), "drawing"))
        hashes = {name: value for files in written for name, value in files.items()}
        splits = split_by_name([f"{index:05d}" for index in range(count)], settings.test_share)
        record = {"layout": "drawn", "split": settings.split, "test_share": settings.test_share}
        write_records(folder, CELEBAMASK19, splits, hashes, record | {"size": size, "seed": settings.seed})
    _summarize(settings, FACES, splits, [], [])


def _summarize(
    settings: Settings, data_set: DataSet, splits: dict[str, list[str]], notes: list[str], problems: list[Problem]
) -> None:
    """Print what was left out, what was written, and the next command."""
    if problems:
        print(f"Left out for {len(problems)} problem(s):\n{list_problems(problems)}", file=sys.stderr)
    if notes:
        print("Worth knowing:\n" + "\n".join(f"  {note}" for note in notes))
    counts = ", ".join(f"{name} {len(ids)}" for name, ids in splits.items())
    print(f"Wrote {sum(map(len, splits.values()))} pairs to {settings.target}: {counts}")
    words = [*data_set.train, f"data={settings.target}"]
    if settings.source == "drawn":
        words = ["quick", f"data={settings.target}", f"image_size={settings.size or 256}"]
    if not (missing := shortfall(splits)):
        print(f"Next: {command_line('train', *words, recipe=data_set.recipe)}")
        return
    print(f"Before training: there is {missing}. {remedy(splits, settings.split)}")
    if splits.get("train"):
        without_samples = () if splits.get("test") else ("sample_every=0",)
        words += ["evaluate=false", *without_samples]
        print(f"Or train without an evaluation: {command_line('train', *words, recipe=data_set.recipe)}")


def _check_space(target: Path, pairs: list[Pair]) -> None:
    check_space(target, sum(pair.image.stat().st_size for pair in pairs if pair.image.exists()))
