"""A small classifier of the attributes of drawn faces, which says whether an image shows the words it was asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmgen.data import DrawnFaces
from ssmgen.data.drawn_faces.words import ATTRIBUTES, attributes_of
from ssmgen.training import StepOrder, derived_seed
from ssmgen.weights import load_weights, open_weights, tensors_of, write_weights

#: Attributes that a mask leaves open; it shows the others: length of the hair, glasses, hat.
OPEN = ("hair", "skin", "background")
_SIDE = 64


class AttributeClassifier(nn.Module):
    """Five convolutions that halve the image, the mean of the last, and a head per attribute."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 3 * width, 4 * width)
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Conv2d(widths[-1], widths[-1], 3, padding=1), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1] * 16, len(all_)) for name, all_ in ATTRIBUTES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits by attribute ``(b, values)`` of uint8 images ``(b, 3, h, w)`` or floats in [-1, 1]."""
        images = images if images.is_floating_point() else images.float() / 127.5 - 1
        features = F.adaptive_avg_pool2d(self.trunk(F.interpolate(images, (_SIDE, _SIDE), mode="area")), 4).flatten(1)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def classify(self, images: Tensor) -> dict[str, Tensor]:
        """Class ids by attribute ``(n,)`` of uint8 images ``(n, 3, h, w)``."""
        found = [self(batch) for batch in images.split(64)]
        return {name: torch.cat([each[name] for each in found]).argmax(1) for name in ATTRIBUTES}


def true_attributes(pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Class ids by attribute ``(n,)`` of drawn faces, given as (index, appearance)."""
    found = [attributes_of(index, appearance=appearance) for index, appearance in pairs]
    return {name: torch.tensor([each[name] for each in found]) for name in ATTRIBUTES}


def word_agreement(found: Mapping[str, Tensor], asked: Mapping[str, Tensor]) -> dict[str, Any]:
    """Share of images with the asked value, by attribute, both ``(n,)``; ``agreement`` is the mean over `OPEN`."""
    shares = {name: (found[name] == asked[name]).float().mean().item() for name in ATTRIBUTES}
    return {"agreement": sum(shares[name] for name in OPEN) / len(OPEN), "by_attribute": shares}


def trained_classifier(file: Path, *, faces: int = 4096, steps: int = 1500) -> AttributeClassifier:
    """The classifier in a file, which is trained first if it is not there, on drawn faces from index 0 on."""
    classifier = AttributeClassifier()
    settings = json.dumps({"faces": faces, "steps": steps, "attributes": ATTRIBUTES}, sort_keys=True)
    if file.is_file():
        with open_weights(file) as held:
            if (held.metadata() or {}).get("settings") != settings:
                raise ValueError(f"{file}: was trained with other settings or attributes; delete it")
        load_weights(classifier, file)
        return classifier.eval()
    print(f"training the classifier of attributes on {faces} drawn faces", file=sys.stderr)
    data = DrawnFaces(faces, size=_SIDE)
    images = torch.stack([data[i][0] for i in range(faces)]).float()
    _train(classifier, images / 127.5 - 1, true_attributes([(i, i) for i in range(faces)]), steps)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_weights(file, tensors_of(classifier), {"settings": settings})
    return classifier.eval()


def _train(classifier: AttributeClassifier, images: Tensor, truth: dict[str, Tensor], steps: int) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    order = StepOrder(len(images), 32, 0)
    classifier.train()
    for step in range(steps):
        chosen = [index for index, _ in order.batch(step)]
        torch.manual_seed(derived_seed(0, "step", step))
        batch = images[chosen]
        # Softer and noisier, as generated images are; mirrored, which changes no attribute.
        blurred = F.avg_pool2d(F.pad(batch, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        batch = torch.lerp(batch, blurred, torch.rand(len(batch), 1, 1, 1))
        batch = batch + 0.1 * torch.rand(len(batch), 1, 1, 1) * torch.randn_like(batch)
        logits = classifier(batch.flip(3) if step % 2 else batch)
        loss = sum(F.cross_entropy(logits[name], truth[name][chosen]) for name in ATTRIBUTES)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        schedule.step()
