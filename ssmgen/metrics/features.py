"""Distances between two sets of images in the feature space of a network: FID, KID and proxies for them."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmgen.extras import require
from ssmgen.metrics.backbones import weights_hash
from ssmgen.metrics.counted import Counted


class FeatureSet(Counted):
    """Features of a set of images by image id.

    One row per image is kept (8 KiB for Inception). Rows are used in the order of their ids, so results do not depend
    on batches or the number of processes (`ssmgen.metrics.gather` joins processes).

    Args:
        trunk: a module that maps uint8 images ``(batch, 3, h, w)`` to features ``(batch, d)``. Its ``protocol``,
            ``weights`` and ``distances`` name its results, see `InceptionTrunk`; its class does if it has none.
        of: the kind of images, for the protocol string: ``test`` for a reference, ``seed=0`` for generated images.
    """

    def __init__(self, trunk: nn.Module, of: str = "") -> None:
        self.trunk, self.of = trunk, of
        self.protocol: str = getattr(trunk, "protocol", type(trunk).__name__)
        self.weights: str = getattr(trunk, "weights", "") or weights_hash(trunk)
        self.counted: dict[str, Tensor] = {}

    def update(self, ids: Sequence[str], images: Tensor) -> None:
        """Add images ``(batch, 3, h, w)``, uint8, under their ids.

        Raises:
            ValueError: the numbers of ids and images differ, an id is repeated, or the trunk rejects the images.
        """
        self._check_ids(ids, len(images))
        self.counted |= dict(zip(ids, self.trunk(images).cpu(), strict=True))

    def __len__(self) -> int:
        return len(self.counted)

    def matrix(self) -> Tensor:
        """All rows ``(n, d)``, float32, in the order of their ids."""
        return torch.stack([self.counted[id] for id in sorted(self.counted)])

    def feature_hash(self) -> str:
        """SHA-256 over the features, which identifies the statistics."""
        return hashlib.sha256(self.matrix().numpy().tobytes()).hexdigest()


def frechet_distance(generated: FeatureSet, real: FeatureSet) -> dict[str, Any]:
    """Frechet distance between Gaussians fitted to the features; FID if the trunk is Inception's.

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` (Heusel et al. 2017, arXiv 1706.08500, eq. 6), by torch-fidelity.

    Returns:
        ``value``, the ``protocol`` to print beside it, the sizes ``n`` and ``reference_n``, and the hashes of the
        ``weights``, of both lists and of the reference's features.

    Raises:
        ValueError: a set has fewer than two images and so no covariance, or the trunks differ.
    """
    check_sets({"generated": generated, "real": real}, 2)
    module = require("torch_fidelity.metric_fid", extra="metrics")
    # float64 throughout: float32 sums over thousands of images change the third digit.
    first, second = (module.fid_features_to_statistics(s.matrix().double()) for s in (generated, real))
    value = module.fid_statistics_to_metric(first, second, False)["frechet_inception_distance"]
    return {"value": value, **record_of(_kinds(generated)[0], "", generated, real)}


def kernel_distance(generated: FeatureSet, real: FeatureSet, *, subset_size: int = 1000) -> dict[str, Any]:
    """Squared maximum mean discrepancy with a cubic kernel; KID if the trunk is Inception's.

    Unbiased for any number of images (Binkowski et al. 2018, arXiv 1801.01401), by torch-fidelity: mean and deviation
    over 100 random subsets with a fixed seed.

    Returns:
        As `frechet_distance`, with the ``deviation`` over subsets of ``subset_size``.

    Raises:
        ValueError: a set has fewer images than ``subset_size``, or the trunks differ.
    """
    check_sets({"generated": generated, "real": real}, subset_size)
    module = require("torch_fidelity.metric_kid", extra="metrics")
    rows = generated.matrix(), real.matrix()
    result = module.kid_features_to_metric(*rows, kid_subset_size=subset_size, verbose=False)
    mean, deviation = (result[f"kernel_inception_distance_{part}"] for part in ("mean", "std"))
    record = record_of(_kinds(generated)[1], f",subsets=100x{subset_size}", generated, real)
    return {"value": mean, "deviation": deviation, "subset_size": subset_size, **record}


def check_sets(sets: Mapping[str, FeatureSet], least: int) -> None:
    """Raise ValueError unless each of the sets, by its name, has ``least`` images and features of the same network."""
    for name, features in sets.items():
        if len(features) < least:
            raise ValueError(
                f"the {name} set has {len(features)} images, at least {least} are needed for this statistic"
            )
    if len({(features.protocol, features.weights) for features in sets.values()}) > 1:
        networks = " and ".join(f"{s.protocol} ({s.weights[:12]})" for s in sets.values())
        raise ValueError(f"the sets have features of different networks: {networks}")


def record_of(kind: str, detail: str, generated: FeatureSet, reference: FeatureSet) -> dict[str, Any]:
    """What is recorded beside a figure: its protocol, weights, counts and hashes."""
    suffix = f",{generated.of}" if generated.of else ""
    sizes = f"ref={reference.of}{len(reference)},n={len(generated)}"
    return {
        "protocol": f"{kind}[{generated.protocol}{detail},{sizes}{suffix}]",
        "weights": generated.weights,
        "n": len(generated),
        "reference_n": len(reference),
        "list": generated.list_hash(),
        "reference_list": reference.list_hash(),
        "reference_features": reference.feature_hash(),
    }


def _kinds(features: FeatureSet) -> tuple[str, str]:
    """What the Frechet and the kernel distance of these features are called."""
    return getattr(features.trunk, "distances", ("frechet", "kernel"))
