"""Distances between generated and real images of an evaluation: FID and KID by named protocols, LPIPS, and a proxy.

Whatever can be missing (packages, weights, a protocol's name, enough images) is found before anything is sampled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.sisma.arguments import UsageError
from ssmgen.metrics import (
    FID_PROTOCOLS,
    FeatureSet,
    FIDProtocol,
    InceptionTrunk,
    LPIPSDiversity,
    SqueezeNetTrunk,
    frechet_distance,
    kernel_distance,
    published_lpips,
)
from ssmgen.metrics.backbones import ALEXNET, INCEPTION, sha256_of
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
    """A trunk that is ready, and what its numbers go by."""

    name: str
    trunk: nn.Module
    weights: str
    protocol: FIDProtocol | None


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
    measures = []
    for name in asked:
        trunk = InceptionTrunk.published(settings.weights, FID_PROTOCOLS[name].resize, download=settings.download)
        measures.append(Measure(name, trunk, INCEPTION.sha256, FID_PROTOCOLS[name]))
    if settings.proxy:
        trunk = SqueezeNetTrunk(settings.proxy)
        measures.append(Measure(trunk.name, trunk, sha256_of(Path(settings.proxy)), None))
    return measures


def load_lpips(settings: DistanceSettings) -> Any:
    """The LPIPS network if it was asked for, else None; raises as `load_measures` does."""
    return published_lpips(settings.weights, download=settings.download) if settings.lpips else None


def distances(
    measure: Measure, ids: list[str], generated: Tensor, real: Tensor, train: Any, seed: int
) -> dict[str, Any]:
    """Frechet and kernel distance of the generated images, and of real ones against real ones.

    Args:
        measure: what to measure with.
        ids: of the masks.
        generated: an image of each, uint8 ``(n, 3, h, w)``.
        real: the real image of each.
        train: the training pairs, read only by a protocol that compares with them.
        seed: of the sampling, for the protocol's string.

    Returns:
        ``frechet`` and, from 1,000 images on, ``kernel``, each with counts and hashes; ``noise_floor``, the Frechet
        distance of one half of the real images from the other; the ``protocol``'s string and the ``weights``' hash.
    """
    mine, reference = _features(measure, _batches(ids, generated)), _features(measure, _batches(ids, real))
    halves = (_features(measure, _batches(ids[half::2], real[half::2])) for half in (0, 1))
    if measure.protocol is not None and measure.protocol.reference == "train":
        reference = _features(measure, _training_batches(train))
    result: dict[str, Any] = {
        "frechet": frechet_distance(mine, reference),
        "noise_floor": frechet_distance(*halves),
        "protocol": _string(measure, len(mine), len(reference), seed),
        "weights": measure.weights,
    }
    if min(len(mine), len(reference)) >= _KID_SUBSET:
        result["kernel"] = kernel_distance(mine, reference, subset_size=_KID_SUBSET)
    return result


def lpips_diversity(network: Any, names: list[str], several: Tensor) -> dict[str, Any]:
    """Mean LPIPS over all pairs of samples of a mask, over masks.

    Args:
        network: from `load_lpips`.
        names: of the masks.
        several: uint8 ``(masks, samples, 3, h, w)``.
    """
    diversity = LPIPSDiversity(network)
    for name, images in zip(names, several, strict=True):
        diversity.update(name, images.float() / 127.5 - 1)
    samples = several.shape[1]
    pairs = samples * (samples - 1) // 2
    protocol = f"lpips[alex-0.1,diversity,samples={samples},pairs={pairs},masks={len(names)}]"
    return diversity.result() | {"protocol": protocol, "weights": ALEXNET.sha256}


def _features(measure: Measure, batches: Iterable[tuple[list[str], Tensor]]) -> FeatureSet:
    features = FeatureSet(measure.trunk)
    for ids, images in batches:
        features.update(ids, images if measure.protocol is None else measure.protocol.prepare(images))
    return features


def _batches(ids: list[str], images: Tensor) -> Iterable[tuple[list[str], Tensor]]:
    for start in range(0, len(images), _BATCH):
        yield ids[start : start + _BATCH], images[start : start + _BATCH]


def _training_batches(pairs: Any) -> Iterable[tuple[list[str], Tensor]]:
    for start in range(0, len(pairs), _BATCH):
        numbers = range(start, min(start + _BATCH, len(pairs)))
        yield [f"{number:06d}" for number in numbers], torch.stack([pairs[number][0] for number in numbers])


def _string(measure: Measure, count: int, reference: int, seed: int) -> str:
    if measure.protocol is None:
        return f"proxy[{measure.name},pooled512,ref=test{reference},n={count},seed={seed}]"
    return measure.protocol.string(count, reference, seed)
