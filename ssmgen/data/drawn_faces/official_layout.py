"""Drawn faces in the file layout of the official CelebAMask-HQ archive."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ssmgen.data.drawn_faces.portrait import draw_face
from ssmgen.data.images import to_pil, write_png
from ssmgen.data.labels import CELEBAMASK19


def write_official_layout(target: Path, count: int, size: int = 512, seed: int = 0, start: int = 0) -> None:
    """Write drawn faces in the layout of the official CelebAMask-HQ archive; face ``i`` gets the id ``i``.

    Args:
        target: folder for ``CelebA-HQ-img``, ``CelebAMask-HQ-mask-anno`` and the mapping to CelebA. The original
            numbers in the mapping are fictitious, but spread over CelebA's three partitions.
        count: number of faces.
        size: side of the masks in pixels; images are twice as large (512 and 1024 in the archive).
        seed: the set of faces.
        start: index of the first face.
    """
    target, ids = Path(target), range(start, start + count)
    images = target / "CelebA-HQ-img"
    images.mkdir(parents=True, exist_ok=True)
    for number in ids:
        parts = target / "CelebAMask-HQ-mask-anno" / str(number // 2000)
        parts.mkdir(parents=True, exist_ok=True)
        to_pil(draw_face(number, 2 * size, seed)[0]).save(images / f"{number}.jpg", quality=92)
        _write_parts(draw_face(number, size, seed)[1], parts, number)
    lines = ["idx          orig_idx     orig_file", *map(_mapping_line, ids)]
    (target / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_parts(mask: Tensor, folder: Path, number: int) -> None:
    """Write one black-and-white image per part that is present, as in the official archive."""
    for label, part in enumerate(CELEBAMASK19.classes[1:], start=1):
        inside = mask == label
        if inside.any():
            white = inside.to(torch.uint8).mul_(255).expand(3, -1, -1)
            write_png(folder / f"{number:05d}_{part}.png", white)


def _mapping_line(number: int) -> str:
    """A row of the mapping to CelebA. The step is coprime to CelebA's 202599, so ids are scattered and unique."""
    original = (119613 + 7919 * number) % 202599
    return f"{number:<13}{original:<13}{original + 1:06d}.jpg"
