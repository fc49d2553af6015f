"""What a user should know of pairs that are kept: known faults, a suspicious class order, identical images."""

from __future__ import annotations

from collections import defaultdict

import torch

from recipes.sisma.prepare.checks import CheckedPair
from recipes.sisma.prepare.sources import Source
from ssmgen.data.labels import BISENET19, CELEBAMASK19, LabelSet

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


def find_notes(source: Source, good: list[CheckedPair], splits: dict[str, list[str]], order: LabelSet) -> list[str]:
    """The notes of the source, and those on its good pairs."""
    notes = list(source.notes)
    if source.layout == "official":
        notes += _known_faults({int(pair.id) for pair in good})
    else:
        notes += _order_warning(good, order)
    notes += _identical_images(good, splits)
    notes += [f"split {name!r} is empty" for name, ids in splits.items() if not ids]
    return notes


def _known_faults(ids: set[int]) -> list[str]:
    found = [f"{id} ({KNOWN_FAULTS[id]})" for id in sorted(ids & KNOWN_FAULTS.keys())]
    return [f"faults of the dataset that its users reported, kept: {', '.join(found)}"] if found else []


def _order_warning(good: list[CheckedPair], order: LabelSet) -> list[str]:
    """Hair covers much of any face picture; the class that has the other order's hair id in this one is small."""
    shares = torch.stack([pair.shares for pair in good if pair.shares is not None]).mean(0)
    other = BISENET19 if order is CELEBAMASK19 else CELEBAMASK19
    # Shares are in the target's order: look up the class that the other order's hair id became.
    hair, suspect = shares[CELEBAMASK19.classes.index("hair")], order.classes[other.classes.index("hair")]
    share = shares[CELEBAMASK19.classes.index(suspect)]
    if share <= 2 * hair or share < 0.05:
        return []
    return [
        f"WARNING: {suspect} covers {share:.0%} of the masks and hair {hair:.0%}: they look like the class order "
        f"{other.name}. If they are, prepare them with labels={other.name}."
    ]


def _identical_images(good: list[CheckedPair], splits: dict[str, list[str]]) -> list[str]:
    split_of = {id: name for name, ids in splits.items() for id in ids}
    by_hash: dict[str, list[str]] = defaultdict(list)
    for pair in good:
        by_hash[next(value for name, value in pair.hashes.items() if name.startswith("images/"))].append(pair.id)
    groups = [ids for ids in by_hash.values() if len(ids) > 1]
    across = [ids for ids in groups if len({split_of[id] for id in ids}) > 1]
    if not groups:
        return []
    listed = "; ".join(" = ".join(ids) for ids in groups)
    return [f"identical images in {len(groups)} group(s), {len(across)} of them across splits, kept: {listed}"]
