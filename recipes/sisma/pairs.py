"""The image-mask pairs of a run: drawn or prepared, whole or encoded."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.sisma.arguments import UsageError, command_line
from recipes.sisma.prepare.splits import MIN_TEST_PAIRS, remedy, shortfall
from recipes.sisma.presets import ASSETS, Config
from recipes.sisma.told import check_told, training_words
from ssmgen import build
from ssmgen.data import (
    Crops,
    DrawnFaces,
    LabelSet,
    Pairs,
    PreparedFolder,
    class_weights,
    loss_weights,
    mirrored_contrasts,
    repeats,
)
from ssmgen.data.folder import load_splits
from ssmgen.data.latent_cache import LatentCache, cache_record, rebuild_latent_cache, write_latent_cache
from ssmgen.latents import autoencoder_at
from ssmgen.signals import ignore_stop_requests
from ssmgen.training import derived_seed, loader_processes, progress_bar
from ssmgen.training.launch import keep_freed_memory

# No training uses drawn faces from this index on: autoencoder, parser and generators are scored on them.
HELD_OUT = 10_000_000
_MOST_WORKERS = 16


def training_pairs(config: Config) -> Pairs:
    """Pairs to train on, images ``(3, height, width)`` uint8 and masks ``(height, width)`` uint8."""
    if config.data == "drawn":
        return DrawnFaces(config.drawn_count, size=_drawn_side(config))
    return prepared_pairs(config, "train", config.size)


def held_out_pairs(config: Config, count: int) -> Pairs:
    """Pairs that training does not see: ``count`` drawn ones, or the test split of the prepared folder."""
    if config.data == "drawn":
        return DrawnFaces(count, size=_drawn_side(config), start=HELD_OUT)
    return prepared_pairs(config, "test", config.size)


def _drawn_side(config: Config) -> int:
    if not isinstance(config.size, int):
        raise UsageError(f"image_size={config.image_size}: drawn faces are square: give a side such as 128")
    return config.size


def first_held_out(config: Config, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Images and masks of the first ``count`` pairs that training does not see, or of all if there are fewer."""
    pairs = held_out_pairs(config, count)
    images, masks = zip(*(pairs[i] for i in range(min(count, len(pairs)))), strict=True)
    return list(images), list(masks)


def prepared_pairs(config: Config, split: str, size: Any = None) -> PreparedFolder:
    """A split of the run's prepared folder; the error without one names the command that prepares it."""
    if not config.data:
        command = command_line("prepare", "source=...", "target=FOLDER", recipe=config.recipe)
        raise UsageError(f"preset {config.preset!r} needs data=FOLDER, made by: {command}")
    command = command_line("prepare", "source=DIR", f"target={Path(config.data)}", recipe=config.recipe)
    return PreparedFolder(config.data, split, size, hint=f"prepare one with {command}")


def in_memory(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """All pairs of one size: images ``(n, 3, height, width)`` and masks ``(n, height, width)``, uint8."""
    print(f"loading {len(pairs)} image-mask pairs", file=sys.stderr)
    workers = loader_processes(2)
    loader = DataLoader(cast(Any, pairs), 16, num_workers=workers, worker_init_fn=ignore_stop_requests)
    images, masks = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(masks)


def check_pairs(config: Config) -> LabelSet:
    """The classes of a run's data, after a check that it can be trained on, and evaluated and sampled afterwards.

    Raises:
        ValueError: too few test pairs, or buckets that do not fit the pairs of either split; says what to change.
        OSError: no prepared folder, or files missing from it.
    """
    check_told(config)
    pairs = training_pairs(config)
    if config.data == "drawn":
        return pairs.labels
    splits = load_splits(Path(config.data) / "splits.json")
    found = len(splits.get("test", ()))
    if found < (MIN_TEST_PAIRS if config.evaluate else 1 if config.sample_every != 0 else 0):
        instead = "evaluate=false" + ("" if found else " sample_every=0")
        advice = remedy(splits, pairs.record["source"].get("split", ""))
        raise ValueError(f"{config.data}: there is {shortfall(splits)}. {advice} Or train without: {instead}.")
    if config.evaluate or config.sample_every != 0:
        _check_held_out(config)
    return pairs.labels


def _check_held_out(config: Config) -> None:
    """Reject buckets that do not fit the unseen pairs, as those would be noticed only after training."""
    pairs = prepared_pairs(config, "test", config.size)  # checks every shape, from the headers of the files
    count = min(config.evaluate_masks, len(pairs))
    shapes = {pairs.bucket_of(index) for index in range(count)}
    if config.evaluate and len(shapes) == count > 1:
        raise ValueError(
            f"{config.data}: no two of the first {count} test pairs get the same size of image_size="
            f"{config.image_size}, and an evaluation compares images of one size: name fewer sizes, give a larger "
            "evaluate_masks=, or train without: evaluate=false"
        )


def load_autoencoder(config: Config) -> Any:
    """The autoencoder of a run; if its class is ``auto``, the one that its source names.

    Raises:
        FileNotFoundError: no such source.
        ValueError: the source is of another class than asked for, or damaged.
    """
    if config.autoencoder == "identity":
        return build("identity")
    source = str(ASSETS / "drawn-autoencoder") if config.autoencoder_source == "drawn" else config.autoencoder_source
    return build(autoencoder_at(source) if config.autoencoder == "auto" else config.autoencoder, source=source)


class EncodedPairs(Dataset[dict[str, Any]]):
    """Examples for training from a latent cache, those with rare classes more than once.

    An example is ``{"data": latent, "mask": labels}``, with ``class_weighting`` also ``"weight"``, the factor of its
    error by the rarity of its classes, with ``mirrored_weighting`` also ``"contrasts"`` between left and right, and
    with ``style`` and ``words`` the values of these conditions. A coin derived from (seed, index, draw) decides whether
    it is mirrored.
    """

    def __init__(self, cache: LatentCache, config: Config) -> None:
        self.cache, self.flip, self.seed = cache, config.flip, config.train.seed
        self.examples = [(index, 0) for index in range(len(cache))]
        if config.balance:
            self.examples = repeats(self._masks(), config.balance, self.seed)
        self.style = config.style
        self.attributes = training_pairs(config).attributes if config.words else None  # type: ignore[attr-defined]
        self.mirrored = cache.labels.mirrored
        self.mirrored_weighting = config.mirrored_weighting if self.mirrored else 0.0
        self.class_weights = None
        if config.class_weighting:
            self.class_weights = class_weights(self._masks(), len(cache.labels), config.class_weighting)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        position, draw = key
        index, before = self.examples[position]
        mirrored = self.flip and derived_seed(self.seed, "flip", index, draw, before) % 2
        example: dict[str, Any] = self.cache.flipped(index) if mirrored else self.cache[index]
        masks, (height, width) = example["mask"].unsqueeze(0), example["data"].shape[-2:]
        if self.class_weights is not None:
            example["weight"] = loss_weights(masks, self.class_weights, (height, width))[0]
        if self.mirrored_weighting:
            of_pairs = mirrored_contrasts(masks, self.mirrored, (height, width), self.mirrored_weighting)
            example["contrasts"] = of_pairs[0]
        if self.style:
            own = {"latents": example["data"], "mask": example["mask"]}
            example["style"] = {"latents": example["data"]} if self.style == "whole" else own
        if self.attributes is not None:
            example["words"] = training_words(self.attributes(index), self.seed, index, draw)
        return example

    def bucket_of(self, position: int) -> int:
        """The bucket of an example, see `ssmgen.data.LatentCache.bucket_of`."""
        return self.cache.bucket_of(self.examples[position][0])

    def sizes(self) -> dict[tuple[int, int], int]:
        """The number of examples of each size (height, width), repeated ones included."""
        counts = Counter(map(self.bucket_of, range(len(self))))
        of_bucket = {self.cache.bucket_of(index): index for index in range(len(self.cache))}
        return {tuple(self.cache.mask(of_bucket[bucket]).shape): count for bucket, count in counts.items()}

    def _masks(self) -> Iterator[Tensor]:
        return (self.cache.mask(index) for index in range(len(self.cache)))


def encoded_pairs(config: Config, autoencoder: Any, verify: bool = True) -> EncodedPairs:
    """The training pairs from the cache on disk, which is written first if it is missing.

    Args:
        config: the run's settings.
        autoencoder: see `load_autoencoder`.
        verify: compare the prepared files and the cache with their recorded hashes. One process of a machine suffices.

    Raises:
        CacheError: the cache is damaged, and ``rebuild_cache`` was not asked for.
        ValueError: a prepared file was replaced, or the latents are not finite.
    """
    pairs = pairs_to_encode(config)
    if verify:
        _check_files(pairs, Path(config.cache))
    record = cache_record(pairs, autoencoder, config.flip)
    key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
    target = Path(config.cache) / key
    if not target.exists():
        print(f"encoding {len(pairs)} images once into {target}", file=sys.stderr)
        _encode(write_latent_cache, pairs, autoencoder, target, config.flip)
    elif config.rebuild_cache and verify:
        _encode(rebuild_latent_cache, pairs, autoencoder, target, config.flip)
    hint = "add rebuild_cache=true, which encodes damaged files again"
    return EncodedPairs(LatentCache(target, pairs.labels, record, verify=verify, hint=hint), config)


def pairs_to_encode(config: Config) -> Pairs:
    """The training pairs, or ``crops`` of each of them."""
    if config.crops == 1:
        return training_pairs(config)
    if config.data == "drawn":
        raise UsageError("crops= is for a prepared folder; drawn faces are unlimited: set drawn_count= instead")
    source = None if isinstance(config.size, int) else "whole"  # None: the largest square of each picture
    return Crops(prepared_pairs(config, "train", source), config.size, config.crops, seed=config.train.seed)


def _check_files(pairs: Pairs, cache: Path) -> None:
    """Reject prepared files that were replaced; those unchanged since the last check are not read again."""
    source = pairs.pairs if isinstance(pairs, Crops) else pairs
    if isinstance(source, PreparedFolder):
        place = hashlib.sha256(f"{source.root.resolve()} {source.split}".encode()).hexdigest()[:16]
        source.check_files(cache / f"{place}-files.json")


def _encode(how: Callable[..., Any], pairs: Pairs, autoencoder: Any, target: Path, flip: bool) -> None:
    """Call `write_latent_cache` or `rebuild_latent_cache` with a progress bar and a loader process per core."""
    device = next(autoencoder.parameters(), torch.empty(0)).device
    if device.type == "cpu":
        keep_freed_memory()
    # On a CPU each of them encodes on one core, with the memory of one network's activations.
    workers = loader_processes(_MOST_WORKERS)
    with progress_bar(len(pairs), "img") as bar:
        how(pairs, autoencoder, target, flip=flip, device=device, num_workers=workers, progress=bar.update)
