"""The examples of a step: a function of the seed and the step alone, so that resuming needs no state."""

import hashlib
import itertools
from collections.abc import Iterator

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

    Args:
        count, batch_size: examples in the data set, and per step.
        seed, first: the run's seed, and the first step.
        rank, world_size: take every ``world_size``-th example of each batch, from the ``rank``-th on.

    Raises:
        ValueError: an empty data set.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, first: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if count < 1:
            raise ValueError("the data set is empty")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.first, self.rank, self.world_size = first, rank, world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in itertools.count(self.first):
            yield self.batch(step)[self.rank :: self.world_size]

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The whole batch of a step."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [(self._permutation(p // self.count)[p % self.count], p // self.count) for p in positions]

    def _permutation(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator).tolist()
        return self._order
