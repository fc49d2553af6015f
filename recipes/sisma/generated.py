"""The images of an evaluation, kept as PNGs, so that one that was stopped goes on where it was.

``RUN/evaluation/<key>/`` holds ``<id>.png``, ``<id>--<k>.png`` and ``record.json``. The key is a hash of all that an
image depends on: the weights, the sampling settings and the masks' source; what was made with others is never mixed
in. Every number of an evaluation is computed from the files, so that it does not matter when or by whom they were made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.sisma.image_names import image_name
from recipes.sisma.pairs import held_out_pairs
from recipes.sisma.runs import LoadedRun, check_writable
from ssmgen.atomic import write_text
from ssmgen.data.images import read_image, write_png
from ssmgen.training import derived_seed, progress_bar


@dataclass(frozen=True)
class Wanted:
    """One image: its name, its mask ``(height, width)`` and the seed of its noise."""

    name: str
    mask: Tensor
    seed: int


class Groups(Sequence[Tensor]):
    """Several images of each of some masks, read when they are asked for: all of them may not fit into memory.

    Args:
        files: of every mask.
    """

    def __init__(self, files: Sequence[Sequence[Path]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        """uint8 ``(samples, 3, h, w)``; of a slice, the groups in it."""
        if isinstance(index, slice):
            return Groups(self.files[index])
        return read_images(self.files[index])


def pair_ids(pairs: Any) -> list[str]:
    """The ids of image-mask pairs; drawn ones go by their number."""
    return [str(id) for id in getattr(pairs, "ids", None) or [f"{index:05d}" for index in range(len(pairs))]]


def one_each(ids: Sequence[str], masks: Tensor, seed: int) -> list[Wanted]:
    """An image of every mask, its noise seeded by ``seed`` and its id, whatever else is sampled and in which order."""
    own = [int(id) if id.isdecimal() and len(id) < 10 else derived_seed(0, "image", id) for id in ids]
    seeds = [derived_seed(seed, "image", one) if seed else one for one in own]
    return [Wanted(id, mask, one) for id, mask, one in zip(ids, masks, seeds, strict=True)]


def some_more(images: Sequence[Wanted], samples: int) -> list[Wanted]:
    """Several images of each mask, with noise that no other image has, however many are asked for."""
    return [
        Wanted(image_name(image.name, k + 1), image.mask, derived_seed(image.seed, "diversity", k))
        for image in images
        for k in range(samples)
    ]


def evaluation_folder(loaded: LoadedRun, run: Path, sampling: dict[str, Any], seed: int, micro_batch: int) -> Path:
    """The folder of these weights, masks and settings, made if need be."""
    source = held_out_pairs(loaded.config, 1).fingerprint()
    record = {"weights": loaded.weights, "source": source, "sampling": sampling, "micro_batch": micro_batch}
    text = json.dumps(record | {"noise": f"by id, seed {seed}, 64 bits"}, indent=2, sort_keys=True)
    folder = run / "evaluation" / hashlib.sha256(text.encode()).hexdigest()[:12]
    check_writable(folder)
    write_text(folder / "record.json", text + "\n")
    return folder


def make_missing(
    loaded: LoadedRun,
    wanted: Sequence[Wanted],
    folder: Path,
    sampling: dict[str, Any],
    *,
    batch_size: int,
    process: int = 0,
    processes: int = 1,
) -> None:
    """Sample the images that are not there yet, with progress and time left on stderr.

    Rounding depends on the shapes of a call. The batches are therefore cut by position, whatever is there already and
    however many processes there are: an evaluation that goes on makes the very images that it would have made.

    Args:
        loaded: the run.
        wanted: the images.
        folder: where they are kept.
        sampling: solver, steps, shift and guidance scale.
        batch_size: images in a call of the model.
        process: which of the processes this is; every one makes its share of the batches.
        processes: how many there are.
    """
    batches = [wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size)][process::processes]
    with progress_bar(sum(map(len, batches)), "img", what="sampling", quiet=process > 0) as bar:
        for batch in batches:
            files = [folder / f"{image.name}.png" for image in batch]
            if not all(file.is_file() for file in files):
                masks = torch.stack([image.mask for image in batch])
                seeds = [image.seed for image in batch]
                images = loaded.generate(masks, seeds, batch_size=batch_size, **sampling)
                for file, pixels in zip(files, images, strict=True):
                    write_png(file, pixels)
            bar.update(len(batch))


def read_images(files: Sequence[Path]) -> Tensor:
    """The images, uint8 ``(count, 3, size, size)``."""
    return torch.stack([read_image(file) for file in files])
