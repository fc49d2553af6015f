"""Distances between two sets of images by the features of a network: FID and KID, and the same over a proxy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmgen.extras import require
from ssmgen.metrics.backbones import weights_hash
from ssmgen.metrics.counted import check_new, join, list_hash


class FeatureSet:
    """Features of a set of images, each under its image's id.

    Images stream through; what stays is one row each (8 KiB of Inception's). The rows are used in the order of their
    ids, so that neither batches nor the number of processes change a result (`ssmgen.metrics.gather` joins processes).

    Args:
        trunk: images uint8 ``(batch, 3, h, w)`` to features ``(batch, d)``. Its ``protocol``, ``weights`` and
            ``distances`` say what its numbers go by, see `InceptionTrunk`; without them it goes by its class.
        of: what the images are, for the string beside a number: ``test`` of a reference, ``seed=0`` of what was made.
    """

    def __init__(self, trunk: nn.Module, of: str = "") -> None:
        self.trunk = trunk
        self.of = of
        self.weights: str = getattr(trunk, "weights", "") or weights_hash(trunk)
        self.counted: dict[str, Tensor] = {}

    def update(self, ids: Sequence[str], images: Tensor) -> None:
        """Add images ``(batch, 3, h, w)``, uint8, under their ids.

        Raises:
            ValueError: not as many ids as images, an id given twice, or the trunk's input is wrong.
        """
        if len(ids) != len(images):
            raise ValueError(f"one id an image: got {len(ids)} ids and {len(images)} images")
        check_new(list(ids), self.counted)
        self.counted |= dict(zip(ids, self.trunk(images).cpu(), strict=True))

    def merge(self, other: FeatureSet) -> None:
        """Take over the rows of another set.

        Raises:
            ValueError: both have an image.
        """
        join(self.counted, other.counted)

    def __len__(self) -> int:
        return len(self.counted)

    def matrix(self) -> Tensor:
        """All rows ``(n, d)``, float32, in the order of their ids."""
        return torch.stack([self.counted[id] for id in sorted(self.counted)])

    def list_hash(self) -> str:
        """SHA-256 over the sorted ids: which images these are."""
        return list_hash(self.counted)

    def feature_hash(self) -> str:
        """SHA-256 over the features: which statistics were compared with."""
        return hashlib.sha256(self.matrix().numpy().tobytes()).hexdigest()


def frechet_distance(generated: FeatureSet, real: FeatureSet) -> dict[str, Any]:
    """Frechet distance between two Gaussians fitted to the features; FID where the trunk is Inception's.

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` (Heusel et al. 2017, arXiv 1706.08500, eq. 6), by torch-fidelity.

    Returns:
        ``value``, the ``protocol`` to print beside it, the sizes ``n`` and ``reference_n``, and the hashes of the
        ``weights``, of both lists and of the reference's features.

    Raises:
        ValueError: fewer than two images in a set, which have no covariance, or sets of different trunks.
    """
    _check(generated, real, 2)
    module = require("torch_fidelity.metric_fid", extra="metrics")
    # float64 throughout: float32 sums over thousands of images move the third digit.
    first, second = (module.fid_features_to_statistics(s.matrix().double()) for s in (generated, real))
    value = module.fid_statistics_to_metric(first, second, False)["frechet_inception_distance"]
    return {"value": value, **_record(0, "", generated, real)}


def kernel_distance(generated: FeatureSet, real: FeatureSet, *, subset_size: int = 1000) -> dict[str, Any]:
    """Squared maximum mean discrepancy with a cubic kernel; KID where the trunk is Inception's.

    Unbiased at any number of images (Binkowski et al. 2018, arXiv 1801.01401), by torch-fidelity: mean and deviation
    over 100 random subsets, drawn with a fixed seed.

    Returns:
        As `frechet_distance`, with the ``deviation`` over subsets of ``subset_size``.

    Raises:
        ValueError: a set has fewer images than ``subset_size``, or sets of different trunks.
    """
    _check(generated, real, subset_size)
    module = require("torch_fidelity.metric_kid", extra="metrics")
    result = module.kid_features_to_metric(
        generated.matrix(), real.matrix(), kid_subset_size=subset_size, verbose=False
    )
    mean, deviation = (result[f"kernel_inception_distance_{part}"] for part in ("mean", "std"))
    record = _record(1, f",subsets=100x{subset_size}", generated, real)
    return {"value": mean, "deviation": deviation, "subset_size": subset_size, **record}


def _check(generated: FeatureSet, real: FeatureSet, least: int) -> None:
    for name, features in (("generated", generated), ("real", real)):
        if len(features) < least:
            raise ValueError(
                f"the {name} set has {len(features)} images, at least {least} are needed for this statistic"
            )
    if (_protocol(generated), generated.weights) != (_protocol(real), real.weights):
        raise ValueError(
            "the two sets have features of different networks: "
            f"{_protocol(generated)} ({generated.weights[:12]}) and {_protocol(real)} ({real.weights[:12]})"
        )


def _protocol(features: FeatureSet) -> str:
    return getattr(features.trunk, "protocol", type(features.trunk).__name__)


def _record(which: int, detail: str, generated: FeatureSet, real: FeatureSet) -> dict[str, Any]:
    kind = getattr(generated.trunk, "distances", ("frechet", "kernel"))[which]
    made = f",{generated.of}" if generated.of else ""
    return {
        "protocol": f"{kind}[{_protocol(generated)}{detail},ref={real.of}{len(real)},n={len(generated)}{made}]",
        "weights": generated.weights,
        "n": len(generated),
        "reference_n": len(real),
        "list": generated.list_hash(),
        "reference_list": real.list_hash(),
        "reference_features": real.feature_hash(),
    }
