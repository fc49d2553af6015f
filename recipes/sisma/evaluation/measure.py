"""The figures of an evaluation, from existing images: agreement with the masks, distances, diversity."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.sisma.evaluation.consistency import consistency, shows_faces
from recipes.sisma.evaluation.distances import (
    FeatureDistance,
    image_count,
    load_distances,
    load_lpips,
    lpips_diversity,
    measure_distance,
)
from recipes.sisma.evaluation.images import HeldOut, Images, by_shape, mapped
from recipes.sisma.evaluation.nearest import judge, measure_nearest, nearest_count
from recipes.sisma.evaluation.settings import Settings
from recipes.sisma.parser import SHIPPED, UNetParser, load_parser
from recipes.sisma.presets import Size, sides_of
from ssmgen.data import CELEBAMASK19, LabelSet
from ssmgen.metrics import MaskAgreement, pairwise_rms
from ssmgen.metrics.backbones import sha256_of
from ssmgen.training import progress_bar

_BATCH = 16
_COMPARED = 128  # images of different masks in the diversity between masks
_PARSING = {"generated": "parsing", "real": "parsing real images", "autoencoder": "parsing after the autoencoder"}


class Parser(Protocol):
    """Anything that labels images: ``(batch, 3, h, w)`` in [-1, 1] to integers ``(batch, h, w)``."""

    def parse(self, images: Tensor) -> Tensor:
        """The labels."""


@dataclass(frozen=True)
class NamedParser:
    """A parser and what is recorded beside its figures.

    Attributes:
        name: in the protocol of a figure.
        parser: any `Parser`; its owner moves it to a device.
        num_classes: number of classes it predicts.
        weights: SHA-256 of its weights.
        card: its settings and held-out score, for ``result.json``.
        multiple: the sides of images must be a multiple of this.
        image_size: side of the square images it was trained on. Larger square ones are reduced to it, as it fails on
            parts of twice the size; 0 takes all as they are.
    """

    name: str
    parser: Parser
    num_classes: int
    weights: str = ""
    card: dict[str, Any] | None = None
    multiple: int = 1
    image_size: int = 0

    def parse(self, images: Tensor) -> Tensor:
        """Integer labels ``(batch, h, w)`` of images ``(batch, 3, h, w)`` in [-1, 1]."""
        height, width = images.shape[-2:]
        if not self.reduces(height, width):
            return self.parser.parse(images)
        small = F.interpolate(images, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        labels = self.parser.parse(small).unsqueeze(1)
        return F.interpolate(labels.float(), (height, width), mode="nearest").squeeze(1).to(labels.dtype)

    def reduces(self, height: int, width: int) -> bool:
        """Whether images of this size are reduced."""
        return height == width > self.image_size > 0

    def check(self, labels: LabelSet, size: Size) -> None:
        """Reject masks of another number of classes, and images of a ``size`` it cannot take, by a `ValueError`."""
        if self.num_classes != len(labels):
            raise ValueError(f"{self.name}: predicts {self.num_classes} classes, the masks have {len(labels)}")
        if any(side % self.multiple for side in sides_of(size)):
            needed = f"images with sides that are multiples of {self.multiple}"
            given = " x ".join(map(str, dict.fromkeys(sides_of(size))))
            raise ValueError(f"{self.name}: needs {needed}, got {given} pixels; or parser=none")


def load_named_parser(name: str, labels: LabelSet = CELEBAMASK19) -> NamedParser | None:
    """The parser that ``parser=`` names: ``drawn`` (the shipped one), ``none``, or a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not the file of a parser, or a parser of another number of classes.
    """
    if name == "none":
        return None
    file = SHIPPED if name == "drawn" else Path(name)
    parser, card = load_parser(file)
    if card["num_classes"] != len(labels):
        raise ValueError(f"{file}: predicts {card['num_classes']} classes, the masks have {len(labels)}")
    side = card.get("image_size")
    trained_on = side if isinstance(side, int) else 0
    return NamedParser(file.name, parser, card["num_classes"], sha256_of(file), card, UNetParser.multiple, trained_on)


@dataclass(frozen=True)
class Metrics:
    """The networks of the metrics; all are loaded and checked before any image is generated."""

    parser: NamedParser | None
    distances: list[FeatureDistance]
    lpips: Any


def load_metrics(parser: NamedParser | None, settings: Settings, labels: LabelSet, count: int, size: Any) -> Metrics:
    """Load and check the networks of the requested metrics.

    Raises:
        FileNotFoundError: missing weights.
        ValueError: fewer than two masks, a parser of other classes or sizes, or what `load_distances` rejects.
    """
    if count < 2:
        raise ValueError(f"evaluation needs at least 2 unseen masks, got {count}")
    if parser is not None:
        parser.check(labels, size)
    return Metrics(parser, load_distances(settings, count), load_lpips(settings))


def measure_images(
    images: Images, metrics: Metrics, train: Any, round_trip: Callable[[Tensor], Tensor] | None = None
) -> tuple[dict[str, Any], Tensor | list[Tensor] | None]:
    """All figures, and the parser's labels of the generated images.

    Args:
        images: the images to measure.
        metrics: the networks of the metrics.
        train: the training pairs, read by a protocol that compares with them.
        round_trip: passes uint8 images through the autoencoder, if the model has one.
    """
    held_out, faces = images.held_out, shows_faces(images.held_out.labels)
    result: dict[str, Any] = {"masks": len(held_out.ids)}
    sets, parsed = {"generated": images.generated, "real": held_out.images}, {}
    if round_trip is not None and (metrics.parser is not None or faces):
        sets["autoencoder"] = mapped(round_trip, held_out.images)
    if metrics.parser is not None:
        parsed = {name: _parse(metrics.parser, some, _PARSING[name]) for name, some in sets.items()}
        result |= _agreement(metrics.parser, held_out, parsed)
    if faces:
        result["consistency"] = consistency(sets, held_out.masks, held_out.labels, parsed)
    if metrics.distances:
        result |= _distances(images, metrics.distances, train)
    if metrics.lpips is not None:
        with progress_bar(len(images.sample_files), "mask", what="LPIPS") as bar:
            result["lpips"] = lpips_diversity(metrics.lpips, images, bar.update)
    result["diversity"] = _diversity(images)
    return result, parsed.get("generated")


def _parse(parser: NamedParser, images: Tensor | list[Tensor], what: str) -> Tensor | list[Tensor]:
    """Labels ``(n, h, w)`` of uint8 images ``(n, 3, h, w)``, or of a list of images."""

    def parsed(group: Tensor) -> Tensor:
        found = []
        for batch in group.split(_BATCH):
            found.append(parser.parse(batch.float() / 127.5 - 1).cpu())
            bar.update(len(batch))
        return torch.cat(found)

    with progress_bar(len(images), "img", what=what) as bar:
        return mapped(parsed, images)


def _agreement(parser: NamedParser, held_out: HeldOut, parsed: Mapping[str, Any]) -> dict[str, Any]:
    """Agreement, floor and ceilings, from the parser's labels of each set of images."""

    reduced = any(parser.reduces(*mask.shape) for mask in held_out.masks)
    name = f"{parser.name},at={parser.image_size}" if reduced else parser.name

    def agree(predicted: Any, true: Any, shift: int = 0) -> dict[str, Any]:
        """Labels against masks, each by ``shift`` places further among those of its shape."""
        agreement = MaskAgreement(held_out.labels.classes, name, parser.weights)
        for places, group in by_shape(true):
            if shift and len(places) == 1 < len(true):
                continue  # there is no other mask of this shape
            of_shape = torch.stack([predicted[place] for place in places])
            agreement.update(of_shape, group.roll(shift, dims=0), [held_out.ids[place] for place in places])
        return agreement.result()

    masks = held_out.masks
    result = {
        "mask_agreement": agree(parsed["generated"], masks),
        "ceiling": agree(parsed["real"], masks),
        "floor": agree(parsed["generated"], masks, shift=1),
        "parser": parser.card or {"name": parser.name},
    }
    if "autoencoder" in parsed:
        result["autoencoder_ceiling"] = agree(parsed["autoencoder"], masks)
    low, high = result["floor"]["miou"], result["ceiling"]["miou"]
    # A parser that is no better than chance on real images says nothing about generated ones.
    result["floor_to_ceiling"] = (result["mask_agreement"]["miou"] - low) / (high - low) if high > low else None
    return result


def _distances(images: Images, distances: list[FeatureDistance], train: Any) -> dict[str, Any]:
    """``distances`` and, if there are training images to compare with, ``nearest``."""
    result: dict[str, Any] = {"distances": {}}
    held_out, training, count = images.held_out, images.training, len(images.held_out.ids)
    total = sum(image_count(distance, count, train) for distance in distances)
    with progress_bar(total + nearest_count(images), "img", what="features") as bar:
        for distance in distances:
            result["distances"][distance.name] = measure_distance(
                distance, held_out, images.generated, train, images.source, bar.update
            )
        if training is not None:
            result["nearest"] = measure_nearest(judge(distances), images, training, bar.update)
    return result


def _diversity(images: Images) -> dict[str, float]:
    groups = [group for _, group in by_shape(images.generated[:_COMPARED]) if len(group) > 1]
    pairs = [len(group) * (len(group) - 1) // 2 for group in groups]
    between = [pairwise_rms(group.float() / 127.5 - 1) for group in groups]
    found = {"other_masks": sum(count / sum(pairs) * one for count, one in zip(pairs, between, strict=True))}
    if images.sample_files:
        same = [pairwise_rms(group.float() / 127.5 - 1) for group in images.samples()]
        found = {"same_mask": sum(same) / len(same), **found}
    return found
