"""Contact sheets of masks, generated faces and real faces."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from recipes.sisma.evaluation.images import by_shape
from ssmgen import MaskToImage
from ssmgen.atomic import whole_file
from ssmgen.data import LabelSet
from ssmgen.data.images import to_pil

_GAP, _HEADER = 4, 22


def samples_of(pipe: MaskToImage, masks: Sequence[Tensor], seeds: Sequence[Sequence[int]]) -> list[Tensor]:
    """Images of each mask, uint8 ``(samples, 3, h, w)``, in the shape of the mask.

    Args:
        pipe: the model.
        masks: labels ``(h, w)``; their shapes may differ.
        seeds: of the images of each mask, as many of each.
    """
    groups: dict[int, Tensor] = {}
    for places, group in by_shape(masks):
        given = {"seed": [seed for place in places for seed in seeds[place]], "num_images": len(seeds[places[0]])}
        images = pipe(group.long(), output_type="uint8", **given)
        groups |= zip(places, images.unflatten(0, (len(places), -1)), strict=True)
    return [groups[place] for place in range(len(masks))]


def save_mask_sheet(
    path: Path,
    masks: Sequence[Tensor],
    groups: Sequence[Sequence[Tensor]],
    real: Sequence[Tensor],
    labels: LabelSet,
    headings: Sequence[str] = (),
) -> None:
    """Write a `save_sheet` with a row for each mask: the mask in colours, its generated images, its real image.

    ``masks`` are labels ``(h, w)``, images ``(3, h, w)``. ``headings`` are those of the generated images, a ``group``
    for each mask; empty numbers them.
    """
    columns = headings or [f"generated {i + 1}" for i in range(len(groups[0]))]
    rows = [[labels.colorize(mask), *group, image] for mask, group, image in zip(masks, groups, real, strict=True)]
    save_sheet(path, rows, ["mask", *columns, "a real one"])


def save_sheet(path: Path, rows: Sequence[Sequence[Tensor]], headings: Sequence[str]) -> None:
    """Write rows of ``(3, h, w)`` uint8 images as one PNG, with a heading over each column; smaller ones are centred.

    Raises:
        ValueError: rows whose length is not the number of headings.
    """
    from PIL import Image, ImageDraw, ImageFont

    if any(len(row) != len(headings) for row in rows):
        raise ValueError(f"{len(headings)} headings but rows of {[len(row) for row in rows]} images")
    height, width = (max(image.shape[axis] for row in rows for image in row) + _GAP for axis in (-2, -1))
    sheet = Image.new("RGB", (len(headings) * width + _GAP, len(rows) * height + _GAP + _HEADER), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for column, heading in enumerate(headings):
        x = _GAP + column * width
        draw.text((x + (width - _GAP) / 2, _HEADER / 2 + 1), heading, fill="black", font=font, anchor="mm")
        for line, row in enumerate(rows):
            down, right = (height - _GAP - row[column].shape[-2]) // 2, (width - _GAP - row[column].shape[-1]) // 2
            sheet.paste(to_pil(row[column]), (x + right, _HEADER + _GAP + line * height + down))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        sheet.save(partial, format="PNG")
