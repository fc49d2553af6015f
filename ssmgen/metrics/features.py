"""Distances between two sets of images by the features of a network: FID and KID, and the same over a proxy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmgen.extras import require


class FeatureSet:
    """Features of a set of images, each under its image's id.

    Images stream through; what stays is one row each (8 KiB of Inception's). The rows are used in the order of their
    ids, so that neither batches nor the number of processes change a result.

    Args:
        trunk: images uint8 ``(batch, 3, h, w)`` to features ``(batch, d)``.
    """

    def __init__(self, trunk: nn.Module) -> None:
        self.trunk = trunk
        self._rows: dict[str, Tensor] = {}

    def update(self, ids: Sequence[str], images: Tensor) -> None:
        """Add images ``(batch, 3, h, w)``, uint8, under their ids.

        Raises:
            ValueError: not as many ids as images, an id given twice, or the trunk's input is wrong.
        """
        if len(ids) != len(images):
            raise ValueError(f"one id an image: got {len(ids)} ids and {len(images)} images")
        twice = sorted(id for id in set(ids) if id in self._rows or list(ids).count(id) > 1)
        if twice:
            raise ValueError(f"images given twice: {', '.join(twice[:5])}")
        for id, row in zip(ids, self.trunk(images).cpu(), strict=True):
            self._rows[id] = row

    def merge(self, other: FeatureSet) -> None:
        """Take over the rows of another process.

        Raises:
            ValueError: both have an image.
        """
        both = sorted(self._rows.keys() & other._rows.keys())
        if both:
            raise ValueError(f"images given twice: {', '.join(both[:5])}")
        self._rows |= other._rows

    def __len__(self) -> int:
        return len(self._rows)

    def matrix(self) -> Tensor:
        """All rows ``(n, d)``, float32, in the order of their ids."""
        return torch.stack([self._rows[id] for id in sorted(self._rows)])

    def list_hash(self) -> str:
        """SHA-256 over the sorted ids: which images these are."""
        return hashlib.sha256("\n".join(sorted(self._rows)).encode()).hexdigest()

    def feature_hash(self) -> str:
        """SHA-256 over the features: which statistics were compared with."""
        return hashlib.sha256(self.matrix().numpy().tobytes()).hexdigest()


def frechet_distance(generated: FeatureSet, real: FeatureSet) -> dict[str, Any]:
    """Frechet distance between two Gaussians fitted to the features; FID where the trunk is Inception's.

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` (Heusel et al. 2017, arXiv 1706.08500, eq. 6), by torch-fidelity.

    Returns:
        ``value``, the sizes ``n`` and ``reference_n``, and the hashes of both lists and of the reference's features.

    Raises:
        ValueError: fewer than two images in a set, which have no covariance.
    """
    _check_sizes(generated, real, 2)
    module = require("torch_fidelity.metric_fid", extra="metrics")
    # float64 throughout: float32 sums over thousands of images move the third digit.
    first, second = (module.fid_features_to_statistics(s.matrix().double()) for s in (generated, real))
    value = module.fid_statistics_to_metric(first, second, False)["frechet_inception_distance"]
    return {"value": value, **_lists(generated, real)}


def kernel_distance(generated: FeatureSet, real: FeatureSet, *, subset_size: int = 1000) -> dict[str, Any]:
    """Squared maximum mean discrepancy with a cubic kernel; KID where the trunk is Inception's.

    Unbiased at any number of images (Binkowski et al. 2018, arXiv 1801.01401), by torch-fidelity: mean and deviation
    over 100 random subsets, drawn with a fixed seed.

    Raises:
        ValueError: a set has fewer images than ``subset_size``.
    """
    _check_sizes(generated, real, subset_size)
    module = require("torch_fidelity.metric_kid", extra="metrics")
    result = module.kid_features_to_metric(
        generated.matrix(), real.matrix(), kid_subset_size=subset_size, verbose=False
    )
    mean, deviation = (result[f"kernel_inception_distance_{part}"] for part in ("mean", "std"))
    return {"value": mean, "deviation": deviation, "subset_size": subset_size, **_lists(generated, real)}


def _check_sizes(generated: FeatureSet, real: FeatureSet, least: int) -> None:
    for name, features in (("generated", generated), ("real", real)):
        if len(features) < least:
            raise ValueError(
                f"the {name} set has {len(features)} images, at least {least} are needed for this statistic"
            )


def _lists(generated: FeatureSet, real: FeatureSet) -> dict[str, Any]:
    return {
        "n": len(generated),
        "reference_n": len(real),
        "list": generated.list_hash(),
        "reference_list": real.list_hash(),
        "reference_features": real.feature_hash(),
    }
