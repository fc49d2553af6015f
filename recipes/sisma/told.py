"""What a run's model is told besides masks: the style of a picture (``style=true``) and words (``words=true``).

In training the style is that of the image itself, of which only the mean and deviation of each region remain, or with
``style=whole`` of all of it. The words are attributes that a face was drawn with. To sample, give any picture with its
mask, and any sentence of these words:

    pipe, _ = load_run(run)
    pipe("mask.png", style="other.png", style_mask="other-mask.png", words="a face, black hair")
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recipes.sisma.arguments import UsageError
from recipes.sisma.presets import Config
from ssmgen.data.drawn_faces import ATTRIBUTES, sentence
from ssmgen.registry import Spec, find, make
from ssmgen.sampling import Sampling
from ssmgen.training import derived_seed

# The frozen encoder of words: a fixed vector for each.
_WORD_VECTORS = {"name": "word-vectors", "width": 64, "max_length": 20}
_BATCH = 16
_TOLD = ("style", "words")


def check_told(config: Config) -> None:
    """Reject words for data that has none, by a `UsageError`."""
    if config.words and config.data != "drawn":
        raise UsageError(f"words=true is for drawn faces, whose attributes are known, and not for data={config.data}")


def told_arguments(config: Config) -> dict[str, Any]:
    """Arguments of the model that make it read a style, and words, both added at the input where the mask says."""
    if not (config.style or config.words):
        return {}
    given = find(config.model, "model").defaults | config.model_args
    conditions = dict(given.get("conditions") or {"mask": "label-map"})
    add = list(given.get("add", ()))
    found: dict[str, Any] = {}
    if config.style == "whole":  # a vector that joins the time
        conditions["style"] = {"name": "style-image", "regions": False}
    elif config.style:
        conditions["style"] = {"name": "style-image", "placed_by": "mask"}
        add.append("style")
        found["style_class_dropout"] = 0.1
    if config.style:
        # The image's own style tells all that its words tell: where it is always there, words are hardly learned.
        found["style_dropout"] = 0.5 if config.words else 0.1
    if config.words:
        # Placed: which words concern a region need not be found again in every block, at every step.
        conditions["words"] = {"name": "placed-sequence", "width": _WORD_VECTORS["width"], "placed_by": "mask"}
        add.append("words")
        found |= {"words_dropout": 0.1}
    return {**found, **config.model_args, "conditions": conditions, "add": add}


def told_sampling(sampling: Sampling, model: Any) -> Sampling:
    """The sampling settings of a run that is told more than masks: one scale serves all, one start the mask alone.

    Style and words are guided from the noise on, because colours are decided there (docs/style.md).
    """
    conditions = dict(getattr(model, "conditions", {}))
    others = [name for name in _TOLD if getattr(conditions.get(name), "dropout", 0)]
    if len(conditions) < 2:
        return sampling
    scale, start = sampling.guidance_scale, sampling.guidance_start
    if not isinstance(scale, Mapping):
        scale = dict.fromkeys(["mask", *others], float(scale))
    if not isinstance(start, Mapping):
        start = {"mask": float(start)}
    return replace(sampling, guidance_scale=dict(scale), guidance_start=dict(start))


def text_encoders(config: Config) -> dict[str, Spec]:
    """The encoder of each condition that takes text, for `ssmgen.pipeline.Recipe`."""
    return {"words": _WORD_VECTORS} if config.words else {}


def style_of(autoencoder: Any, images: Tensor, masks: Tensor | None) -> dict[str, Tensor]:
    """The value of the condition ``style``: latents ``(n, c, h, w)`` and masks, or latents alone.

    Args:
        autoencoder: the run's.
        images: uint8 ``(n, 3, H, W)``.
        masks: labels ``(n, H, W)``; None for the style of whole pictures.
    """
    device = next(autoencoder.parameters(), torch.empty(0)).device
    with torch.no_grad():
        batches = (images.float() / 127.5 - 1).split(_BATCH)
        latents = torch.cat([autoencoder.encode(batch.to(device)).float().cpu() for batch in batches])
    return {"latents": latents} if masks is None else {"latents": latents, "mask": masks}


def words_of_sentences(sentences: Sequence[str]) -> dict[str, Tensor]:
    """The value of the condition ``words``: vectors ``(n, m, width)``, m the same for all, and lengths ``(n,)``."""
    found = make(_WORD_VECTORS).encode(sentences)
    missing = _WORD_VECTORS["max_length"] - found["tokens"].shape[1]
    return {"tokens": torch.nn.functional.pad(found["tokens"], (0, 0, 0, missing)), "lengths": found["lengths"]}


def unknown_words(text: str) -> list[str]:
    """The words of a text that occur in no sentence of `training_words`: they have vectors, but mean nothing."""
    values = [(name, value) for name, values in ATTRIBUTES.items() for value in values]
    known = {word for name, value in values for word in _words(sentence({"hair": "black", name: value}))}
    return [word for word in dict.fromkeys(_words(text)) if word not in known]


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


def training_words(attributes: Mapping[str, int], seed: int, index: int, draw: int) -> dict[str, Tensor]:
    """The value for one example: a sentence of its attributes, in half of the draws of some of them alone."""
    rng = random.Random(derived_seed(seed, "words", index, draw))
    part = rng.random() < 0.5
    told = {name: value for name, value in attributes.items() if not part or rng.random() < 0.5}
    return {name: each[0] for name, each in words_of_sentences([sentence(told)]).items()}
