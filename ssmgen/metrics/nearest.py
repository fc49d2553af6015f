"""Whether generated images are copies of training images: the nearest training image of each, and its distance."""

from typing import Any

import torch
import torch.nn.functional as F

from ssmgen.metrics.features import FeatureSet, check_sets, record_of

_CHUNK = 256  # rows compared with all training images at a time: 56 MiB for 56,000 of those
_PERCENTILE = 0.05


def nearest_images(images: FeatureSet, training: FeatureSet) -> dict[str, tuple[str, float]]:
    """The nearest training image of each image, and its cosine distance.

    The distance is one minus the inner product of the normalised features, with which Somepalli et al. 2022 (Diffusion
    Art or Digital Forgery?, arXiv 2212.03860) look for replicated training images. Unlike a Euclidean distance it does
    not depend on the length of the features, which grows with contrast, so that a paler copy stays a copy.

    Returns:
        (id of the training image, distance in [0, 2]) by the ids of ``images``, in their order; any of those that are
        equally near.

    Raises:
        ValueError: a set is empty, or the trunks differ.
    """
    check_sets({"given": images, "training": training}, 1)
    given, rows = images.matrix(), training.matrix()
    lengths = rows.norm(dim=1).clamp_min(1e-12)
    places = torch.cat([(chunk @ rows.T).div_(lengths).argmax(dim=1) for chunk in given.split(_CHUNK)])
    # Half the squared difference of unit vectors is the same distance, and exactly 0 for a copy.
    units, nearest = (F.normalize(some.double(), dim=1) for some in (given, rows[places]))
    distances = (units - nearest).square().sum(dim=1) / 2
    names = sorted(training.counted)
    found = zip(sorted(images.counted), places.tolist(), distances.tolist(), strict=True)
    return {id: (names[place], distance) for id, place, distance in found}


def memorisation(generated: FeatureSet, real: FeatureSet, training: FeatureSet) -> dict[str, Any]:
    """Whether generated images lie nearer to training images than real images do that training has not seen.

    Distances are those of `nearest_images`. How near a face is to the nearest of other people's depends on the
    features and on the number of training images, so that a distance alone says nothing; real images of the same
    masks are the yardstick.

    Args:
        generated: the images to judge.
        real: real images that training has not seen.
        training: the images of the training, mirrored ones included where it saw those.

    Returns:
        ``median`` and ``real_median``, of the distances of the generated and of the real images; their ``ratio``,
        about 1 for a model that generalises and near 0 for one that copies, None where ``real_median`` is 0;
        ``threshold``, the 5th percentile of the real distances, and ``share_nearer``, the share of generated images
        below it, about 0.05 if nothing is copied; ``images``, the nearest training image and its distance by the id of
        the generated image, the smallest distance first; ``real_n``, ``real_list`` and what `frechet_distance` records.

    Raises:
        ValueError: a set is empty, or the trunks differ.
    """
    check_sets({"generated": generated, "real": real, "training": training}, 1)
    nearest = nearest_images(generated, training)
    ours, theirs = (
        torch.tensor([distance for _, distance in some.values()], dtype=torch.float64)
        for some in (nearest, nearest_images(real, training))
    )
    # The middle of an even number is between two, which torch.median is not.
    median, real_median = (float(some.quantile(0.5)) for some in (ours, theirs))
    ranked = sorted(nearest.items(), key=lambda item: item[1][1])
    threshold = float(theirs.quantile(_PERCENTILE))
    return {
        "median": median,
        "real_median": real_median,
        "ratio": median / real_median if real_median else None,
        "threshold": threshold,
        "share_nearer": float((ours < threshold).double().mean()),
        "images": {id: {"training": name, "distance": distance} for id, (name, distance) in ranked},
        "real_n": len(real),
        "real_list": real.list_hash(),
        **record_of("nearest", f",cosine,real={real.of}{len(real)}", generated, training),
    }
