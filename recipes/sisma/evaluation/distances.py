"""Distances between generated and real images: FID and KID by named protocols, a proxy, and LPIPS diversity.

Missing packages or weights, unknown protocols and too few images are reported before any image is generated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recipes.sisma.arguments import UsageError
from recipes.sisma.evaluation.images import MIRRORED, HeldOut, Images, by_shape, pair_ids
from recipes.sisma.evaluation.settings import Settings
from ssmgen.metrics import (
    FID_PROTOCOLS,
    FeatureSet,
    LPIPSDiversity,
    SqueezeNetTrunk,
    frechet_distance,
    kernel_distance,
    published_lpips,
)
from ssmgen.registry import closest

_LEAST = 4  # the two halves of the real images are compared, and a covariance needs two images
_KID_SUBSET = 1000
_BATCH = 16


@dataclass(frozen=True)
class FeatureDistance:
    """A distance by its name, with its feature network and the real images it compares with: ``test`` or ``train``."""

    name: str
    trunk: nn.Module
    reference: str = "test"


def load_distances(settings: Settings, count: int) -> list[FeatureDistance]:
    """The distances that the settings ask for against ``count`` real images, with their weights loaded and checked.

    Raises:
        UsageError: an unknown protocol, or ``nearest`` without a distance.
        ValueError: too few images, or weights other than the published ones.
        FileNotFoundError: missing weights; the message gives file and address.
    """
    asked = [name for name in settings.fid.split(",") if name]
    for name in asked:
        if name not in FID_PROTOCOLS:
            known = f"{closest(name, FID_PROTOCOLS)} There are {', '.join(FID_PROTOCOLS)}."
            raise UsageError(f"unknown protocol fid={name!r}{known}")
    if settings.nearest and not (asked or settings.proxy):
        raise UsageError(
            "nearest=true compares features: give proxy=FILE, those of SqueezeNet 1.1, or fid=PROTOCOL, Inception's"
        )
    if (asked or settings.proxy) and count < _LEAST:
        raise ValueError(f"fid= and proxy= need at least {_LEAST} unseen masks with real images, got {count}")
    distances = []
    for name in asked:
        trunk = FID_PROTOCOLS[name].published(settings.weights, download=settings.download)
        distances.append(FeatureDistance(name, trunk, FID_PROTOCOLS[name].reference))
    if settings.proxy:
        distances.append(FeatureDistance(SqueezeNetTrunk.name, SqueezeNetTrunk(settings.proxy)))
    for distance in distances:
        distance.trunk.to(_device())
    return distances


def load_lpips(settings: Settings) -> Any:
    """The LPIPS network if requested, else None; raises as `load_distances` does."""
    return published_lpips(settings.weights, download=settings.download).to(_device()) if settings.lpips else None


def measure_distance(
    distance: FeatureDistance, held_out: HeldOut, generated: Any, train: Any, source: str, step: Callable[[int], Any]
) -> dict[str, Any]:
    """Frechet and kernel distance of the generated images from real ones, and of real images from real ones.

    Args:
        distance: what to measure.
        held_out: the masks' ids and real images.
        generated: an image of each mask, uint8 ``(n, 3, h, w)``, or a list.
        train: the training pairs, read only by a protocol that compares with them.
        source: of the generated images, for the protocol's string, such as ``seed=0``.
        step: called with the number of images of each finished batch.

    Returns:
        ``frechet`` and ``kernel``, each with its protocol, counts and hashes; ``noise_floor`` and
        ``kernel_noise_floor``, those between the two halves of the real images; and again the ``protocol`` and
        ``weights`` of the first. Kernel distances use subsets of 1,000 images, or as many as a half has: the size of
        the subsets affects their deviation, not their mean.
    """
    trunk = distance.trunk
    drawn = read_features(trunk, source, held_out.ids, generated.__getitem__, step)
    reference = test = read_features(trunk, "test", held_out.ids, held_out.images.__getitem__, step)
    if distance.reference == "train":
        reference = read_features(trunk, "train", pair_ids(train), lambda index: train[index][0], step)
    halves = _half(test, 0), _half(test, 1)
    subset = min(_KID_SUBSET, len(reference), *map(len, halves))
    frechet = frechet_distance(drawn, reference)
    return {
        "frechet": frechet,
        "noise_floor": frechet_distance(*halves),
        "kernel": kernel_distance(drawn, reference, subset_size=subset),
        "kernel_noise_floor": kernel_distance(*halves, subset_size=subset),
        "protocol": frechet["protocol"],
        "weights": frechet["weights"],
    }


def read_features(
    trunk: nn.Module,
    of: str,
    ids: Sequence[str],
    image_at: Callable[[int], Tensor],
    step: Callable[[int], Any],
    mirrored: bool = False,
) -> FeatureSet:
    """The features of images of any shape, in batches.

    Args:
        trunk, of: see `FeatureSet`.
        ids: of the images.
        image_at: gives the image ``(3, h, w)``, uint8, of a position in ``ids``.
        step: called with the number of images of each finished batch.
        mirrored: also those of the mirrored images, as ``<id> mirrored``.
    """
    found = FeatureSet(trunk, of)
    for start in range(0, len(ids), _BATCH):
        batch = ids[start : start + _BATCH]
        for places, group in by_shape([image_at(start + place) for place in range(len(batch))]):
            found.update([batch[place] for place in places], group)
            if mirrored:
                found.update([batch[place] + MIRRORED for place in places], group.flip(-1))
        step(len(batch))
    return found


def image_count(distance: FeatureDistance, count: int, train: Any) -> int:
    """How many images `measure_distance` reads for ``count`` masks."""
    return 2 * count + (len(train) if distance.reference == "train" else 0)


def lpips_diversity(network: Any, images: Images, step: Callable[[int], Any]) -> dict[str, Any]:
    """Mean LPIPS over all pairs of images of a mask, averaged over the masks with several; ``step(1)`` after each."""
    diversity = LPIPSDiversity(network)
    for id, samples in zip(images.sample_files, images.samples(), strict=True):
        diversity.update(id, (samples.float() / 127.5 - 1).to(_device()))
        step(1)
    return diversity.result()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _half(whole: FeatureSet, which: int) -> FeatureSet:
    """Every second image of a set, starting with the first (0) or the second (1)."""
    half = FeatureSet(whole.trunk, whole.of)
    half.counted = {id: whole.counted[id] for id in sorted(whole.counted)[which::2]}
    return half
