"""The examples of a step: a function of the seed and the step alone, so that resuming needs no state."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from any number of parts, e.g. ``derived_seed(seed, "step", step)``.

    torch's CPU generator uses the lower 32 bits of a seed: among 100,000 steps, two share their noise with about 70 %
    probability. They still see different examples, so training does not suffer. `ssmgen.initial_noise` uses all bits.
    """
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class StepOrder(Sampler[list[tuple[int, int]]]):
    """Yields the batch of each step as pairs (index, draw), from step ``first`` on, without end.

    Every epoch is a permutation drawn from (seed, epoch). ``draw`` counts the epochs and seeds the augmentation of an
    example.

    With ``buckets``, a batch has examples of one bucket only. Each bucket has its own sequence of epochs, and a batch
    that reaches the end of one is filled from the next. A cycle of ``count`` steps has as many batches of a bucket as
    the bucket has examples: a cycle shows every example ``batch_size`` times. The order of the buckets is drawn from
    (seed, cycle), such that the batches of a bucket are spread over the cycle. A single bucket changes nothing.

    Args:
        count, batch_size: examples in the data set, and per step.
        seed, first: the run's seed, and the first step.
        rank, world_size: take every ``world_size``-th example of each batch, from the ``rank``-th on.
        buckets: the bucket of each example, or None.

    Raises:
        ValueError: an empty data set, or a number of buckets that is not ``count``.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        first: int = 0,
        rank: int = 0,
        world_size: int = 1,
        buckets: Sequence[int] | None = None,
    ) -> None:
        if count < 1:
            raise ValueError("the data set is empty")
        if buckets is not None and len(buckets) != count:
            raise ValueError(f"there are {count} examples, but buckets of {len(buckets)}")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.first, self.rank, self.world_size = first, rank, world_size
        members: dict[int, list[int]] = {}
        for index, bucket in enumerate(buckets or ()):
            members.setdefault(bucket, []).append(index)
        #: The examples of each bucket; empty if all are of one.
        self.buckets = [members[bucket] for bucket in sorted(members)] if len(members) > 1 else []
        self._epochs: dict[int | None, tuple[int, list[int]]] = {}
        self._cycle: tuple[int, list[int], list[int]] | None = None

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in itertools.count(self.first):
            yield self.batch(step)[self.rank :: self.world_size]

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The whole batch of a step."""
        if not self.buckets:
            return [(place, draw) for draw, place in self._drawn(step, self.count)]
        bucket, number = self._turn(step)
        members = self.buckets[bucket]
        return [(members[place], draw) for draw, place in self._drawn(number, len(members), bucket)]

    def _drawn(self, number: int, count: int, bucket: int | None = None) -> Iterator[tuple[int, int]]:
        """Epoch and example of each position of the ``number``-th batch of ``count`` examples."""
        for position in range(number * self.batch_size, (number + 1) * self.batch_size):
            epoch, place = divmod(position, count)
            yield epoch, self._permutation(epoch, count, bucket)[place]

    def _permutation(self, epoch: int, count: int, bucket: int | None) -> list[int]:
        known = self._epochs.get(bucket)
        if known is None or known[0] != epoch:
            parts = () if bucket is None else ("bucket", bucket)
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "epoch", epoch, *parts))
            known = self._epochs[bucket] = epoch, torch.randperm(count, generator=generator).tolist()
        return known[1]

    def _turn(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and the number of its earlier batches."""
        cycle, place = divmod(step, self.count)
        if self._cycle is None or self._cycle[0] != cycle:
            self._cycle = cycle, *self._schedule(cycle)
        _, turns, earlier = self._cycle
        return turns[place], cycle * len(self.buckets[turns[place]]) + earlier[place]

    def _schedule(self, cycle: int) -> tuple[list[int], list[int]]:
        """The bucket of each step of a cycle, and the number of its earlier batches in the cycle.

        A bucket's j-th of n batches falls at random into the j-th of n equal parts of the cycle.
        """
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "buckets", cycle))
        sizes = torch.tensor([len(members) for members in self.buckets])
        of = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        number = torch.cat([torch.arange(size) for size in sizes.tolist()])
        times = (number + torch.rand(self.count, generator=generator, dtype=torch.float64)) / sizes[of]
        order = times.argsort(stable=True)
        return of[order].tolist(), number[order].tolist()


def order_of(data: Any, batch_size: int, seed: int, first: int = 0, rank: int = 0, world_size: int = 1) -> StepOrder:
    """The order of a data set, in its buckets if it has a method ``bucket_of(index)``.

    Raises:
        ValueError: an empty data set.
    """
    bucket_of, count = getattr(data, "bucket_of", None), len(data)
    buckets = [bucket_of(index) for index in range(count)] if bucket_of else None
    return StepOrder(count, batch_size, seed, first, rank, world_size, buckets)
