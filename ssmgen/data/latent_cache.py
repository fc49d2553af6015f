"""A data set encoded once: latents and masks on disk, with a record of their origin."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from ssmgen.atomic import whole_folder
from ssmgen.data.labels import LabelSet
from ssmgen.data.pairs import Pairs
from ssmgen.signals import ignore_stop_requests
from ssmgen.weights import open_weights, write_weights

_SHARD = 1024
_RECORD = "cache.json"


def write_latent_cache(
    pairs: Pairs,
    autoencoder: Any,
    target: Path,
    *,
    flip: bool = False,
    batch_size: int = 16,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> None:
    """Encode every image once and write latents, masks and their record to a folder, which is complete or absent.

    Args:
        pairs: images and masks.
        autoencoder: one of `ssmgen.latents`.
        target: folder to create; must not exist.
        flip: also encode every image mirrored, for training with horizontal flips.
        batch_size: images encoded at a time.
        num_workers: processes that read (or draw) images. If ``device`` is a CPU they also encode them, each on one
            thread: next to an encoder on all cores they would compete with its threads, which wait for each other. 0
            does everything in this process, with all its threads.
        device: where to encode.
        progress: called with the number of images just encoded.

    Raises:
        FileExistsError: ``target`` exists.
        OSError: the disk is full or cannot be written; names ``target``.
        ValueError: the autoencoder returns latents that are not finite.
    """
    if target.exists():
        raise FileExistsError(f"{target}: exists already; a cache is written once")
    try:
        with whole_folder(target) as temporary:
            for shard, start in enumerate(range(0, len(pairs), _SHARD)):
                part: Any = Subset(pairs, range(len(pairs))[start : start + _SHARD])  # type: ignore[arg-type]
                batches = list(_encoded(part, _Encoder(autoencoder, flip, device), batch_size, num_workers, progress))
                tensors = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
                write_weights(temporary / f"shard-{shard:05d}.safetensors", tensors)
            record = cache_record(pairs, autoencoder, flip) | {"count": len(pairs)}
            (temporary / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
    except OSError:
        if not (target / _RECORD).is_file():
            raise  # otherwise another process was faster, and its equal copy stays


def cache_record(pairs: Pairs, autoencoder: Any, flip: bool) -> dict[str, Any]:
    """What identifies a cache: the autoencoder with its scale and shift, the source, and whether it holds flips."""
    return {"autoencoder": autoencoder.describe(), "source": pairs.fingerprint(), "flip": flip}


class LatentCache(Dataset[dict[str, Tensor]]):
    """Reads what `write_latent_cache` wrote, each example from disk when it is asked for.

    Args:
        root: the cache's folder.
        labels: the classes of the masks.
        expected: the `cache_record` that it must have; None accepts any.

    Raises:
        FileNotFoundError: no complete cache there.
        ValueError: its autoencoder, source or scale is another; names the difference.
    """

    def __init__(self, root: Path, labels: LabelSet, expected: dict[str, Any] | None = None) -> None:
        record_file = root / _RECORD
        if not record_file.is_file():
            raise FileNotFoundError(f"{record_file}: not found; {root} is no complete latent cache")
        self.record: dict[str, Any] = json.loads(record_file.read_text())
        for key, value in (expected or {}).items():
            if self.record.get(key) != value:
                raise ValueError(
                    f"{root}: made with {key} {self.record.get(key)}, but {value} is asked for: "
                    "delete the cache so that it is written again"
                )
        self.labels = labels
        self._swap = labels.swap_table()
        self._files = sorted(root.glob("shard-*.safetensors"))
        self._open: list[Any] = []

    def __len__(self) -> int:
        return self.record["count"]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        """``{"data": latent (channels, h, w) float32, "mask": labels (H, W) uint8}``.

        `ssmgen.training.train` asks for ``index, draw``, where draw is the epoch; the example does not depend on it.
        """
        index = key if isinstance(key, int) else key[0]
        return {"data": self._read("latents", index), "mask": self.mask(index)}

    def mask(self, index: int) -> Tensor:
        """The mask of an example, ``(H, W)`` uint8."""
        return self._read("masks", index)

    def flipped(self, index: int) -> dict[str, Tensor]:
        """The mirrored example, left and right labels swapped: ``data (channels, h, w)`` and ``mask (H, W)``."""
        if not self.record["flip"]:
            raise ValueError("this cache holds no mirrored latents: write it with flip=True")
        mask = self._swap[self.mask(index).flip(-1).long()]
        return {"data": self._read("latents_flipped", index), "mask": mask}

    def _read(self, key: str, index: int) -> Tensor:
        if not self._open:
            self._open = [open_weights(file) for file in self._files]
        shard, row = divmod(index, _SHARD)
        return self._open[shard].get_slice(key)[row]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": []}  # each loader process opens its own files


class _Encoder:
    """Turns a batch of pairs into what the cache keeps; loader processes may call it."""

    def __init__(self, autoencoder: Any, flip: bool, device: torch.device | str) -> None:
        self.autoencoder, self.flip, self.device = autoencoder, flip, torch.device(device)

    def __call__(self, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return self.encode(*default_collate(pairs))

    def encode(self, pixels: Tensor, masks: Tensor) -> dict[str, Tensor]:
        images = pixels.to(self.device).float() / 127.5 - 1
        batch = {"latents": self._latents(images), "masks": masks}
        if self.flip:
            batch["latents_flipped"] = self._latents(images.flip(-1))
        return batch

    def _latents(self, images: Tensor) -> Tensor:
        return self.autoencoder.encode(images).float().cpu().contiguous()


def _encoded(
    pairs: Any, encoder: _Encoder, batch_size: int, num_workers: int, progress: Callable[[int], None] | None
) -> Iterator[dict[str, Tensor]]:
    """The encoded batches in order; on a CPU the loader processes encode what they read."""
    in_loader = encoder.device.type == "cpu"
    loader: Any = DataLoader(
        pairs,
        batch_size,
        num_workers=num_workers,
        collate_fn=encoder if in_loader else default_collate,
        worker_init_fn=ignore_stop_requests,
    )
    for found in loader:
        batch = found if in_loader else encoder.encode(*found)
        if not all(bool(batch[key].isfinite().all()) for key in batch if key != "masks"):
            raise ValueError(
                f"{encoder.autoencoder.name}: its latents of the images are not finite: "
                "its weights are damaged, or those of another network"
            )
        if progress is not None:
            progress(len(batch["masks"]))
        yield batch
