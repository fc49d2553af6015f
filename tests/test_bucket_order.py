"""Training in buckets: every batch has one shape, and is still a function of the seed and the step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset
from toy_training import Rectangles, digests, run

from ssmgen.data import repeats
from ssmgen.training import checkpoints
from ssmgen.training.order import StepOrder, derived_seed, order_of

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def buckets_of(sizes: list[int], seed: int = 0) -> list[int]:
    """Bucket 10 * g of each example, mixed."""
    groups = [10 * group for group, size in enumerate(sizes) for _ in range(size)]
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    return [groups[place] for place in order]


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, batch=st.integers(1, 6), seed=st.integers(0, 5))
def test_every_batch_has_one_bucket_and_a_cycle_shows_every_example_equally_often(
    sizes: list[int], batch: int, seed: int
) -> None:
    buckets = buckets_of(sizes)
    count = len(buckets)
    order = StepOrder(count, batch, seed, buckets=buckets)
    for cycle in range(2):
        batches = [order.batch(step) for step in range(cycle * count, (cycle + 1) * count)]
        assert all(len(found) == batch and len({buckets[index] for index, _ in found}) == 1 for found in batches)
        seen = Counter(pair for found in batches for pair in found)
        draws = range(cycle * batch, (cycle + 1) * batch)
        assert seen == Counter((index, draw) for index in range(count) for draw in draws), "each draw of each once"


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, batch=st.integers(1, 6), first=st.integers(0, 60), world=st.integers(1, 3))
def test_the_batch_of_a_step_needs_no_earlier_one(sizes: list[int], batch: int, first: int, world: int) -> None:
    buckets = buckets_of(sizes)
    whole = StepOrder(len(buckets), batch * world, 3, buckets=buckets)
    walked = [whole.batch(step) for step in range(first + 2)][first:]
    ranks = [iter(StepOrder(len(buckets), batch * world, 3, first, rank, world, buckets)) for rank in range(world)]
    for expected in walked:
        parts = [next(rank) for rank in ranks]
        assert [len(part) for part in parts] == [batch] * world
        assert sorted(sum(parts, [])) == sorted(expected)


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 9))
def test_buckets_take_turns_in_proportion_to_their_sizes(sizes: list[int], seed: int) -> None:
    buckets = buckets_of(sizes)
    count = len(buckets)
    order = StepOrder(count, 1, seed, buckets=buckets)
    turns = [buckets[order.batch(step)[0][0]] for step in range(count)]
    for group, size in enumerate(sizes):
        for step in range(count + 1):
            assert abs(turns[:step].count(10 * group) - size * step / count) < len(sizes) + 1


def test_the_order_depends_on_the_seed_and_the_cycle() -> None:
    buckets = buckets_of([20, 12])
    orders = [StepOrder(32, 2, seed, buckets=buckets) for seed in (0, 1)]
    turns = [[buckets[order.batch(step)[0][0]] for step in range(64)] for order in orders]
    assert turns[0] != turns[1] and turns[0][:32] != turns[0][32:]
    first = [order.batch(0) + order.batch(1) for order in orders]
    assert first[0] != first[1]


def test_a_single_bucket_keeps_the_order_without_buckets() -> None:
    plain = StepOrder(7, 3, seed=5)
    # As ssmgen drew it before it had buckets.
    generator = torch.Generator().manual_seed(derived_seed(5, "epoch", 0))
    assert [index for step in range(2) for index, _ in plain.batch(step)] == torch.randperm(
        7, generator=generator
    ).tolist()[:6]
    for buckets in (None, [4] * 7):
        other = StepOrder(7, 3, seed=5, buckets=buckets)
        assert [other.batch(step) for step in range(20)] == [plain.batch(step) for step in range(20)]
    with pytest.raises(ValueError, match="there are 7 examples, but buckets of 3"):
        StepOrder(7, 3, seed=5, buckets=[0, 0, 0])


def test_a_training_in_buckets_resumes_exactly(tmp_path: Path) -> None:
    for folder, steps, resume in (("whole", 12, None), ("cut", 5, None), ("cut", 12, "auto")):
        run(tmp_path / folder, data=Rectangles(), steps=steps, checkpoint_every=5, resume=resume)
    ends = [digests(checkpoints(tmp_path / folder / "checkpoints")[-1]) for folder in ("whole", "cut")]
    assert ends[0] == ends[1] and len(ends[0]) == 3


class Repeated(Dataset[Any]):
    """Those with rare classes more than once."""

    def __init__(self, data: Rectangles) -> None:
        self.data = data
        self.examples = repeats((data[index, 0]["mask"] for index in range(len(data))), 1.0)

    def __len__(self) -> int:
        return len(self.examples)

    def bucket_of(self, position: int) -> int:
        return self.data.bucket_of(self.examples[position][0])


def test_repeats_of_rare_classes_stay_in_their_buckets() -> None:
    data = Repeated(Rectangles())
    assert len(data) > 10
    order = order_of(data, 4, 0)
    seen: Counter[int] = Counter()
    for step in range(len(data)):
        found = order.batch(step)
        assert len({data.bucket_of(position) for position, _ in found}) == 1
        seen.update(data.examples[position][0] for position, _ in found)
    times = Counter(index for index, _ in data.examples)
    assert seen == Counter({index: 4 * count for index, count in times.items()})


def test_a_batch_is_collated_by_the_data_set_that_asks_for_it(tmp_path: Path) -> None:
    class Ragged(Rectangles):
        padded: list[int] = []

        def collate(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            self.padded.append(len(examples))
            return {name: torch.stack([example[name] for example in examples]) for name in ("data", "mask")}

    run(tmp_path, data=Ragged(), steps=2)
    assert Ragged.padded[:2] == [4, 4]
