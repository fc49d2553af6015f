"""Distribute pairs to train and test splits, and check whether these are large enough to train and to evaluate."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes.sisma.prepare.sources import Source
from ssmgen.data.folder import load_splits

METHODS = ("first28k", "celeba", "by-name")  # besides a JSON file
MIN_TEST_PAIRS = 2  # that an evaluation needs: its floor compares images with other masks
TEST_SHARE = 0.08  # of by-name
_FIRST_TEST = 28_000  # of first28k


def choose_method(split: str, source: Source) -> str:
    """The method that ``split=auto`` selects: ``first28k`` for the official layout, ``by-name`` otherwise.

    A part of the archive with pairs on one side of id 28000 only is split by name as well, with a note.
    """
    if split != "auto":
        return split
    if source.layout != "official":
        return "by-name"
    if len({int(pair.id) < _FIRST_TEST for pair in source.pairs}) != 1:
        return "first28k"
    side = "below" if int(source.pairs[0].id) < _FIRST_TEST else "from"
    source.notes.append(f"all its ids are {side} {_FIRST_TEST}, so it is split by name, not by number")
    return "by-name"


def split_pairs(split: str, source: Source, test_share: float = TEST_SHARE) -> dict[str, list[str]]:
    """Distribute the ids of the pairs to splits, each in the order of the source.

    Args:
        split: ``first28k`` (ids below 28000 are for training, the others for testing), ``celeba`` (CelebA's partition,
            from the mapping file), ``by-name`` (a hash of the name decides, so that a pair keeps its split when others
            are added), or a JSON file.
        source: the pairs.
        test_share: of ``by-name``.

    Raises:
        FileNotFoundError: the mapping or the JSON file is missing.
        ValueError: a split by number of names that are not numbers, or a file that does not fit the pairs.
    """
    ids = [pair.id for pair in source.pairs]
    if split == "by-name":
        return split_by_name(ids, test_share)
    if split.endswith(".json"):
        return _from_file(Path(split), ids, source)
    if names := [id for id in ids if not id.isdecimal()]:
        raise ValueError(
            f"split={split} goes by the dataset's numbers, but {len(names)} of {len(ids)} pairs have other names, e.g. "
            f"{names[0]!r}: use split=by-name or a JSON file"
        )
    if split == "celeba":
        return _celeba(ids, source.root / "CelebA-HQ-to-CelebA-mapping.txt")
    train = [id for id in ids if int(id) < _FIRST_TEST]
    return {"train": train, "test": [id for id in ids if int(id) >= _FIRST_TEST]}


def check_splits(requested: str, splits: Mapping[str, Sequence[str]]) -> None:
    """Reject a requested split by number that leaves no pairs to train or to test, before 30,000 pairs are read."""
    empty = [name for name in ("train", "test") if not splits.get(name)]
    if requested in ("first28k", "celeba") and empty:
        raise ValueError(
            f"split={requested} leaves no pair for {' and '.join(empty)}: this part of the archive has none of its "
            "ids. Use split=by-name or a JSON file."
        )


def split_by_name(ids: Sequence[str], test_share: float) -> dict[str, list[str]]:
    """Distribute ids to ``train`` and ``test`` by a hash of each."""
    splits: dict[str, list[str]] = {"train": [], "test": []}
    for id in ids:
        splits["test" if _percentile(id) / 100 < test_share else "train"].append(id)
    return splits


def read_mapping(path: Path) -> dict[int, int]:
    """Read the mapping file: id in CelebA-HQ to index in CelebA.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not ``idx orig_idx orig_file``; names the line.
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


def shortfall(splits: Mapping[str, Sequence[str]]) -> str:
    """What is missing to train or to evaluate, as part of a sentence; empty if nothing is."""
    train, test = (len(splits.get(name, ())) for name in ("train", "test"))
    missing = [] if train else ["no pair to train on"]
    if test < MIN_TEST_PAIRS:
        missing.append(f"{test or 'no'} test pair, and an evaluation needs {MIN_TEST_PAIRS}")
    return " and ".join(missing)


def remedy(splits: Mapping[str, Sequence[str]], split: str) -> str:
    """How to prepare pairs that ``split=`` divided into splits too small, so that both are large enough: a sentence."""
    ids = [id for members in splits.values() for id in members]
    needed = 1 + MIN_TEST_PAIRS
    if len(ids) < needed:
        return f"Add pairs and prepare again: it takes {needed}, one to train on and {MIN_TEST_PAIRS} to evaluate."
    if split.endswith(".json"):
        return f"Name some in {split}, or prepare again with split=by-name."
    share = (sorted(map(_percentile, ids))[MIN_TEST_PAIRS - 1] + 1) / 100
    test = split_by_name(ids, share)["test"]
    if len(test) == len(ids):  # all have the same percentile
        return 'Prepare again with split=FILE.json, such as {"train": [...], "test": [...]}.'
    if share <= TEST_SHARE:
        return "Prepare again with split=by-name."
    return f"Prepare again with split=by-name test_share={share:.2f}: {len(test)} test pairs of {len(ids)}."


def _percentile(id: str) -> int:
    """A number in 0..99 that depends on the name alone; the lowest are test pairs."""
    return int(hashlib.sha256(id.encode()).hexdigest()[:8], 16) % 100


def _celeba(ids: list[str], mapping: Path) -> dict[str, list[str]]:
    """CelebA's partition, with the limits of the dataset's own script."""
    original = read_mapping(mapping)
    if unmapped := [id for id in ids if int(id) not in original]:
        raise ValueError(f"{mapping}: has no line for {len(unmapped)} image(s): {', '.join(unmapped)}")
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for id in ids:
        index = original[int(id)]
        splits["train" if index < 162_771 else "val" if index < 182_638 else "test"].append(id)
    return splits


def _from_file(path: Path, ids: list[str], source: Source) -> dict[str, list[str]]:
    splits = load_splits(path)
    present, bad = set(ids), {problem.id for problem in source.problems}
    listed = [id for members in splits.values() for id in members]
    if unknown := [id for id in listed if id not in present and id not in bad]:
        raise ValueError(f"{path}: {len(unknown)} id(s) are not in {source.root}: {', '.join(unknown)}")
    if rest := len(present - set(listed)):
        source.notes.append(f"{rest} pair(s) are in no split of {path.name} and are left out")
    return {name: [id for id in members if id in present] for name, members in splits.items()}
