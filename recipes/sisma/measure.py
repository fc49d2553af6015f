"""The numbers of an evaluation, from images that are there: agreement with the masks, distances, diversity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from recipes.sisma.distances import (
    DistanceSettings,
    Measure,
    distances,
    load_lpips,
    load_measures,
    lpips_diversity,
    work,
)
from recipes.sisma.parser import SHIPPED, FaceParser, load_parser
from ssmgen.data import CELEBAMASK19, LabelSet
from ssmgen.metrics import MaskAgreement, pairwise_rms
from ssmgen.metrics.backbones import sha256_of
from ssmgen.training import progress_bar

_BATCH = 16
_COMPARED = 128  # images of different masks that the diversity is set against


class Parser(Protocol):
    """Whatever labels images: ``(batch, 3, h, w)`` in [-1, 1] to integers ``(batch, h, w)``."""

    def parse(self, images: Tensor) -> Tensor:
        """The labels."""


@dataclass(frozen=True)
class Judge:
    """A parser with its name and what is known about it.

    Attributes:
        name: for the string beside a number.
        parser: any `Parser`; moved to the images' device by its owner.
        num_classes: how many classes it tells apart.
        weights: SHA-256 of its weights.
        card: its own settings and held-out score, for ``result.json``.
        multiple: what the images' sides must be a multiple of.
    """

    name: str
    parser: Parser
    num_classes: int
    weights: str = ""
    card: dict[str, Any] | None = None
    multiple: int = 1

    def check(self, labels: LabelSet, side: int) -> None:
        """Whether it can judge images of these masks.

        Raises:
            ValueError: other classes, or a size it cannot take.
        """
        if self.num_classes != len(labels):
            raise ValueError(f"{self.name}: tells {self.num_classes} classes apart, the masks have {len(labels)}")
        if side % self.multiple:
            raise ValueError(
                f"{self.name}: needs images with sides that are multiples of {self.multiple}, got {side} pixels; "
                "or parser=none"
            )


def load_judge(name: str, labels: LabelSet = CELEBAMASK19) -> Judge | None:
    """The parser a ``parser=`` names: ``drawn`` is the shipped one, ``none`` is none, else a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a parser's file, or one of other classes than the masks have.
    """
    if name == "none":
        return None
    file = SHIPPED if name == "drawn" else Path(name)
    parser, card = load_parser(file)
    if card["num_classes"] != len(labels):
        raise ValueError(f"{file}: tells {card['num_classes']} classes apart, the masks have {len(labels)}")
    return Judge(file.name, parser, card["num_classes"], sha256_of(file), card, FaceParser.multiple)


@dataclass(frozen=True)
class Gauges:
    """What is measured with; all of it is found and checked before anything is sampled."""

    judge: Judge | None
    measures: list[Measure]
    lpips: Any


def load_gauges(judge: Judge | None, settings: DistanceSettings, labels: LabelSet, count: int, side: int) -> Gauges:
    """Load and check what is asked for.

    Raises:
        FileNotFoundError: weights of a distance that are not there.
        ValueError: fewer than two masks, a parser of other classes or sizes, or what `load_measures` refuses.
    """
    if count < 2:
        raise ValueError(f"evaluation needs at least 2 unseen masks, got {count}")
    if judge is not None:
        judge.check(labels, side)
    return Gauges(judge, load_measures(settings, count), load_lpips(settings))


@dataclass(frozen=True)
class Images:
    """What is measured.

    Attributes:
        ids: of the masks.
        true: the masks ``(n, h, w)``.
        real: the real image of each, uint8 ``(n, 3, h, w)``.
        generated: one made from each.
        several: more of the first masks, ``(samples, 3, h, w)`` each, or none.
        names: of those masks.
        labels: the classes.
        of: what the generated images are, for protocols, such as ``seed=0``.
    """

    ids: list[str]
    true: Tensor
    real: Tensor
    generated: Tensor
    several: Sequence[Tensor]
    names: list[str]
    labels: LabelSet
    of: str


def measure_images(
    images: Images, gauges: Gauges, train: Any, round_trip: Callable[[Tensor], Tensor] | None = None
) -> tuple[dict[str, Any], Tensor | None]:
    """All numbers, and the labels the parser gave the generated images.

    Args:
        images: what is measured.
        gauges: what it is measured with.
        train: the training pairs, read by a protocol that compares with them.
        round_trip: real images uint8 through the autoencoder, where one was between model and images.
    """
    result: dict[str, Any] = {"masks": len(images.ids)}
    parsed = None
    if gauges.judge is not None:
        parsed = parse(gauges.judge, images.generated, "parsing")
        result |= _agreement(gauges.judge, images, parsed, round_trip)
    if gauges.measures:
        with progress_bar(sum(work(m, len(images.ids), train) for m in gauges.measures), "img", what="features") as bar:
            result["distances"] = {
                m.name: distances(m, images.ids, images.generated, images.real, train, images.of, bar.update)
                for m in gauges.measures
            }
    if gauges.lpips is not None:
        with progress_bar(len(images.several), "mask", what="LPIPS") as bar:
            result["lpips"] = lpips_diversity(gauges.lpips, images.names, images.several, bar.update)
    result["diversity"] = _diversity(images)
    return result, parsed


def parse(judge: Judge, images: Tensor, what: str) -> Tensor:
    """Labels ``(n, h, w)`` of images uint8 ``(n, 3, h, w)``."""
    parsed = []
    with progress_bar(len(images), "img", what=what) as bar:
        for batch in images.split(_BATCH):
            parsed.append(judge.parser.parse(batch.float() / 127.5 - 1).cpu())
            bar.update(len(batch))
    return torch.cat(parsed)


def _agreement(
    judge: Judge, images: Images, parsed: Tensor, round_trip: Callable[[Tensor], Tensor] | None
) -> dict[str, Any]:
    def agree(predicted: Tensor, true: Tensor) -> dict[str, Any]:
        agreement = MaskAgreement(images.labels.classes, judge.name, judge.weights)
        agreement.update(predicted, true, images.ids)
        return agreement.result()

    result = {
        "mask_agreement": agree(parsed, images.true),
        "ceiling": agree(parse(judge, images.real, "parsing real images"), images.true),
        "floor": agree(parsed, images.true.roll(1, dims=0)),
        "parser": judge.card or {"name": judge.name},
    }
    if round_trip is not None:
        decoded = round_trip(images.real)
        result["autoencoder_ceiling"] = agree(parse(judge, decoded, "parsing after the autoencoder"), images.true)
    low, high = result["floor"]["miou"], result["ceiling"]["miou"]
    # A parser that finds no more in real images than by chance has nothing to say.
    result["floor_to_ceiling"] = (result["mask_agreement"]["miou"] - low) / (high - low) if high > low else None
    return result


def _diversity(images: Images) -> dict[str, float]:
    found = {"other_masks": pairwise_rms(images.generated[:_COMPARED].float() / 127.5 - 1)}
    if images.several:
        same = [pairwise_rms(group.float() / 127.5 - 1) for group in images.several]
        found = {"same_mask": sum(same) / len(same), **found}
    return found
