"""Pairs encoded for a latent cache: images become latents, masks stay labels, extras are kept as they are."""

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ssmgen.atomic import check_space
from ssmgen.data.cache_files import entry_of
from ssmgen.data.shards import DTYPES, ENDS, EXTRA
from ssmgen.signals import ignore_stop_requests
from ssmgen.weights import write_weights

#: Suffix of an extra that replaces the one without it in a mirrored example.
MIRRORED = ".mirrored"
_EXTRA_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.mirrored)?")
# Keys of an example, and the suffix of the tensor that says where the parts of an extra end.
_TAKEN = {"data", "mask", ENDS.removeprefix(".")}

#: What the cache keeps of some pairs: tensors with one row per pair, and for each extra a list of one tensor per pair.
Encoded = dict[str, Any]


@dataclass
class Encoding:
    """What encodes the pairs of a shard, and how."""

    pairs: Any
    encoder: "Encoder"
    batch_size: int
    num_workers: int
    progress: Callable[[int], None] | None
    extras: list[str] | None = None  # their names, known when the first shard is written

    def write(self, file: Path, part: Sequence[int], target: Path, images: int) -> dict[str, Any]:
        """Encode a part of the pairs, all of one shape, into a shard and return its entry in the record.

        By the size of the first batch, there must be space for ``images`` images (0: unchecked) where ``target`` is.
        """
        batches: list[Encoded] = []
        with closing(_encoded(Subset(self.pairs, part), self)) as found:
            for batch in found:
                if not batches:
                    self.extras = self.extras if self.extras is not None else extras_of(batch)
                    _check_names(self.extras, extras_of(batch))
                    size = sum(_bytes(value) for value in batch.values()) // len(batch["masks"])
                    check_space(target, size * images)
                _check_alike(batches[0] if batches else batch, batch)
                batches.append(batch)
        write_weights(file, packed(batches))
        return entry_of(file, part, batches[0]["latents"].shape[1:])


class Encoder:
    """Turns a list of pairs into what the cache keeps; loader processes may call it."""

    def __init__(self, autoencoder: Any, flip: bool, device: torch.device | str) -> None:
        self.autoencoder, self.flip, self.device = autoencoder, flip, torch.device(device)

    def __call__(self, pairs: list[Any]) -> Encoded:
        return self.encode(*collated(pairs))

    def encode(self, pixels: Tensor, masks: Tensor, extras: Mapping[str, list[Tensor]]) -> Encoded:
        """What the cache keeps of images ``(n, 3, h, w)`` uint8, masks ``(n, H, W)`` and extras, lists of n tensors."""
        images = pixels.to(self.device).float() / 127.5 - 1
        batch = {"latents": self._latents(images), "masks": masks}
        if self.flip:
            batch["latents_flipped"] = self._latents(images.flip(-1))
        return batch | {EXTRA + name: values for name, values in extras.items()}

    def _latents(self, images: Tensor) -> Tensor:
        return self.autoencoder.encode(images).float().cpu().contiguous()


def collated(pairs: list[Any]) -> tuple[Tensor, Tensor, dict[str, list[Tensor]]]:
    """Images ``(n, 3, h, w)``, masks ``(n, h, w)`` and extras, lists of n tensors, of n pairs with or without extras.

    Raises:
        ValueError: images of several shapes or without pixels, extras with other names in some pairs, a name that
            cannot be used, or a value or a dtype that a cache cannot hold.
    """
    images, masks, *extras = zip(*pairs, strict=True)
    _check_shapes(images)
    _check_shapes(masks)
    given: tuple[Mapping[str, Any], ...] = extras[0] if extras else ({},) * len(images)
    names = sorted(given[0])
    for each in given:
        _check_names(names, sorted(each))
    for name in names:
        if _EXTRA_NAME.fullmatch(name) is None or name in _TAKEN or name.removesuffix(MIRRORED) not in names:
            raise ValueError(
                f"an extra cannot be called {name!r}: expected an identifier other than data, mask and ends, or the "
                f"name of another extra followed by {MIRRORED}"
            )
    kept = {name: [_tensor(name, each[name]) for each in given] for name in names}
    return torch.stack(images), torch.stack([_kept("masks", mask) for mask in masks]), kept


def _tensor(name: str, value: Any) -> Tensor:
    """An extra as a tensor that can be read from a shard.

    Raises:
        ValueError: it cannot become one; names the extra.
    """
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"extra {name!r}: cannot become a tensor ({error}): give numbers, arrays or tensors"
        ) from error
    return _kept(f"extra {name!r}", tensor)


def _kept(what: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in DTYPES.values() or tensor.layout is not torch.strided:
        sparse = "" if tensor.layout is torch.strided else f" and the layout {tensor.layout}"
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
        raise ValueError(f"{what}: has the dtype {tensor.dtype}{sparse}; convert it to a dense tensor of {known}")
    return tensor


def _check_shapes(tensors: Sequence[Tensor]) -> None:
    shapes = list(dict.fromkeys(tuple(each.shape) for each in tensors))
    if len(shapes) > 1:
        raise ValueError(
            f"the pairs of one bucket have the shapes {shapes[0]} and {shapes[1]}: scale them to one size, or give "
            "each shape its own bucket with a method bucket_of(index), see ssmgen.data.Pairs"
        )
    if 0 in shapes[0]:
        raise ValueError(f"a pair has the shape {shapes[0]}: expected at least one pixel")


def _check_names(first: list[str], other: list[str]) -> None:
    if first != other:
        raise ValueError(f"pairs have different extras, {first} and {other}: every pair needs the same")


def packed(batches: Sequence[Encoded]) -> dict[str, Tensor]:
    """The tensors of a shard: one row per pair of batches that agree, see `_check_alike`.

    An extra whose shape differs between pairs in the first dimension only is concatenated along it, and a tensor
    ``NAME.ends`` int64 ``(rows,)`` says where each pair's part ends.
    """
    tensors: dict[str, Tensor] = {}
    for key in batches[0]:
        if key.startswith(EXTRA):
            tensors |= _rows(key, [value for batch in batches for value in batch[key]])
        else:
            tensors[key] = torch.cat([batch[key] for batch in batches])
    return tensors


def extras_of(batch: Mapping[str, Any]) -> list[str]:
    """Names of the extras of an encoded batch, or of the tensors of a shard."""
    return sorted(key.removeprefix(EXTRA) for key in batch if key.startswith(EXTRA))


def _check_alike(first: Encoded, other: Encoded) -> None:
    """Check each batch of a shard as it comes, so that a pair that does not fit costs no further encoding.

    Raises:
        ValueError: a batch has other extras or shapes than the first, or an extra that differs in more than its first
            dimension.
    """
    _check_names(extras_of(first), extras_of(other))
    for key, values in other.items():
        if not key.startswith(EXTRA):
            _check_shapes([first[key][0], values[0]])
            continue
        unlike = [value for value in values if _kind(value) != _kind(first[key][0])]
        if unlike or 0 in first[key][0].shape[1:]:
            found = " and ".join(f"{value.dtype} {tuple(value.shape)}" for value in (first[key][0], *unlike[:1]))
            raise ValueError(
                f"extra {key.removeprefix(EXTRA)!r}: pairs of one bucket need one dtype, and one shape except for the "
                f"first dimension, without empty ones after it; found {found}"
            )


def _rows(key: str, values: list[Tensor]) -> dict[str, Tensor]:
    if len({value.shape for value in values}) == 1 and 0 not in values[0].shape:
        return {key: torch.stack(values)}
    ends = torch.tensor([len(value) for value in values]).cumsum(0)
    return {key: torch.cat(values), key + ENDS: ends}


def _kind(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, value.dim(), value.shape[1:]


def _bytes(value: Tensor | list[Tensor]) -> int:
    return value.nbytes if isinstance(value, Tensor) else sum(each.nbytes for each in value)


def _encoded(pairs: Any, how: Encoding) -> Generator[Encoded]:
    """The encoded batches in order; on a CPU the loader processes encode what they read. They end with it."""
    in_loader = how.encoder.device.type == "cpu"
    loader: Any = DataLoader(
        pairs,
        how.batch_size,
        num_workers=how.num_workers,
        collate_fn=how.encoder if in_loader else collated,
        worker_init_fn=ignore_stop_requests,
    )
    iterator = iter(loader)
    try:
        for found in iterator:
            batch = found if in_loader else how.encoder.encode(*found)
            _check_finite(batch, how.encoder.autoencoder)
            if how.progress is not None:
                how.progress(len(batch["masks"]))
            yield batch
    finally:
        del iterator  # ends its processes at once; the frames of an error would keep them alive


def _check_finite(batch: Encoded, autoencoder: Any) -> None:
    for key, value in batch.items():
        if key.startswith(EXTRA):
            if not all(bool(each.isfinite().all()) for each in value):
                raise ValueError(f"extra {key.removeprefix(EXTRA)!r}: has values that are not finite")
        elif key != "masks" and not bool(value.isfinite().all()):
            raise ValueError(
                f"{autoencoder.name}: its latents of the images are not finite: "
                "its weights are damaged, or those of another network"
            )
