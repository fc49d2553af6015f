"""Diversity of the images drawn from one mask."""

from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ssmgen.metrics.backbones import weights_hash
from ssmgen.metrics.counted import Counted


def pairwise_rms(images: Tensor) -> float:
    """Mean root-mean-square difference over all pairs of ``(count, channels, height, width)`` images.

    It is in the units of the images: in [-1, 1], identical images give 0 and independent noise more than 0.8. This is
    a cheap pixel distance without weights, not LPIPS.

    Raises:
        ValueError: fewer than two images.
    """
    _check_count(images)
    flat = images.float().flatten(1)
    return (torch.pdist(flat) / flat.shape[1] ** 0.5).mean().item()


class LPIPSDiversity(Counted):
    """Mean LPIPS (arXiv 1801.03924) over all pairs of images of a mask, and over masks: higher is more diverse.

    As in StarGAN v2 (arXiv 1912.01865) and SDM, with 10 images and so 45 pairs per mask. It does not measure
    quality: noise scores high.

    Args:
        network: a module that maps two batches in [-1, 1] to distances, such as `ssmgen.metrics.published_lpips`.
        pairs: pairs per call of the network; fixed, so that results do not depend on other batch sizes.
    """

    def __init__(self, network: Any, pairs: int = 15) -> None:
        self.network = network
        self.pairs = pairs
        #: Mean distance and shape of the images, by mask.
        self.counted: dict[str, tuple[float, tuple[int, ...]]] = {}

    @torch.no_grad()
    def update(self, mask: str, images: Tensor) -> None:
        """Count the images ``(count, 3, h, w)`` in [-1, 1] of a mask.

        Raises:
            ValueError: fewer than two images, a count or size unlike earlier ones, or a mask counted before.
        """
        _check_count(images)
        if mask in self.counted:
            raise ValueError(f"mask {mask} was counted already")
        shape = tuple(images.shape)
        if others := self._shapes() - {shape}:
            raise ValueError(f"mask {mask}: images are {shape}, those of other masks {others.pop()}")
        first, second = (torch.tensor(side) for side in zip(*combinations(range(len(images)), 2), strict=True))
        parts = zip(first.split(self.pairs), second.split(self.pairs), strict=True)
        distances = torch.cat([self.network(images[a], images[b]).flatten().double() for a, b in parts])
        self.counted[mask] = distances.mean().item(), shape

    def result(self) -> dict[str, Any]:
        """``value`` (mean over masks), number of ``masks``, ``protocol``, and hashes of ``weights`` and ``list``.

        Raises:
            ValueError: nothing was counted, or the counts or sizes of images differ between processes.
        """
        if not self.counted:
            raise ValueError("no masks were counted: call update first")
        shapes = sorted(self._shapes())
        if len(shapes) > 1:
            raise ValueError(
                f"the images of some masks are {shapes[0]}, those of others {shapes[1]}: use one count and size for "
                "all masks"
            )
        samples, _, height, width = shapes[0]
        return {
            "value": sum(self.counted[m][0] for m in sorted(self.counted)) / len(self.counted),
            "masks": len(self.counted),
            "protocol": f"lpips[{getattr(self.network, 'protocol', type(self.network).__name__)},diversity,"
            f"size={height}x{width},samples={samples},pairs={samples * (samples - 1) // 2},masks={len(self.counted)}]",
            "weights": weights_hash(self.network),
            "list": self.list_hash(),
        }

    def _shapes(self) -> set[tuple[int, ...]]:
        return {shape for _, shape in self.counted.values()}


def _check_count(images: Tensor) -> None:
    if images.dim() != 4 or len(images) < 2:
        raise ValueError(f"images must be (count, channels, height, width) with count >= 2, got {tuple(images.shape)}")
