"""Several crops of every image, for small sets: encoded once like the images themselves."""

from __future__ import annotations

import random

from torch import Tensor
from torch.utils.data import Dataset

from ssmgen.data.latent_cache import PairDataset
from ssmgen.data.transforms import crop_resize


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Every pair ``count`` times: its centre, then parts of it chosen by ``seed``, the same of image and mask.

    Pair ``i`` of the source is items ``i * count`` to ``(i + 1) * count``.

    Args:
        pairs: image-mask pairs, larger than ``size`` for crops without loss.
        size: side of the square results in pixels.
        count: crops of a pair.
        smallest: the least share of the largest square's side that a crop covers, in (0, 1].
        seed: of the choice.

    Raises:
        ValueError: ``count`` below 1, or ``smallest`` outside (0, 1].
    """

    def __init__(self, pairs: PairDataset, size: int, count: int, smallest: float = 0.8, seed: int = 0) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if not 0 < smallest <= 1:
            raise ValueError(f"smallest must be in (0, 1], got {smallest}")
        self.pairs, self.size, self.count, self.smallest, self.seed = pairs, size, count, smallest, seed
        self.labels = pairs.labels

    def __len__(self) -> int:
        return len(self.pairs) * self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image ``(3, size, size)`` uint8 and mask ``(size, size)`` uint8."""
        if not 0 <= index < len(self):
            raise IndexError(f"crop {index} of {len(self)}")
        pair, crop = divmod(index, self.count)
        image, mask = self.pairs[pair]
        if crop == 0:
            return crop_resize(image, mask, self.size)
        chance = random.Random(f"crop {self.seed} {pair} {crop}")
        share = chance.uniform(self.smallest, 1)
        return crop_resize(image, mask, self.size, share, (chance.random(), chance.random()))

    def fingerprint(self) -> str:
        """Names the exact crops, for caches."""
        return f"{self.pairs.fingerprint()}-crops{self.count}-of{self.smallest}-size{self.size}-seed{self.seed}"
