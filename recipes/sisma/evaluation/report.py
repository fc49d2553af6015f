"""``report.html``: the figures of an evaluation beside published ones, on one page that needs no network."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from recipes.sisma.curves import chart, points_of, read_log
from recipes.sisma.evaluation.consistency import FIGURES
from recipes.sisma.evaluation.images import Images
from recipes.sisma.evaluation.nearest import sentence
from ssmgen.atomic import write_text
from ssmgen.data import CELEBAMASK19
from ssmgen.data.images import to_pil
from ssmgen.metrics import FID_PROTOCOLS, MaskAgreement

_FOLDER = Path(__file__).parent
_EXTREMES, _ROWS, _COLUMNS = 3, 8, 10


@dataclass(frozen=True)
class Published:
    """A row of the literature on CelebAMask-HQ.

    Attributes:
        method: its name.
        fid, lpips, miou: figures; mIoU in per cent; None where unknown.
        known: where they were seen.
        reference: the real images of the FID: ``test``, ``train``, ``validation``, or empty where unknown.
        images: number of generated images, 0 where unknown.
        side: of the images in pixels, 0 where unknown.
        note: anything else that matters for a comparison.
    """

    method: str
    fid: float
    lpips: float | None
    miou: float | None
    known: str
    reference: str = ""
    images: int = 0
    side: int = 0
    note: str = ""


_SECOND_HAND = "second-hand: seen quoted, not in the paper itself"
_RECALLED = "recalled: seen in no text at hand"
#: None of these figures was checked against the paper that reports it.
PUBLISHED = (
    Published("SPADE", 29.2, 0.0, None, _SECOND_HAND, "validation", note="no noise goes in, so no diversity"),
    Published("CLADE", 30.6, 0.0, None, _RECALLED, "train", side=256, note="no noise goes in, so no diversity"),
    Published("INADE", 21.5, 0.415, None, _SECOND_HAND + "; LPIPS recalled", "train", side=256),
    Published("SDM", 18.8, 0.422, 77.0, _SECOND_HAND + "; mIoU recalled. A digest of SISMA's table prints FID 21.5",
              "test", 2000, 256, "resized as by OASIS; 1,000 steps, guidance 1.5"),
    Published("SCDM", 17.4, 0.418, 77.2, _SECOND_HAND, "test", 2000, 256, "resized as by OASIS"),
    Published("SISMA", 18.3, None, None, _SECOND_HAND, note="protocol not known; 200 steps"),
)  # fmt: skip


def write_report(file: Path, result: dict[str, Any], images: Images, parsed: Any) -> None:
    """Write the page.

    Args:
        file: the page; the losses in a ``log.jsonl`` beside it are plotted.
        result: the content of ``result.json``.
        images: the measured images.
        parsed: a parser's labels of the generated images; None without a parser.
    """
    from jinja2 import Environment, FileSystemLoader  # torch depends on it

    faces = images.held_out.labels.classes == CELEBAMASK19.classes
    loader = FileSystemLoader([_FOLDER, _FOLDER.parent])  # the latter holds curves.html.j2
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html.j2").render(
        name=result.get("images", file.parent.name),
        result=result,
        curves=curves(file.parent),
        classes=_by_class(result),
        consistency=_consistency(result),
        nearest=sentence(result["nearest"]) if "nearest" in result else "",
        extremes=_extremes(images, parsed) if parsed is not None else [],
        rows=_rows(images),
        published=[(row, differences(row, result)) for row in PUBLISHED] if faces else [],
        own=_result_rows(result),
    )
    write_text(file, page)


def curves(folder: Path) -> list[dict[str, Any]]:
    """The loss, the gradient's norm and the learning rate of the folder's ``log.jsonl``, each as a `chart`.

    Quantities with fewer than two points are left out, so the list may be empty.
    """
    log = read_log(folder)
    names = {"loss": "training loss", "grad_norm": "norm of the gradient", "lr": "learning rate"}
    found = [chart(label, [points_of(log, key)], linear=key == "lr") for key, label in names.items()]
    return [one for one in found if one]


def differences(row: Published, result: dict[str, Any]) -> str:
    """How the conditions of a published row differ from those of a result."""
    said = ["photos, here drawn faces" if result["data"] == "drawn" else "trained on 28,000 photos of CelebAMask-HQ"]
    if not row.side:
        said.append("size not stated")
    elif row.side != result["image_size"]:
        said.append(f"{row.side} pixels, here {result['image_size']}")
    if not row.images:
        said.append("number of images not stated")
    elif row.images != result["masks"]:
        said.append(f"{row.images:,} images, here {result['masks']:,}")
    measured = {FID_PROTOCOLS[name].reference for name in result.get("distances", {}) if name in FID_PROTOCOLS}
    if not row.reference:
        said.append("real images of the FID not stated")
    elif not measured:
        said.append(f"FID against {row.reference} images, here not measured")
    elif row.reference not in measured:
        said.append(f"FID against {row.reference} images, here against {' and '.join(sorted(measured))} images")
    if row.miou is not None:
        said.append("mIoU by another parser")
    return "; ".join([*said, row.note] if row.note else said)


def _result_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """This result in the table of published figures: one row for every FID, or one without."""
    fids = [found for name, found in result.get("distances", {}).items() if name in FID_PROTOCOLS]
    miou = 100 * result["mask_agreement"]["miou"] if "mask_agreement" in result else None
    lpips = result.get("lpips", {})
    what = f"{'drawn' if result['data'] == 'drawn' else 'prepared'} data, {result['image_size']} pixels"
    return [
        {
            "fid": fid["frechet"]["value"] if fid else None,
            "lpips": lpips.get("value"),
            "miou": miou,
            "protocol": ", ".join([what, *([fid["protocol"]] if fid else []), *([lpips["protocol"]] if lpips else [])]),
        }
        for fid in fids or [None]
    ]


def _by_class(result: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """(class, generated, ceiling, floor): intersection over union of every class that occurs in all of them.

    The floor has no masks that are the only ones of their shape.
    """
    if "mask_agreement" not in result:
        return []
    parts = [result[key]["iou"] for key in ("mask_agreement", "ceiling", "floor")]
    return [(name, *(part[name] for part in parts)) for name in parts[0] if all(name in part for part in parts)]


def _consistency(result: dict[str, Any]) -> list[tuple[str, int, list[float | None], float | None, int]]:
    """(figure, decimals, [generated, real, after the autoencoder], ratio, masks); empty where there are no faces."""
    if "consistency" not in result:
        return []
    found = result["consistency"]
    sets = [found.get(name, {}) for name in ("generated", "real", "autoencoder")]
    return [
        (
            key.replace("_", " "),
            FIGURES[key],
            [each.get(key) for each in sets],
            found["ratio"].get(key),
            found["n"][key],
        )
        for key in found["generated"]
    ]


def _extremes(images: Images, parsed: Any) -> list[dict[str, Any]]:
    """The best, median and worst masks by the mean IoU over the classes of each, none of them twice."""
    held_out = images.held_out
    scores = [_miou(images, parsed, i) for i in range(len(parsed))]
    ranked = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    shown = max(1, min(_EXTREMES, len(ranked) // 3))
    middle = (len(ranked) - shown) // 2
    groups = {"best": ranked[:shown], "median": ranked[middle : middle + shown], "worst": ranked[-shown:]}
    if len(ranked) < 3:
        del groups["median"]
    colours, rows = held_out.labels.colorize, []
    for group, chosen in groups.items():
        for i in chosen:
            row = colours(held_out.masks[i]), images.generated[i], colours(parsed[i]), held_out.images[i]
            pictures = [_picture(image) for image in row]
            rows.append({"group": group, "id": held_out.ids[i], "score": scores[i], "pictures": pictures})
    return rows


def _miou(images: Images, parsed: Any, i: int) -> float:
    """Mean intersection over union of one image, over the classes of its own mask."""
    agreement = MaskAgreement(images.held_out.labels.classes)
    agreement.update(parsed[i][None], images.held_out.masks[i][None])
    return agreement.result()["miou"]


def _rows(images: Images) -> list[list[str]]:
    """Mask, samples and real image of the first masks that have several samples."""
    held_out, rows = images.held_out, []
    for id, group in zip(list(images.sample_files)[:_ROWS], images.samples(), strict=False):
        i = held_out.ids.index(id)
        mask = held_out.labels.colorize(held_out.masks[i])
        rows.append([_picture(image) for image in (mask, *group[:_COLUMNS], held_out.images[i])])
    return rows


def _picture(image: Tensor) -> str:
    """A PNG as a data URL."""
    stream = io.BytesIO()
    to_pil(image).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
