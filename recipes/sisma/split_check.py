"""Whether the splits of a prepared folder are large enough to train, to show samples and to evaluate."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

#: Test pairs an evaluation needs: its floor sets images against other masks.
EVALUATED = 2
#: Of all pairs, where a name decides on the split.
TEST_SHARE = 0.08


def percentile(id: str) -> int:
    """A number in 0..99 that belongs to a name, whatever other names there are; the lowest are test pairs."""
    return int(hashlib.sha256(id.encode()).hexdigest()[:8], 16) % 100


def is_test(id: str, test_share: float = TEST_SHARE) -> bool:
    """Whether a pair of this name is a test pair where names decide."""
    return percentile(id) / 100 < test_share


def shortfall(splits: Mapping[str, Sequence[str]]) -> str:
    """What is too small to train on or to evaluate with, as part of a sentence; empty where nothing is."""
    train, test = (len(splits.get(name, ())) for name in ("train", "test"))
    found = [] if train else ["no pair to train on"]
    if test < EVALUATED:
        found.append(f"{test or 'no'} test pair, and an evaluation needs {EVALUATED}")
    return " and ".join(found)


def remedy(splits: Mapping[str, Sequence[str]], split: str) -> str:
    """How to prepare the same pairs so that there are enough: a sentence.

    Args:
        splits: ids by split, too few of them.
        split: how they were made, as in ``recipes.sisma.prepare split=``.
    """
    ids = [id for members in splits.values() for id in members]
    if len(ids) < 1 + EVALUATED:
        return f"Add pairs and prepare again: it takes {1 + EVALUATED}, one to train on and {EVALUATED} to evaluate."
    if split.endswith(".json"):
        return f"Name some in {split}, or prepare again with split=by-name."
    drawn = sorted(map(percentile, ids))
    share = (drawn[EVALUATED - 1] + 1) / 100
    test = [id for id in ids if is_test(id, share)]
    if len(test) == len(ids):  # all have one number
        return 'Prepare again with split=FILE.json, such as {"train": [...], "test": [...]}.'
    if share <= TEST_SHARE:
        return "Prepare again with split=by-name."
    return f"Prepare again with split=by-name test_share={share:.2f}: {len(test)} test pairs of {len(ids)}."
