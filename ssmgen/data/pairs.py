"""The interface of every data set of image-mask pairs, your own folder of pairs, and crops of other pairs."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import Dataset

from ssmgen.data.buckets import Shape, Size, Sizing, parse_size
from ssmgen.data.files import pair_files
from ssmgen.data.hashes import file_hashes
from ssmgen.data.images import read_image, read_mask
from ssmgen.data.labels import LabelSet
from ssmgen.data.transforms import crop_resize


class Pairs(Protocol):
    """A data set of image-mask pairs: `DrawnFaces`, `PreparedFolder`, `PairFolder`, `Crops`, or your own class.

    Two additions are optional. A method ``bucket_of(index) -> int`` groups pairs by shape; without it all have one. A
    pair may have a third part, a mapping of named tensors, which a latent cache keeps, see
    `ssmgen.data.write_latent_cache`.

    Attributes:
        labels: the classes of the masks.
    """

    labels: LabelSet

    def __len__(self) -> int:
        """Number of pairs."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image ``(3, height, width)`` uint8 RGB and mask ``(height, width)`` uint8 class ids."""

    def fingerprint(self) -> str:
        """A string that is equal only for equal data, extras included: a latent cache and a run record it."""


class PairFolder(Dataset[tuple[Tensor, Tensor]]):
    """Image-mask pairs of a plain folder with your own classes, matched by name; it needs no preparation.

    Args:
        root: folder with ``images/`` and ``masks/`` that hold files of the same names, or with ``x.jpg`` beside
            ``x.png``. Masks are PNG files of class ids (8-bit grey or palette indices) or of the colours of ``labels``.
        labels: the classes of the masks.
        size: side, or ``(height, width)``, to which both are centre-cropped and resized; None keeps the largest square.
            A list of (height, width), the buckets: each pair gets that with the nearest aspect ratio. ``"whole"`` crops
            and resizes nothing.
        index: JSON file in which `fingerprint` remembers the hashes of unchanged files, see
            `ssmgen.data.hashes.file_hashes`; None reads every file each time.

    Attributes:
        ids: file names of the pairs without suffix, sorted.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no pairs, files without a partner (all are listed), or a size or buckets that do not fit, see
            `ssmgen.data.buckets.Sizing`.
    """

    def __init__(
        self,
        root: str | Path,
        labels: LabelSet,
        size: Size = None,
        index: str | Path | None = None,
    ) -> None:
        self.root, self.labels = Path(root).expanduser(), labels
        self.index = Path(index).expanduser() if index else None
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: no such folder")
        images, masks = self.root / "images", self.root / "masks"
        if not images.is_dir() and not masks.is_dir():
            images = masks = self.root
        self._files, problems = pair_files(images, masks)
        if problems:
            lines = [f"  {file}: {reason}" for file, reason in problems]
            raise ValueError(f"{self.root}: {len(problems)} file(s) have no partner:\n" + "\n".join(lines))
        if not self._files:
            raise ValueError(
                f"{self.root}: no pairs: expected images/ and masks/ with files of the same names, or x.jpg and x.png"
            )
        self.ids = list(self._files)
        self._sizing = Sizing(size, self.mask_files())
        self.size = self._sizing.size

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image ``(3, h, w)`` uint8 RGB and mask ``(h, w)`` uint8.

        Raises:
            ValueError: a file is damaged, the aspect ratios of the two differ, or the mask has a label outside the set;
                the message names the file.
        """
        image, mask = self._files[self.ids[index]]
        pixels, ids = read_image(image), read_mask(mask, self.labels)
        try:
            return self._sizing.fitted(index, pixels, ids)
        except ValueError as error:
            raise ValueError(f"{image} and {mask}: {error}") from error

    def bucket_of(self, index: int) -> int:
        """Index of a pair's bucket, 0 if there is one size."""
        return self._sizing.bucket_of(index)

    def mask_files(self) -> list[Path]:
        """The files of the masks, one per pair."""
        return [mask for _, mask in self._files.values()]

    def fingerprint(self) -> str:
        """SHA-256 of all file contents, the classes and the size: equal only for equal data."""
        digest = hashlib.sha256(json.dumps([self.labels.classes, self.size]).encode())
        names = {id: [file.relative_to(self.root).as_posix() for file in files] for id, files in self._files.items()}
        hashes = file_hashes(self.root, [name for pair in names.values() for name in pair], self.index)
        for id, pair in names.items():
            digest.update(id.encode())
            for name in pair:
                digest.update(bytes.fromhex(hashes[name]))
        return digest.hexdigest()


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """``count`` crops of every pair, to get more data from a small set: the centre, then random parts.

    Pair ``i`` of the source becomes items ``i * count`` to ``(i + 1) * count - 1``.

    Args:
        pairs: image-mask pairs, larger than ``size`` so that no crop is enlarged.
        size: side, or ``(height, width)``, of the results in pixels; or a list of (height, width), the buckets, for a
            `PairFolder` or `PreparedFolder` of ``size="whole"``: each pair's crops have the nearest aspect ratio.
        count: crops per pair.
        smallest: smallest side of a crop, as a share of that of the largest crop of this shape, in (0, 1].
        seed: of the random crops.

    Raises:
        ValueError: ``count`` below 1, ``smallest`` outside (0, 1], no size in pixels, or buckets for other pairs, or
            that do not fit, see `ssmgen.data.buckets.Sizing`.
    """

    def __init__(
        self, pairs: Pairs, size: int | Shape | Sequence[Shape], count: int, smallest: float = 0.8, seed: int = 0
    ) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if not 0 < smallest <= 1:
            raise ValueError(f"smallest must be in (0, 1], got {smallest}")
        self.pairs, self.count, self.smallest, self.seed = pairs, count, smallest, seed
        self.labels = pairs.labels
        if size is None or size == "whole":
            raise ValueError(f"size of crops must be a side, (height, width) or a list of those, got {size!r}")
        several = isinstance(parse_size(size), list)
        if several and getattr(pairs, "size", None) != "whole":
            raise ValueError('crops to several buckets are cut from a PairFolder or PreparedFolder of size="whole"')
        self._sizing = Sizing(size, pairs.mask_files() if several else [])  # type: ignore[attr-defined]
        self.size = self._sizing.size

    def __len__(self) -> int:
        return len(self.pairs) * self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image ``(3, height, width)`` and mask ``(height, width)`` of the given size, uint8.

        Raises:
            ValueError: the pair has extras, which are not cropped.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"crop {index} of {len(self)}")
        pair, crop = divmod(index, self.count)
        whole: tuple[Any, ...] = self.pairs[pair]
        image, mask = whole[:2]
        if len(whole) > 2 and whole[2]:
            raise ValueError(
                f"pair {pair} has the extras {', '.join(whole[2])}, and Crops cuts only images and masks: add extras "
                "to the crops, such as WithTexts(Crops(pairs, ...), ...)"
            )
        if crop == 0:
            return crop_resize(image, mask, self._sizing.of(pair))
        rng = random.Random(f"crop {self.seed} {pair} {crop}")
        share = rng.uniform(self.smallest, 1)
        return crop_resize(image, mask, self._sizing.of(pair), share, (rng.random(), rng.random()))

    def bucket_of(self, index: int) -> int:
        """Index of a crop's bucket, 0 if there is one size."""
        return self._sizing.bucket_of(index // self.count)

    def fingerprint(self) -> str:
        """Identifies the exact crops, for caches."""
        return f"{self.pairs.fingerprint()}-crops{self.count}-of{self.smallest}-size{self.size}-seed{self.seed}"
