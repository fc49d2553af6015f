"""Small source folders for the tests of `recipes.sisma.prepare`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recipes.sisma.prepare import main
from ssmgen.data.images import to_pil, write_png
from ssmgen.data.labels import CELEBAMASK19

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SSMGEN_SHARED", ROOT.parent / "shared"))
IMAGES, PARTS = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno"


def face_mask(size: int = 16) -> Tensor:
    """Mostly hair, some skin and an eye."""
    mask = torch.full((size, size), 13, dtype=torch.uint8)
    mask[size // 2 :, : size // 2] = 1
    mask[0, 0] = 4
    return mask


def write_parts(root: Path, id: int, mask: Tensor) -> None:
    folder = root / PARTS / str(id // 2000)
    folder.mkdir(parents=True, exist_ok=True)
    for label in mask.unique().tolist():
        if label:
            white = (mask == label).to(torch.uint8) * 255
            write_png(folder / f"{id:05d}_{CELEBAMASK19.classes[label]}.png", white.expand(3, -1, -1))


def make_official(root: Path, ids: tuple[int, ...] = (0, 1999, 2000, 28000)) -> Path:
    (root / IMAGES).mkdir(parents=True)
    for number, id in enumerate(ids):
        to_pil(torch.full((3, 32, 32), number % 256, dtype=torch.uint8)).save(root / IMAGES / f"{id}.jpg")
        write_parts(root, id, face_mask())
    limits = (162_770, 162_771, 182_637, 182_638)
    lines = ["idx  orig_idx  orig_file", *(f"{id}  {limits[n % 4]}  {n:06d}.jpg" for n, id in enumerate(ids))]
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(lines))
    return root


def make_folder(root: Path, names: tuple[str, ...] = ("ann", "bob", "cy")) -> Path:
    for number, name in enumerate(names):
        (root / "images").mkdir(parents=True, exist_ok=True)
        (root / "masks").mkdir(exist_ok=True)
        to_pil(torch.full((3, 16, 16), number % 256, dtype=torch.uint8)).save(root / f"images/{name}.jpg")
        write_png(root / f"masks/{name}.png", face_mask())
    return root


def run(source: Path | str, target: Path, *more: str) -> None:
    main([f"source={source}", f"target={target}", *more])


def splits_of(target: Path) -> dict[str, list[str]]:
    return json.loads((target / "splits.json").read_text())
