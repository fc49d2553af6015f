"""Distances between generated and real images of an evaluation: FID and KID by named protocols, LPIPS, and a proxy.

Whatever can be missing (packages, weights, a protocol's name, enough images) is found before anything is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recipes.sisma.arguments import UsageError
from recipes.sisma.generated import pair_ids
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

_LEAST = 4  # two halves of the real images are compared, and a covariance takes two images
_KID_SUBSET = 1000
_BATCH = 16


@dataclass
class DistanceSettings:
    """Keys of the command line that say which distances are measured.

    Attributes:
        fid: protocols, by their names in `ssmgen.metrics.FID_PROTOCOLS`, with commas between; empty is none.
        lpips: measure LPIPS diversity.
        proxy: a SqueezeNet 1.1 file: the Frechet distance over its features, which is not FID.
        weights: the folder of Inception's and AlexNet's published weights.
        download: fetch weights that are not there.
    """

    fid: str = ""
    lpips: bool = False
    proxy: str = ""
    weights: str = "weights"
    download: bool = False


@dataclass(frozen=True)
class Measure:
    """A trunk that is ready, the name its numbers go by, and which real images it compares with."""

    name: str
    trunk: nn.Module
    reference: str = "test"


def load_measures(settings: DistanceSettings, count: int) -> list[Measure]:
    """The trunks of what was asked for, with their weights checked.

    Args:
        settings: what was asked for.
        count: real images there will be to compare with.

    Raises:
        UsageError: no such protocol.
        ValueError: too few images, or weights that are not the published ones.
        FileNotFoundError: weights that are not there; the message names file and address.
    """
    asked = [name for name in settings.fid.split(",") if name]
    for name in asked:
        if name not in FID_PROTOCOLS:
            raise UsageError(f"unknown protocol fid={name!r}{closest(name, FID_PROTOCOLS)} "
                             f"There are {', '.join(FID_PROTOCOLS)}.")  # fmt: skip
    if (asked or settings.proxy) and count < _LEAST:
        raise ValueError(f"fid= and proxy= need at least {_LEAST} unseen masks with real images, got {count}")
    measures = [
        Measure(
            name,
            FID_PROTOCOLS[name].published(settings.weights, download=settings.download),
            FID_PROTOCOLS[name].reference,
        )
        for name in asked
    ]
    if settings.proxy:
        measures.append(Measure(SqueezeNetTrunk.name, SqueezeNetTrunk(settings.proxy)))
    for measure in measures:
        measure.trunk.to(_device())
    return measures


def load_lpips(settings: DistanceSettings) -> Any:
    """The LPIPS network if it was asked for, else None; raises as `load_measures` does."""
    return published_lpips(settings.weights, download=settings.download).to(_device()) if settings.lpips else None


def distances(
    measure: Measure, ids: list[str], generated: Tensor, real: Tensor, train: Any, of: str, step: Callable[[int], Any]
) -> dict[str, Any]:
    """Frechet and kernel distance of the generated images, and of real ones against real ones.

    Args:
        measure: what to measure with.
        ids: of the masks.
        generated: an image of each, uint8 ``(n, 3, h, w)``.
        real: the real image of each.
        train: the training pairs, read only by a protocol that compares with them.
        of: what the generated images are, for the protocol's string, such as ``seed=0``.
        step: called with every number of images that are done.

    Returns:
        ``frechet`` and ``kernel``, each with its protocol, counts and hashes; ``noise_floor`` and
        ``kernel_noise_floor``, those of one half of the real images from the other; the ``protocol`` and ``weights``
        of the first again. Kernel distances are over subsets of 1,000 images, or as many as a half has: their mean does
        not depend on that, their deviation does.
    """
    mine = _features(measure, of, _batches(ids, generated), step)
    test = _features(measure, "test", _batches(ids, real), step)
    reference = test
    if measure.reference == "train":
        reference = _features(measure, "train", _training_batches(train), step)
    halves = _half(test, 0), _half(test, 1)
    subset = min(_KID_SUBSET, len(reference), *map(len, halves))
    result: dict[str, Any] = {
        "frechet": frechet_distance(mine, reference),
        "noise_floor": frechet_distance(*halves),
        "kernel": kernel_distance(mine, reference, subset_size=subset),
        "kernel_noise_floor": kernel_distance(*halves, subset_size=subset),
    }
    return result | {key: result["frechet"][key] for key in ("protocol", "weights")}


def work(measure: Measure, count: int, train: Any) -> int:
    """How many images `distances` looks at."""
    return 2 * count + (len(train) if measure.reference == "train" else 0)


def lpips_diversity(
    network: Any, names: list[str], several: Sequence[Tensor], step: Callable[[int], Any]
) -> dict[str, Any]:
    """Mean LPIPS over all pairs of samples of a mask, over masks.

    Args:
        network: from `load_lpips`.
        names: of the masks.
        several: for each mask uint8 ``(samples, 3, h, w)``; one after another is read.
        step: called with 1 after every mask.
    """
    diversity = LPIPSDiversity(network)
    for name, images in zip(names, several, strict=True):
        diversity.update(name, (images.float() / 127.5 - 1).to(_device()))
        step(1)
    return diversity.result()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _features(
    measure: Measure, of: str, batches: Iterable[tuple[list[str], Tensor]], step: Callable[[int], Any]
) -> FeatureSet:
    features = FeatureSet(measure.trunk, of)
    for ids, images in batches:
        features.update(ids, images)
        step(len(ids))
    return features


def _half(whole: FeatureSet, which: int) -> FeatureSet:
    """Every second image of a set, from the first or the second on."""
    half = FeatureSet(whole.trunk, whole.of)
    half.counted = {id: whole.counted[id] for id in sorted(whole.counted)[which::2]}
    return half


def _batches(ids: list[str], images: Tensor) -> Iterable[tuple[list[str], Tensor]]:
    for start in range(0, len(images), _BATCH):
        yield ids[start : start + _BATCH], images[start : start + _BATCH]


def _training_batches(pairs: Any) -> Iterable[tuple[list[str], Tensor]]:
    ids = pair_ids(pairs)
    for start in range(0, len(pairs), _BATCH):
        numbers = range(start, min(start + _BATCH, len(pairs)))
        yield [ids[number] for number in numbers], torch.stack([pairs[number][0] for number in numbers])
