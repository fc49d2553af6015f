"""A data set encoded once: latents and masks on disk, with a record of their origin and of every file.

    cache.json                  format, autoencoder, source, flip, count, the shards, and a checksum of all that
    shard-00000.safetensors     latents, masks and, with flip, latents_flipped of 1024 pairs
    shard-00001.safetensors     ...

`write_latent_cache` writes it, `LatentCache` verifies and reads it, `rebuild_latent_cache` mends it.
"""

import sys
from bisect import bisect_right
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from ssmgen.atomic import check_space, remove_folder, whole_folder
from ssmgen.data.cache_files import (
    FORMAT,
    PATTERN,
    RECORD,
    check_origin,
    entry_of,
    open_shards,
    read_record,
    unrecorded,
    upgraded,
    write_record,
)
from ssmgen.data.labels import LabelSet
from ssmgen.data.pairs import Pairs
from ssmgen.data.shards import CacheError, Shard
from ssmgen.signals import ignore_stop_requests
from ssmgen.weights import write_weights

_SHARD = 1024
_MOST_OPEN = 128  # files at a time; many systems allow a process 1024


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
        OSError: the disk is full, or will be by the size of the first batch, or cannot be written; names ``target``.
        ValueError: the autoencoder returns latents that are not finite.
    """
    if target.exists():
        raise FileExistsError(f"{target}: exists already; a cache is written once")
    encoding = _Encoding(pairs, _Encoder(autoencoder, flip, device), batch_size, num_workers, progress)
    try:
        with whole_folder(target) as temporary:
            shards: list[dict[str, Any]] = []
            for start in range(0, len(pairs), _SHARD):
                file = temporary / f"shard-{len(shards):05d}.safetensors"
                part = range(len(pairs))[start : start + _SHARD]
                shards.append(encoding.write(file, part, target, len(pairs) if start == 0 else 0))
            write_record(temporary, cache_record(pairs, autoencoder, flip) | {"count": len(pairs), "shards": shards})
    except OSError:
        if not (target / RECORD).is_file():
            raise  # otherwise another process got there first, and its equal copy stays


def rebuild_latent_cache(
    pairs: Pairs,
    autoencoder: Any,
    target: Path,
    *,
    flip: bool = False,
    batch_size: int = 16,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Encode the damaged and missing shards of a cache again, or the whole cache if its record is damaged.

    Where the encoder is deterministic, the new files equal the former ones. A difference is reported on stderr. Shards
    that are not recorded are deleted.

    Args:
        pairs, autoencoder, target, flip, batch_size, num_workers, device, progress: as in `write_latent_cache`. Another
            ``batch_size`` or device may give other bits.

    Returns:
        The files that were written.

    Raises:
        ValueError: the cache has another source or autoencoder, or as in `write_latent_cache`.
        OSError: as in `write_latent_cache`.
    """
    encoding = _Encoding(pairs, _Encoder(autoencoder, flip, device), batch_size, num_workers, progress)
    try:
        record = read_record(target)
        check_origin(target, record, cache_record(pairs, autoencoder, flip))
        if record.get("format") != FORMAT or record["count"] != len(pairs):
            raise CacheError(f"{target / RECORD}: does not list the shards of these {len(pairs)} pairs")
    except (CacheError, FileNotFoundError) as error:
        print(f"{error}: all of it is encoded again", file=sys.stderr)
        if target.exists():
            remove_folder(target)
        arguments: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
        arguments |= {"device": device, "progress": progress}
        write_latent_cache(pairs, autoencoder, target, flip=flip, **arguments)
        return sorted(target.glob(PATTERN))
    for file in unrecorded(target, record):
        file.unlink()
    return _mend(target, record, encoding)


def _mend(root: Path, record: dict[str, Any], encoding: "_Encoding") -> list[Path]:
    written, start = [], 0
    for number, entry in enumerate(record["shards"]):
        part, start = range(start, start + entry["count"]), start + entry["count"]
        file = root / entry["file"]
        try:
            Shard(file, entry["bytes"], entry["sha256"]).verify()
        except CacheError as error:
            print(f"{error}: it is encoded again", file=sys.stderr)
            new = encoding.write(file, part, file, len(part))
            written.append(file)
            if new != entry:
                print(f"{file}: its bytes differ from the former ones: a resumed run is not exact", file=sys.stderr)
                record["shards"][number] = new
                write_record(root, record)
    return written


def cache_record(pairs: Pairs, autoencoder: Any, flip: bool) -> dict[str, Any]:
    """What identifies a cache: the autoencoder with its scale and shift, the source, and whether it holds flips."""
    return {"autoencoder": autoencoder.describe(), "source": pairs.fingerprint(), "flip": flip}


class LatentCache(Dataset[dict[str, Tensor]]):
    """Reads what `write_latent_cache` wrote, each example from disk when it is asked for.

    Opening verifies the hash of every file, in threads. Loader processes do not verify again: they compare size and
    date of the files they open with those of the verified ones.

    Args:
        root: the cache's folder.
        labels: the classes of the masks.
        expected: the `cache_record` that it must have; None accepts any.
        verify: hash every shard. False suits further processes of one machine, if one of them verifies.
        hint: how to rebuild the cache, for errors about damaged files; by default a call of `rebuild_latent_cache`.

    Raises:
        FileNotFoundError: no complete cache there.
        CacheError: a file is damaged, missing or additional; names it. A `ValueError`.
        ValueError: its autoencoder, source or scale is another; names the difference.
    """

    def __init__(
        self,
        root: Path,
        labels: LabelSet,
        expected: dict[str, Any] | None = None,
        *,
        verify: bool = True,
        hint: str = "rebuild_latent_cache encodes damaged shards again",
    ) -> None:
        self.root, self.labels, self.hint = root, labels, hint
        try:
            self.record: dict[str, Any] = read_record(root)
            check_origin(root, self.record, expected or {})
            if self.record.get("format") != FORMAT:
                self.record, verify = upgraded(root, self.record), False
            self._shards = open_shards(root, self.record, verify)
        except CacheError as error:
            raise self._with_fix(error) from error
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}. Delete {root} so that it is written again, or: {hint}") from error
        self._swap = labels.swap_table()
        self._ends = list(accumulate(shard.count for shard in self._shards))
        self._open: list[int] = []

    def __len__(self) -> int:
        return self.record["count"]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        """``{"data": latent (channels, h, w) float32, "mask": labels (H, W) uint8}``.

        `ssmgen.training.train` asks for ``index, draw``, where draw is the epoch; the example does not depend on it.

        Raises:
            CacheError: a file was truncated or replaced after the cache was opened; names it.
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
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        shard = self._shards[number]
        if number not in self._open:
            if len(self._open) == _MOST_OPEN:
                self._shards[self._open.pop(0)].close()
            self._open.append(number)
        try:
            return shard.row(key, index - self._ends[number] + shard.count)
        except CacheError as error:
            raise self._with_fix(error) from error

    def _with_fix(self, error: CacheError) -> CacheError:
        end = "\n" if "\n" in str(error) else ". "  # below a list of files
        return CacheError(f"{error}{end}Delete the cache {self.root} so that it is written again, or: {self.hint}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": []}  # each loader process opens its own files


@dataclass
class _Encoding:
    """What encodes the pairs of a shard, and how."""

    pairs: Pairs
    encoder: "_Encoder"
    batch_size: int
    num_workers: int
    progress: Callable[[int], None] | None

    def write(self, file: Path, part: range, target: Path, images: int) -> dict[str, Any]:
        """Encode a part of the pairs into a shard and return its entry in the record.

        By the size of the first batch, there must be space for ``images`` images (0: unchecked) where ``target`` is.
        """
        batches: list[dict[str, Tensor]] = []
        with closing(_encoded(Subset(self.pairs, part), self)) as found:  # type: ignore[arg-type]
            for batch in found:
                if not batches:
                    size = sum(tensor.nbytes for tensor in batch.values()) // len(batch["masks"])
                    check_space(target, size * images)
                batches.append(batch)
        write_weights(file, {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]})
        return entry_of(file, len(part))


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


def _encoded(pairs: Any, how: _Encoding) -> Generator[dict[str, Tensor]]:
    """The encoded batches in order; on a CPU the loader processes encode what they read. They end with it."""
    in_loader = how.encoder.device.type == "cpu"
    loader: Any = DataLoader(
        pairs,
        how.batch_size,
        num_workers=how.num_workers,
        collate_fn=how.encoder if in_loader else default_collate,
        worker_init_fn=ignore_stop_requests,
    )
    iterator = iter(loader)
    try:
        for found in iterator:
            batch = found if in_loader else how.encoder.encode(*found)
            if not all(bool(batch[key].isfinite().all()) for key in batch if key != "masks"):
                raise ValueError(
                    f"{how.encoder.autoencoder.name}: its latents of the images are not finite: "
                    "its weights are damaged, or those of another network"
                )
            if how.progress is not None:
                how.progress(len(batch["masks"]))
            yield batch
    finally:
        del iterator  # ends its processes at once; the frames of an error would keep them alive
