"""Several crops of every image: more data from a small set, before it is encoded."""

import random

from torch import Tensor
from torch.utils.data import Dataset

from ssmgen.data.pairs import Pairs
from ssmgen.data.transforms import crop_resize


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """``count`` crops of every pair: the centre, then random parts, the same part of image and mask.

    Pair ``i`` of the source becomes items ``i * count`` to ``(i + 1) * count - 1``.

    Args:
        pairs: image-mask pairs, larger than ``size`` so that no crop is enlarged.
        size: side of the square results in pixels.
        count: crops per pair.
        smallest: smallest side of a crop, as a share of the side of the largest square, in (0, 1].
        seed: of the random crops.

    Raises:
        ValueError: ``count`` below 1, or ``smallest`` outside (0, 1].
    """

    def __init__(self, pairs: Pairs, size: int, count: int, smallest: float = 0.8, seed: int = 0) -> None:
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
        rng = random.Random(f"crop {self.seed} {pair} {crop}")
        share = rng.uniform(self.smallest, 1)
        return crop_resize(image, mask, self.size, share, (rng.random(), rng.random()))

    def fingerprint(self) -> str:
        """Identifies the exact crops, for caches."""
        return f"{self.pairs.fingerprint()}-crops{self.count}-of{self.smallest}-size{self.size}-seed{self.seed}"
