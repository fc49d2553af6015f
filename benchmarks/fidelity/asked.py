"""Do images have the style and the words they were asked for? ``python -m benchmarks.fidelity.asked run=RUN``.

    python -m recipes.sisma.train style=true words=true run=runs/asked
    python -m benchmarks.fidelity.asked run=runs/asked plain=runs/quick   # plain: the same without, for the mask alone

Unseen drawn masks are sampled with the style of unseen drawn faces, and with words for the colours of these faces. The
ceiling is the mask drawn in that face's appearance, through the autoencoder: what a perfect model would give. The floor
is the same images against the style and the words of another face. Agreement with the mask is measured as by
recipes.sisma.evaluate, with the conditions, without them, and of a run that never had them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.fidelity.attributes import (
    OPEN,
    AttributeClassifier,
    trained_classifier,
    true_attributes,
    word_agreement,
)
from benchmarks.fidelity.regions import colour_agreement, region_colours
from benchmarks.timing import RESULTS
from recipes.sisma.arguments import UsageError, flat, from_command_line, run_command
from recipes.sisma.evaluation.measure import load_named_parser
from recipes.sisma.pairs import HELD_OUT
from recipes.sisma.provenance import provenance
from recipes.sisma.runs import Trained, load_run
from recipes.sisma.sheets import save_sheet
from recipes.sisma.told import style_of, words_of_sentences
from ssmgen import MaskToImage, initial_noise
from ssmgen.data import CELEBAMASK19
from ssmgen.data.drawn_faces import draw_face
from ssmgen.data.drawn_faces.words import sentence
from ssmgen.metrics import MaskAgreement
from ssmgen.pipeline.mask_to_image import to_output
from ssmgen.pipeline.values import started
from ssmgen.training import progress_bar

_BATCH = 16
_SHEET = 6
_GUIDANCE = ("guidance_scale", "guidance_start")
_OF_TRAINING = ("preset", "model", "style", "words", "model_args", "drawn_count", "seed")
# A target with one of these gets a style picture with it, where there is one: by chance few pairs would share them.
_RARE = ("hat", "cloth", "eye_g", "ear_r", "l_ear", "r_ear")
_WORDS = {
    "grey hair": {"hair": "grey"},
    "blond hair": {"hair": "blond"},
    "black hair": {"hair": "black"},
    "dark skin": {"skin": "dark"},
    "pale skin": {"skin": "pale"},
    "red background": {"background": "red"},
    "blue background": {"background": "blue"},
}


@dataclass
class Settings:
    """Keys of the command line.

    Attributes:
        run: a run trained with ``style=true``, ``words=true`` or both.
        plain: a run without them, whose agreement with the mask is compared; empty leaves it out.
        masks: unseen masks.
        seed: of the noise.
        guidance_scale, guidance_start: by condition, such as ``guidance_scale.style=1.5``; the run's own where none is
            given.
        classifier: file of the classifier of words, which is trained first if it is not there.
        name: of the result; that of the run's folder if empty.
    """

    run: str = "runs/asked"
    plain: str = ""
    masks: int = 128
    seed: int = 0
    guidance_scale: dict[str, Any] = field(default_factory=dict)
    guidance_start: dict[str, Any] = field(default_factory=dict)
    classifier: str = "runs/attributes.safetensors"
    name: str = ""


@dataclass(frozen=True)
class Faces:
    """Drawn faces: images uint8 ``(n, 3, h, w)``, masks ``(n, h, w)``, and the (index, appearance) of each."""

    images: Tensor
    masks: Tensor
    drawn: list[tuple[int, int]]

    @classmethod
    def draw(cls, drawn: list[tuple[int, int]], size: int) -> Faces:
        """Draw faces given as (index, appearance)."""
        images, masks = zip(*(draw_face(i, size, appearance=a) for i, a in drawn), strict=True)
        return cls(torch.stack(images), torch.stack(masks), drawn)

    def colours(self, images: Tensor | None = None) -> Tensor:
        """`region_colours` of these images, or of others in their places."""
        return region_colours(self.images if images is None else images, self.masks, len(CELEBAMASK19))


class Asked:
    """A run, unseen masks, and what is asked of each.

    Args:
        run: the run's folder.
        settings: see `Settings`.
    """

    def __init__(self, run: Path, settings: Settings) -> None:
        self.pipe, self.trained = load_run(run)
        config = self.trained.config
        if config.data != "drawn":
            raise UsageError(f"{run}: was trained on {config.data}; what is asked for is known of drawn faces alone")
        if not (config.style or config.words):
            raise UsageError(f"{run}: was trained with neither style=true nor words=true")
        self.seed, count, size = settings.seed, settings.masks, config.image_size
        self.sampling = self.pipe.recipe.sampling  # of a run that is told something: scale and start by condition
        scale, start = (dict(getattr(self.sampling, name)) | getattr(settings, name) for name in _GUIDANCE)
        self.sampling = self.sampling.replaced(guidance_scale=scale, guidance_start=start)
        first = HELD_OUT
        targets = [(first + i, first + i) for i in range(count)]
        styles = [(first + count + i, first + count + i) for i in range(count)]
        self.targets, self.styles = Faces.draw(targets, size), Faces.draw(styles, size)
        order = matched(self.targets.masks, self.styles.masks)
        self.styles = Faces(self.styles.images[order], self.styles.masks[order], [styles[i] for i in order])
        wanted = [(target, style) for (target, _), (style, _) in zip(targets, self.styles.drawn, strict=True)]
        self.wanted = Faces.draw(wanted, size)
        self.attributes = true_attributes(wanted)

    def sampled(self, what: str, **values: Any) -> Tensor:
        """An image of each mask, uint8 ``(n, 3, h, w)``; of the values each batch gets its own part."""
        noise = initial_noise(range(self.seed, self.seed + len(self.targets.masks)), self.pipe.latent_size)
        return self.sample(noise, {"mask": self.targets.masks.long(), **values}, what)

    def sample(self, noise: Tensor, values: Mapping[str, Any], what: str) -> Tensor:
        """Images, uint8 ``(n, 3, h, w)``, of noise and values of the same number of items, under the run's guidance."""
        return sample_images(self.pipe, noise, values, self.sampling, what)

    def style(self) -> dict[str, Tensor]:
        """The value of the condition ``style``."""
        masks = None if self.trained.config.style == "whole" else self.styles.masks
        return style_of(self.pipe.autoencoder, self.styles.images, masks)

    def words(self) -> Any:
        """The value of the condition ``words``: all attributes of the faces that are asked for."""
        count = len(self.targets.masks)
        each = [{name: int(ids[i]) for name, ids in self.attributes.items()} for i in range(count)]
        return words_of_sentences([sentence(one) for one in each])

    def round_trip(self, images: Tensor) -> Tensor:
        """uint8 images through the autoencoder."""
        with torch.no_grad():
            batches = (images.float() / 127.5 - 1).to(self.pipe.device).split(_BATCH)
            return torch.cat([to_output(self.pipe.decode(self.pipe.autoencoder.encode(b)), "uint8") for b in batches])


def sample_images(pipe: MaskToImage, noise: Tensor, values: Mapping[str, Any], sampling: Any, what: str) -> Tensor:
    """Images, uint8 ``(n, 3, h, w)``, of noise and values of the same number of items."""
    parts = []
    noise, sampling = started(noise, values["mask"], sampling, pipe.recipe.labels)
    with progress_bar(len(noise), "img", what=what) as bar:
        for start in range(0, len(noise), _BATCH):
            own = {name: _part(value, slice(start, start + _BATCH)) for name, value in values.items()}
            latents = pipe.sampler(noise[start : start + _BATCH], sampling=sampling, objective=pipe.objective, **own)
            with torch.no_grad():
                parts.append(to_output(pipe.decode(latents), "uint8"))
            bar.update(len(parts[-1]))
    return torch.cat(parts)


def _part(value: Any, part: slice) -> Any:
    return {name: each[part] for name, each in value.items()} if isinstance(value, Mapping) else value[part]


def matched(targets: Tensor, styles: Tensor) -> list[int]:
    """For each target mask the place of a style mask, each used once, that shares its rare classes where one does."""
    rare = [CELEBAMASK19.classes.index(name) for name in _RARE]

    def present(masks: Tensor) -> Tensor:
        return torch.stack([(masks == k).flatten(1).float().mean(1) > 1 / 256 for k in rare], dim=1).float()

    of_target, of_style = present(targets), present(styles)
    weights = 1 / of_style.mean(0).clamp(min=1e-3)
    chosen, free = [-1] * len(targets), torch.ones(len(styles), dtype=torch.bool)
    for i in (of_target * weights).sum(1).argsort(descending=True, stable=True).tolist():
        shared = (of_style * of_target[i] * weights).sum(1).masked_fill(~free, -1)
        chosen[i] = int(shared.argmax())
        free[chosen[i]] = False
    return chosen


def way(figures: Mapping[str, dict[str, Any]]) -> float | None:
    """How far the agreement found is from floor to ceiling; None where the ceiling is no higher."""
    low, high = figures["floor"]["agreement"], figures["ceiling"]["agreement"]
    return (figures["found"]["agreement"] - low) / (high - low) if high > low else None


def measure_style(asked: Asked, images: Tensor, without: Tensor) -> dict[str, Any]:
    """Agreement of the colours of regions; ``without``: images of the same masks and noise without a style."""
    pool = asked.styles.colours()
    target = asked.wanted

    def agree(found: Tensor, wanted: Tensor) -> dict[str, Any]:
        return colour_agreement(found, wanted, pool, CELEBAMASK19.classes)

    figures = {
        "found": agree(target.colours(images), pool),
        "floor": agree(target.colours(images), pool.roll(1, dims=0)),
        "ceiling": agree(target.colours(asked.round_trip(target.images)), pool),
        "without": agree(target.colours(without), pool),
    }
    return figures | {"floor_to_ceiling": way(figures)}


def measure_words(asked: Asked, images: Tensor, without: Tensor, classifier: AttributeClassifier) -> dict[str, Any]:
    """Agreement of the attributes; ``without``: images of the same masks and noise without words."""
    found = classifier.classify(images)
    figures = {
        "found": word_agreement(found, asked.attributes),
        "floor": word_agreement(found, {name: ids.roll(1) for name, ids in asked.attributes.items()}),
        "ceiling": word_agreement(classifier.classify(asked.round_trip(asked.wanted.images)), asked.attributes),
        "without": word_agreement(classifier.classify(without), asked.attributes),
    }
    return figures | {"counted": list(OPEN), "floor_to_ceiling": way(figures)}


def mask_agreement(parser: Any, images: Tensor, masks: Tensor) -> float:
    """mIoU of the parsed images with their masks."""
    agreement = MaskAgreement(CELEBAMASK19.classes, parser.name, parser.weights)
    for image, mask in zip(images.split(_BATCH), masks.split(_BATCH), strict=True):
        agreement.update(parser.parser.parse(image.float() / 127.5 - 1).cpu(), mask)
    return agreement.result()["miou"]


def measure(settings: Settings, sheets: Path) -> dict[str, Any]:
    """All figures of a run, and sheets of its images into a folder.

    Raises:
        UsageError: a run with neither style nor words, or not on drawn faces.
    """
    asked = Asked(Path(settings.run), settings)
    config = asked.trained.config
    parser, masks = load_named_parser("drawn"), asked.targets.masks
    images = {"neither": asked.sampled("neither")}
    result: dict[str, Any] = {}
    if config.style:
        images["style"] = asked.sampled("style", style=asked.style())
        result["style"] = measure_style(asked, images["style"], images["neither"])
        save_style_sheet(asked, sheets / "style.png")
    if config.words:
        images["words"] = asked.sampled("words", words=asked.words())
        classifier = trained_classifier(Path(settings.classifier))
        result["words"] = measure_words(asked, images["words"], images["neither"], classifier)
        save_words_sheet(asked, sheets / "words.png")
    if config.style and config.words:
        images["both"] = asked.sampled("both", style=asked.style(), words=asked.words())
    if settings.plain:
        images["plain"] = plain_images(Path(settings.plain), asked)
    result["mask"] = {name: mask_agreement(parser, some, masks) for name, some in images.items()}
    result["mask"]["floor"] = mask_agreement(parser, images["neither"], masks.roll(1, dims=0))
    result["mask"]["ceiling"] = mask_agreement(parser, asked.round_trip(asked.targets.images), masks)
    guided = {name: getattr(asked.sampling, name) for name in _GUIDANCE}
    return result | guided | {"masks": len(masks), **origin(asked.trained)}


def plain_images(run: Path, asked: Asked) -> Tensor:
    """Images of the same masks and noise by a run that has neither style nor words."""
    pipe, _ = load_run(run)
    noise = initial_noise(range(asked.seed, asked.seed + len(asked.targets.masks)), pipe.latent_size)
    values = {"mask": asked.targets.masks.long()}
    return sample_images(pipe, noise, values, pipe.recipe.sampling, "plain")


def origin(trained: Trained) -> dict[str, Any]:
    """Which training the figures are of."""
    settings = {key: value for key, value in flat(trained.config).items() if key in _OF_TRAINING}
    return {"settings": settings, "steps": trained.step, "seconds": round(trained.seconds), "weights": trained.weights}


def save_style_sheet(asked: Asked, file: Path) -> None:
    """A row for each of some masks, a column for each of some styles, with one noise a mask."""
    count = min(_SHEET, len(asked.targets.masks))
    style = {name: each[:count] for name, each in asked.style().items()}
    rows = [[torch.full_like(asked.styles.images[0], 255), *asked.styles.images[:count]]]
    for i in range(count):
        noise = initial_noise([asked.seed + i], asked.pipe.latent_size).expand(count, -1, -1, -1)
        masks = asked.targets.masks[i : i + 1].long().expand(count, -1, -1)
        made = asked.sample(noise, {"mask": masks, "style": style}, "sheet")
        rows.append([CELEBAMASK19.colorize(asked.targets.masks[i]), *made])
    save_sheet(file, rows, ["mask", *(f"style {i + 1}" for i in range(count))])


def save_words_sheet(asked: Asked, file: Path) -> None:
    """A row for each of some masks, a column for each of some words, with one noise a mask."""
    count = min(_SHEET, len(asked.targets.masks))
    words = words_of_sentences([sentence(each) for each in _WORDS.values()])
    rows = []
    for i in range(count):
        noise = initial_noise([asked.seed + i], asked.pipe.latent_size).expand(len(_WORDS), -1, -1, -1)
        masks = asked.targets.masks[i : i + 1].long().expand(len(_WORDS), -1, -1)
        made = asked.sample(noise, {"mask": masks, "words": words}, "sheet")
        rows.append([CELEBAMASK19.colorize(asked.targets.masks[i]), *made])
    save_sheet(file, rows, ["mask", *_WORDS])


def main(argv: list[str]) -> None:
    """Measure a run and write the result and sheets of images."""
    settings = from_command_line(Settings(), argv)
    if settings.masks < 2:
        raise UsageError(f"masks must be at least 2, got {settings.masks}")
    name = settings.name or Path(settings.run).name
    result = measure(settings, Path(settings.run) / "asked")
    command = "python -m benchmarks.fidelity.asked " + " ".join(argv)
    file = RESULTS / "fidelity" / "asked" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result | provenance(command, settings.seed), indent=1) + "\n")
    print(f"{file}: " + "; ".join(summary(result)), file=sys.stderr)


def percent(share: float | None) -> str:
    """A share of the way from floor to ceiling, as text."""
    return "no part" if share is None else f"{share:.0%}"


def summary(result: Mapping[str, Any]) -> list[str]:
    """The figures in a line each."""
    lines = [
        f"{kind} {result[kind]['found']['agreement']:.3f}, floor {result[kind]['floor']['agreement']:.3f}, "
        f"ceiling {result[kind]['ceiling']['agreement']:.3f}: {percent(result[kind]['floor_to_ceiling'])} of the way"
        for kind in ("style", "words")
        if kind in result
    ]
    return [*lines, "mask " + ", ".join(f"{name} {value:.3f}" for name, value in result["mask"].items())]


if __name__ == "__main__":
    run_command(main)
