"""A data set encoded once: latents and masks on disk, with a record of their origin and of every file.

    cache.json                  format, autoencoder, source, flip, count, extras, the shards, and a checksum of all that
    shard-00000.safetensors     latents, masks and, with flip, latents_flipped of 1024 pairs; extra.NAME of each extra
    shard-00001.safetensors     ...

A shard holds pairs of one shape; the record lists which, and the shape of their latents.

`write_latent_cache` writes it, `LatentCache` verifies and reads it, `rebuild_latent_cache` mends it.
"""

import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssmgen.atomic import remove_folder, whole_folder
from ssmgen.data.cache_files import (
    PATTERN,
    RECORD,
    check_origin,
    examples_of,
    open_shards,
    read_record,
    unrecorded,
    upgraded,
    write_record,
)
from ssmgen.data.encoding import MIRRORED, Encoder, Encoding
from ssmgen.data.labels import LabelSet
from ssmgen.data.pairs import Pairs
from ssmgen.data.shards import EXTRA, CacheError, Shard
from ssmgen.data.texts import collate

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
        pairs: images and masks. With a method ``bucket_of``, pairs of different buckets may have different shapes. A
            pair may have a third part, a mapping of named tensors (extras) to be kept beside latent and mask, such as
            the features of a text. Every pair needs the same names: identifiers other than data, mask and ends. An
            extra may differ between pairs in its first dimension. A mirrored example has the same extras, unless there
            is one called ``NAME.mirrored`` for it.
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
        ValueError: the autoencoder returns latents that are not finite, pairs of one bucket have several shapes, or
            extras do not agree or cannot be kept. A fault of the first pairs is found before anything is written.
    """
    if target.exists():
        raise FileExistsError(f"{target}: exists already; a cache is written once")
    encoding = Encoding(pairs, Encoder(autoencoder, flip, device), batch_size, num_workers, progress)
    try:
        with whole_folder(target) as temporary:
            shards: list[dict[str, Any]] = []
            for part in _parts(pairs):
                file = temporary / f"shard-{len(shards):05d}.safetensors"
                shards.append(encoding.write(file, part, target, 0 if shards else len(pairs)))
            record = cache_record(pairs, autoencoder, flip) | {"count": len(pairs)}
            write_record(temporary, record | {"extras": encoding.extras or [], "shards": shards})
    except OSError:
        if not (target / RECORD).is_file():
            raise  # otherwise another process got there first, and its equal copy stays


def _parts(pairs: Pairs) -> Iterator[Sequence[int]]:
    """The examples of each shard: those of one bucket, in order."""
    groups: dict[int, list[int]] = {}
    bucket_of = getattr(pairs, "bucket_of", lambda index: 0)
    for index in range(len(pairs)):
        groups.setdefault(bucket_of(index), []).append(index)
    for _, group in sorted(groups.items()):
        for start in range(0, len(group), _SHARD):
            yield group[start : start + _SHARD]


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
    encoding = Encoding(pairs, Encoder(autoencoder, flip, device), batch_size, num_workers, progress)
    try:
        record = read_record(target)
        check_origin(target, record, cache_record(pairs, autoencoder, flip))
        if "shards" not in record or record["count"] != len(pairs):
            raise CacheError(f"{target / RECORD}: does not list the shards of these {len(pairs)} pairs")
        examples = examples_of(target, record)
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
    encoding.extras = record.get("extras", [])
    return _mend(target, record, examples, encoding)


def _mend(root: Path, record: dict[str, Any], examples: list[Sequence[int]], encoding: Encoding) -> list[Path]:
    written = []
    for number, (entry, part) in enumerate(zip(record["shards"], examples, strict=True)):
        file = root / entry["file"]
        try:
            Shard(file, entry["bytes"], entry["sha256"]).verify()
        except CacheError as error:
            print(f"{error}: it is encoded again", file=sys.stderr)
            new = encoding.write(file, part, file, len(part))
            written.append(file)
            if (new["bytes"], new["sha256"]) != (entry["bytes"], entry["sha256"]):
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

    Attributes:
        extras: names of the tensors that examples have beside ``data`` and ``mask``.

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
            if "shards" not in self.record:
                self.record, verify = upgraded(root, self.record), False
            self._shards = open_shards(root, self.record, verify)
            self._place = _places(examples_of(root, self.record))
        except CacheError as error:
            raise self._with_fix(error) from error
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}. Delete {root} so that it is written again, or: {hint}") from error
        self.extras = tuple(name for name in self.record.get("extras", []) if not name.endswith(MIRRORED))
        shapes = [(shard.shapes()["latents"][1:], shard.shapes()["masks"][1:]) for shard in self._shards]
        distinct = list(dict.fromkeys(shapes))
        self._bucket = [distinct.index(shape) for shape in shapes]
        self._swap = labels.swap_table()
        self._ends = list(accumulate(shard.count for shard in self._shards))
        self._open: list[int] = []

    def __len__(self) -> int:
        return self.record["count"]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        """``{"data": latent (channels, h, w) float32, "mask": labels (H, W) uint8}``, and the extras by name.

        `ssmgen.training.train` asks for ``index, draw``, where draw is the epoch; the example does not depend on it.

        Raises:
            CacheError: a file was truncated or replaced after the cache was opened; names it.
        """
        index = key if isinstance(key, int) else key[0]
        extras = {name: self._read(EXTRA + name, index) for name in self.extras}
        return {"data": self._read("latents", index), "mask": self.mask(index)} | extras

    def collate(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of examples; extras ``(m, width)`` of several lengths are padded, see `ssmgen.data.texts.collate`."""
        return collate(examples)

    def mask(self, index: int) -> Tensor:
        """The mask of an example, ``(H, W)`` uint8."""
        return self._read("masks", index)

    def bucket_of(self, index: int) -> int:
        """Number of an example's shape: equal for examples whose latents and masks have equal shapes."""
        return self._bucket[self._shard_of(index)[0]]

    def flipped(self, index: int) -> dict[str, Tensor]:
        """The mirrored example, left and right labels swapped: ``data (channels, h, w)`` and ``mask (H, W)``.

        Its extras are those of the example, or those written for it as ``NAME.mirrored``.
        """
        if not self.record["flip"]:
            raise ValueError("this cache holds no mirrored latents: write it with flip=True")
        mask = self._swap[self.mask(index).flip(-1).long()]
        own = {name: name + MIRRORED if name + MIRRORED in self.record["extras"] else name for name in self.extras}
        extras = {name: self._read(EXTRA + key, index) for name, key in own.items()}
        return {"data": self._read("latents_flipped", index), "mask": mask} | extras

    def _shard_of(self, index: int) -> tuple[int, int]:
        """Number of the shard that holds an example, and the row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        place = self._place[index]
        number = bisect_right(self._ends, place)
        return number, place - self._ends[number] + self._shards[number].count

    def _read(self, key: str, index: int) -> Tensor:
        number, row = self._shard_of(index)
        if number not in self._open:
            if len(self._open) == _MOST_OPEN:
                self._shards[self._open.pop(0)].close()
            self._open.append(number)
        try:
            return self._shards[number].row(key, row)
        except CacheError as error:
            raise self._with_fix(error) from error

    def _with_fix(self, error: CacheError) -> CacheError:
        end = "\n" if "\n" in str(error) else ". "  # below a list of files
        return CacheError(f"{error}{end}Delete the cache {self.root} so that it is written again, or: {self.hint}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": []}  # each loader process opens its own files


def _places(examples: list[Sequence[int]]) -> Sequence[int]:
    """Where each example is among the rows of all shards, one after the other."""
    rows = [example for each in examples for example in each]
    if rows == list(range(len(rows))):
        return range(len(rows))
    places = array("q", bytes(8 * len(rows)))
    for place, example in enumerate(rows):
        places[example] = place
    return places
