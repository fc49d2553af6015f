"""``report.html``: what an evaluation found, on one page without a network, beside the published figures."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmgen.data import CELEBAMASK19
from ssmgen.data.images import to_pil
from ssmgen.metrics import MaskAgreement

_TEMPLATE = Path(__file__).parent / "report.html.j2"
_SHOWN = 3


@dataclass(frozen=True)
class Published:
    """A row of the literature on CelebAMask-HQ; ``known`` says how sure the figures are, ``protocol`` what differs."""

    method: str
    fid: float
    lpips: float | None
    miou: float | None
    known: str
    protocol: str


_SECOND_HAND = "second-hand: seen quoted, not in the paper itself"
_RECALLED = "recalled: seen in no text at hand"
#: None of these figures was verified in the paper that states it.
PUBLISHED = (
    Published("SPADE", 29.2, 0.0, None, _SECOND_HAND, "against real validation images; no noise, so no diversity"),
    Published("CLADE", 30.6, 0.0, None, _RECALLED, "against real training images"),
    Published("INADE", 21.5, 0.415, None, _SECOND_HAND, "against real training images; LPIPS recalled"),
    Published("SDM", 18.8, 0.422, 77.0, _SECOND_HAND, "OASIS resizing, 2,000 test images, 1,000 steps; mIoU recalled"),
    Published("SCDM", 17.4, 0.418, 77.2, _SECOND_HAND, "OASIS resizing, 2,000 test images"),
    Published("SISMA", 18.3, None, None, _SECOND_HAND, "protocol not known; 200 steps"),
)


def write_report(run: Path, result: dict[str, Any], generated: Tensor, several: Tensor, real: Tensor, true: Tensor,
                 parsed: Tensor | None) -> Path:  # fmt: skip
    """Write the page into the run.

    Args:
        run: its folder, with ``log.jsonl``.
        result: what goes into ``result.json``.
        generated: an image of each mask, uint8 ``(masks, 3, h, w)``.
        several: some of each of the first masks, ``(masks, samples, 3, h, w)``.
        real: the real image of each mask.
        true: the masks, ``(masks, h, w)``.
        parsed: the labels a parser gave ``generated``; None where there is none.
    """
    from jinja2 import Environment  # torch depends on it

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_TEMPLATE.read_text())
    file = run / "report.html"
    page = template.render(
        name=run.name,
        result=result,
        loss=_curve(run / "log.jsonl"),
        classes=_by_class(result),
        extremes=_extremes(generated, real, true, parsed) if parsed is not None else [],
        rows=[
            [_picture(CELEBAMASK19.colorize(mask)), *map(_picture, images), _picture(photo)]
            for mask, images, photo in zip(true, several, real, strict=False)
        ],
        published=PUBLISHED,
    )
    temporary = file.with_suffix(".html.tmp")
    temporary.write_text(page)
    temporary.rename(file)
    return file


def _by_class(result: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """(class, generated, ceiling, floor): intersection over union of the classes that occur."""
    if "mask_agreement" not in result:
        return []
    parts = [result[key]["iou"] for key in ("mask_agreement", "ceiling", "floor")]
    return [(name, *(part[name] for part in parts)) for name in parts[0]]


def _extremes(generated: Tensor, real: Tensor, true: Tensor, parsed: Tensor) -> list[dict[str, Any]]:
    """The masks that are followed best, half-way and worst, by the mean over the classes of each."""
    scores = [image_agreement(p, t) for p, t in zip(parsed, true, strict=True)]
    ranked = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    middle = max(0, (len(ranked) - _SHOWN) // 2)
    groups = {"best": ranked[:_SHOWN], "median": ranked[middle : middle + _SHOWN], "worst": ranked[-_SHOWN:]}
    return [
        {
            "group": group,
            "score": scores[i],
            "pictures": [
                _picture(CELEBAMASK19.colorize(true[i])),
                _picture(generated[i]),
                _picture(CELEBAMASK19.colorize(parsed[i])),
                _picture(real[i]),
            ],
        }
        for group, chosen in groups.items()
        for i in chosen
    ]


def image_agreement(parsed: Tensor, true: Tensor) -> float:
    """Mean intersection over union of one image, over the classes of its own mask."""
    agreement = MaskAgreement(CELEBAMASK19.classes)
    agreement.update(parsed.unsqueeze(0), true.unsqueeze(0))
    return agreement.result()["miou"]


def _curve(log: Path, width: int = 640, height: int = 160) -> dict[str, Any] | None:
    """The logged losses as points of a polyline; None where there are fewer than two."""
    lines = log.read_text().splitlines() if log.is_file() else []
    logged = [json.loads(line) for line in lines]
    points = [(entry["step"], entry["loss"]) for entry in logged if "loss" in entry]
    if len(points) < 2:
        return None
    steps, losses = torch.tensor(points, dtype=torch.float64).unbind(1)
    x = (steps - steps[0]) / (steps[-1] - steps[0]).clamp(min=1) * width
    y = height - (losses - losses.min()) / (losses.max() - losses.min()).clamp(min=1e-12) * height
    return {
        "points": " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True)),
        "width": width,
        "height": height,
        **{"first": points[0], "last": points[-1], "least": losses.min().item(), "most": losses.max().item()},
    }


def _picture(image: Tensor) -> str:
    """A PNG within the page."""
    stream = io.BytesIO()
    to_pil(image).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
