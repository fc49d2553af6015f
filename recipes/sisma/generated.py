"""The images of an evaluation, kept as PNGs, so that one that was stopped goes on where it was.

``RUN/evaluation/<key>/`` holds ``<image>.png`` and ``record.json``. The key is a hash of all that an image depends on:
the weights, the sampling settings and the masks' source; what was made with others is never mixed in. Every number of
an evaluation is computed from the files, so that it does not matter when or by whom they were made.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.sisma.pairs import held_out_pairs
from recipes.sisma.runs import LoadedRun, check_writable
from ssmgen.data.images import read_image, write_png


@dataclass(frozen=True)
class Wanted:
    """One image: its name, its mask ``(height, width)`` and the seed of its noise."""

    name: str
    mask: Tensor
    seed: int


def evaluation_folder(loaded: LoadedRun, run: Path, sampling: dict[str, Any], micro_batch: int) -> Path:
    """The folder of these weights, masks and settings, made if need be."""
    source = held_out_pairs(loaded.config, 1).fingerprint()
    record = {"weights": loaded.weights, "source": source, "sampling": sampling, "micro_batch": micro_batch}
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
) -> None:
    """Sample the images that are not there yet, with progress and time left on stderr.

    Rounding depends on the shapes of a call. The batches are therefore cut by position, whatever is there already: an
    evaluation that goes on makes the very images that it would have made.

    Args:
        loaded: the run.
        wanted: the images.
        folder: where they are kept.
        sampling: solver, steps, shift and guidance scale.
        batch_size: images in a call of the model.
    """
    from tqdm import tqdm

    quiet = 0.5 if sys.stderr.isatty() else 20
    with tqdm(total=len(wanted), unit="img", mininterval=quiet) as bar:
        for start in range(0, len(wanted), batch_size):
            batch = wanted[start : start + batch_size]
            files = [folder / f"{image.name}.png" for image in batch]
            if not all(file.is_file() for file in files):
                masks = torch.stack([image.mask for image in batch])
                seeds = [image.seed for image in batch]
                images = loaded.generate(masks, seeds, batch_size=batch_size, **sampling)
                for file, pixels in zip(files, images, strict=True):
                    write_png(file, pixels)
            bar.update(len(batch))


def read_images(wanted: Sequence[Wanted], folder: Path) -> Tensor:
    """The images, uint8 ``(count, 3, size, size)``."""
    return torch.stack([read_image(folder / f"{image.name}.png") for image in wanted])
