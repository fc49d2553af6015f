"""Drawn faces as a data set of image-mask pairs."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import Dataset

from ssmgen.data.drawn_faces.portrait import draw_face
from ssmgen.data.drawn_faces.stream import DRAWN_FACES_VERSION
from ssmgen.data.labels import CELEBAMASK19


class DrawnFaces(Dataset[tuple[Tensor, Tensor]]):
    """Faces ``start`` to ``start + count`` of a seed, each drawn when it is accessed.

    Args:
        count: number of faces.
        size: side of the images in pixels.
        seed: the set of faces.
        start: index of the first face, so that training and validation can share a seed without sharing a face.
    """

    labels = CELEBAMASK19

    def __init__(self, count: int, size: int = 128, seed: int = 0, start: int = 0) -> None:
        self.count, self.size, self.seed, self.start = count, size, seed, start

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not -self.count <= i < self.count:
            raise IndexError(f"face {i} of {self.count}")
        return draw_face(self.start + i % self.count, self.size, self.seed)

    def fingerprint(self) -> str:
        """Identifies the exact images, for caches and checkpoints."""
        faces = f"seed{self.seed}-start{self.start}-count{self.count}-size{self.size}"
        return f"drawn_faces-v{DRAWN_FACES_VERSION}-{faces}"
