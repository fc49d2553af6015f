"""The images of an evaluation, kept as PNGs, so that one that was stopped goes on where it was.

``RUN/evaluation/<key>/`` holds ``<image>.png`` and ``record.json``. The key is a hash of all that an image depends on: the
weights, the sampling settings and the images' size; what was made with others is never mixed in. Every number of an
evaluation is computed from the files, so that it does not matter when or by whom they were made.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.sisma.runs import LoadedRun, check_writable
from ssmgen.data.images import read_image, write_png


@dataclass(frozen=True)
class Wanted:
    """One image: its name, its mask ``(height, width)`` and the seed of its noise."""

    name: str
    mask: Tensor
    seed: int


def evaluation_folder(loaded: LoadedRun, run: Path, sampling: dict[str, Any]) -> Path:
    """The folder of these weights and settings, made if need be."""
    record = {"weights": loaded.weights, "sampling": sampling, "image_size": loaded.config.image_size}
    text = json.dumps(record, indent=2, sort_keys=True)
    folder = run / "evaluation" / hashlib.sha256(text.encode()).hexdigest()[:12]
    check_writable(folder)
    (folder / "record.json").write_text(text + "\n")
    return folder


def make_missing(
    loaded: LoadedRun,
    wanted: Sequence[Wanted],
    folder: Path,
    sampling: dict[str, Any],
    *,
    batch_size: int,
    micro_batch: int = 0,
) -> None:
    """Sample the images that are not there yet, with progress and time left on stderr.

    Args:
        loaded: the run.
        wanted: the images.
        folder: where they are kept.
        sampling: solver, steps, shift and guidance scale.
        batch_size: images sampled and written at a time.
        micro_batch: images in each call of the model; a shorter rest is filled up. With 0 it is the batch. As rounding
            depends on the shapes of a call, images are the same to the bit for every batch size only where it is set.
    """
    from tqdm import tqdm

    missing = [image for image in wanted if not (folder / f"{image.name}.png").is_file()]
    quiet = 0.5 if sys.stderr.isatty() else 20
    with tqdm(total=len(wanted), initial=len(wanted) - len(missing), unit="img", mininterval=quiet) as bar:
        for batch in _pieces(missing, batch_size):
            for piece in _pieces(batch, micro_batch or batch_size):
                filled = [*piece, *[piece[-1]] * (micro_batch - len(piece))]
                masks = torch.stack([image.mask for image in filled])
                images = loaded.generate(masks, [image.seed for image in filled], batch_size=len(filled), **sampling)
                for image, pixels in zip(piece, images, strict=False):
                    write_png(folder / f"{image.name}.png", pixels)
                bar.update(len(piece))


def read_images(wanted: Sequence[Wanted], folder: Path) -> Tensor:
    """The images, uint8 ``(count, 3, size, size)``."""
    return torch.stack([read_image(folder / f"{image.name}.png") for image in wanted])


def _pieces(items: Sequence[Wanted], size: int) -> Iterator[Sequence[Wanted]]:
    return (items[start : start + size] for start in range(0, len(items), size))
