"""A plain folder of images and masks with your own classes; it needs no preparation."""

import hashlib
import json
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from ssmgen.data.folder import match_stems
from ssmgen.data.images import read_image, read_mask
from ssmgen.data.labels import LabelSet
from ssmgen.data.transforms import center_crop_resize


class PairFolder(Dataset[tuple[Tensor, Tensor]]):
    """Image-mask pairs of a folder, matched by name, never by position.

    Args:
        root: folder with ``images/`` and ``masks/`` that hold files of the same names, or with ``x.jpg`` beside
            ``x.png``. Masks are PNG files of class ids (8-bit grey or palette indices) or of the colours of ``labels``.
        labels: the classes of the masks.
        size: side, or ``(height, width)``, to which both are centre-cropped and resized; None keeps the largest square.

    Attributes:
        ids: file names of the pairs without suffix, sorted.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no pairs, or files without a partner (all are listed).
    """

    def __init__(self, root: str | Path, labels: LabelSet, size: int | tuple[int, int] | None = None) -> None:
        self.root, self.labels, self.size = Path(root).expanduser(), labels, size
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: no such folder")
        images, masks = self.root / "images", self.root / "masks"
        if not images.is_dir() and not masks.is_dir():
            images = masks = self.root
        self._files, problems = match_stems(images, masks)
        if not problems and not self._files:
            raise ValueError(
                f"{self.root}: no pairs: expected images/ and masks/ with files of the same names, or x.jpg and x.png"
            )
        if problems:
            lines = [f"  {file}: {reason}" for file, reason in problems]
            raise ValueError(f"{self.root}: {len(problems)} file(s) have no partner:\n" + "\n".join(lines))
        self.ids = list(self._files)

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
            return center_crop_resize(pixels, ids, self.size)
        except ValueError as error:
            raise ValueError(f"{image} and {mask}: {error}") from error

    def fingerprint(self) -> str:
        """SHA-256 of all file contents, the classes and the size: equal only for equal data."""
        digest = hashlib.sha256(json.dumps([self.labels.classes, self.size]).encode())
        for id, files in self._files.items():
            digest.update(id.encode())
            for file in files:
                digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()
