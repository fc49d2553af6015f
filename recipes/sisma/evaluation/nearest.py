"""Copies of training images: the nearest training image of each generated one, and a picture of the nearest pairs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.sisma.evaluation.distances import FeatureDistance, read_features
from recipes.sisma.evaluation.images import Images, TrainingImages, pair_ids
from recipes.sisma.pairs import pairs_to_encode, training_pairs
from recipes.sisma.presets import Config
from recipes.sisma.sheets import save_sheet
from ssmgen.metrics import FeatureSet, SqueezeNetTrunk, memorisation

_SHOWN, _COARSE = 8, 4


def training_images(config: Config, mirrored: bool) -> TrainingImages:
    """The images of a training with these settings: all crops of all pairs."""
    pairs, ids = pairs_to_encode(config), pair_ids(training_pairs(config))
    crops = range(len(pairs) // len(ids))
    return TrainingImages(pairs, [f"{id} crop {crop}" if crop else id for id in ids for crop in crops], mirrored)


def judge(distances: Sequence[FeatureDistance]) -> FeatureDistance:
    """The distance in whose features the nearest images are sought: the proxy if it is among them, or the first."""
    return next((one for one in distances if one.name == SqueezeNetTrunk.name), distances[0])


def measure_nearest(
    distance: FeatureDistance, images: Images, training: TrainingImages, step: Callable[[int], Any]
) -> dict[str, Any]:
    """`ssmgen.metrics.memorisation` of the generated images, with the real ones of the same masks as the yardstick.

    All images are made coarse first, see `coarse`.

    Args:
        distance: names the network.
        images: the generated and the real images.
        training: the images that may have been copied.
        step: called with the number of images of each finished batch, of training images without the mirrored ones.
    """

    def features(of: str, ids: Sequence[str], image_at: Callable[[int], Tensor], mirrored: bool = False) -> FeatureSet:
        return read_features(distance.trunk, of, ids, lambda place: coarse(image_at(place)), step, mirrored)

    ids = images.held_out.ids
    generated = features(f"{images.source},coarse{_COARSE}", ids, images.generated.__getitem__)
    real = features("test", ids, images.held_out.images.__getitem__)
    of = "train+mirrored" if training.mirrored else "train"
    seen = features(of, training.ids, lambda place: training.pairs[place][0], training.mirrored)
    return memorisation(generated, real, seen)


def nearest_count(images: Images) -> int:
    """How many images `measure_nearest` reads; 0 where no training images are given."""
    return 0 if images.training is None else 2 * len(images.held_out.ids) + len(images.training.ids)


def coarse(image: Tensor) -> Tensor:
    """An image ``(3, h, w)``, uint8, without detail below four pixels, in its own size.

    Pooled features depend so much on fine texture that a copy with a little noise or blur, which generated images have,
    is as far from its original as another face is; without this detail it is near it.
    """
    height, width = image.shape[-2:]
    small = F.interpolate(image[None].float(), (max(1, height // _COARSE), max(1, width // _COARSE)), mode="area")
    return F.interpolate(small, (height, width), mode="bilinear")[0].round().to(torch.uint8)


def save_nearest(file: Path, found: dict[str, Any], images: Images, training: TrainingImages) -> None:
    """A picture of the generated images that are nearest to a training image, each beside that one."""
    ids = list(images.held_out.ids)
    nearest = list(found["images"].items())[:_SHOWN]
    rows = [[images.generated[ids.index(id)], training.find(one["training"])] for id, one in nearest]
    save_sheet(file, rows, ["generated", "training"])


def sentence(found: dict[str, Any]) -> str:
    """The figures of `measure_nearest` in one line."""
    ratio = "" if found["ratio"] is None else f" (ratio {found['ratio']:.2f})"
    medians = f"median distance {found['median']:.4f}, of real unseen images {found['real_median']:.4f}{ratio}"
    share = f"{100 * found['share_nearer']:.0f} % nearer than 95 % of the real ones, 5 expected"
    return f"nearest training images: {medians}; {share}"
