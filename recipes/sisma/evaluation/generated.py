"""The generated images of an evaluation, kept as PNGs, so that a stopped evaluation continues where it was.

``RUN/evaluation/<key>/`` holds ``<id>.png``, ``<id>--<k>.png`` and ``record.json``. The key is a hash of everything an
image depends on: weights, sampling settings and the source of the masks; images of other settings are never mixed in.
All figures are computed from these files, so it does not matter when or by which process they were made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.sisma.image_names import image_name
from recipes.sisma.pairs import held_out_pairs
from recipes.sisma.runs import Trained, check_writable
from ssmgen import Sampling
from ssmgen.atomic import write_text
from ssmgen.data.images import read_image, write_png
from ssmgen.training import derived_seed, progress_bar


@dataclass(frozen=True)
class ImageSpec:
    """An image to generate: its name, its mask ``(height, width)`` and the seed of its noise."""

    name: str
    mask: Tensor
    seed: int


class SampleGroups(Sequence[Tensor]):
    """Several images of each of some masks, read on access, because all of them may not fit into memory.

    Args:
        files: the images of each mask.
    """

    def __init__(self, files: Sequence[Sequence[Path]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        """uint8 ``(samples, 3, h, w)``; the groups in it for a slice."""
        if isinstance(index, slice):
            return SampleGroups(self.files[index])
        return read_images(self.files[index])


def one_per_mask(ids: Sequence[str], masks: Sequence[Tensor], seed: int) -> list[ImageSpec]:
    """An image of every mask, whose noise depends only on ``seed`` and the mask's id, not on its position."""
    of_id = [int(id) if id.isdecimal() and len(id) < 10 else derived_seed(0, "image", id) for id in ids]
    seeds = [derived_seed(seed, "image", one) if seed else one for one in of_id]
    return [ImageSpec(id, mask, one) for id, mask, one in zip(ids, masks, seeds, strict=True)]


def several_per_mask(images: Sequence[ImageSpec], samples: int) -> list[ImageSpec]:
    """Several images of each mask; the noise of each does not depend on ``samples`` and is shared with no other."""
    return [
        ImageSpec(image_name(image.name, k + 1), image.mask, derived_seed(image.seed, "diversity", k))
        for image in images
        for k in range(samples)
    ]


def evaluation_folder(run: Path, trained: Trained, sampling: Sampling, seed: int, micro_batch: int) -> Path:
    """The folder for these weights, masks and settings; created if necessary."""
    source = held_out_pairs(trained.config, 1).fingerprint()
    record = {"weights": trained.weights, "source": source, "sampling": asdict(sampling), "micro_batch": micro_batch}
    text = json.dumps(record | {"noise": f"by id, seed {seed}, 64 bits"}, indent=2, sort_keys=True)
    folder = run / "evaluation" / hashlib.sha256(text.encode()).hexdigest()[:12]
    check_writable(folder)
    write_text(folder / "record.json", text + "\n")
    return folder


def draw_missing(
    pipe: Callable[..., Tensor],
    images: Sequence[ImageSpec],
    folder: Path,
    sampling: Sampling,
    *,
    batch_size: int,
    process: int = 0,
    processes: int = 1,
) -> None:
    """Generate the images that have no file yet, with progress and remaining time on stderr.

    Rounding depends on the shapes in a call. The batches are therefore cut by position, whatever files exist and
    however many processes there are: a continued evaluation makes exactly the images it would have made.

    Args:
        pipe: a `ssmgen.MaskToImage`.
        images: all images of the evaluation.
        folder: where they are kept.
        sampling: settings of sampling.
        batch_size: images in a call of the model.
        process: the number of this process; each one generates its share of the batches.
        processes: how many there are.
    """
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)][process::processes]
    with progress_bar(sum(map(len, batches)), "img", what="sampling", quiet=process > 0) as bar:
        for batch in batches:
            files = [folder / f"{image.name}.png" for image in batch]
            if not all(file.is_file() for file in files):
                masks = torch.stack([image.mask for image in batch]).long()  # three of uint8 would be colours
                seeds = [image.seed for image in batch]
                pixels = pipe(masks, seed=seeds, batch_size=batch_size, output_type="uint8", sampling=sampling)
                for file, image in zip(files, pixels, strict=True):
                    write_png(file, image)
            bar.update(len(batch))


def read_images(files: Sequence[Path]) -> Tensor:
    """The images, uint8 ``(count, 3, size, size)``."""
    return torch.stack([read_image(file) for file in files])
