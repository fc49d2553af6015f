"""The interface shared by all data sets of image-mask pairs."""

from typing import Protocol

from torch import Tensor

from ssmgen.data.labels import LabelSet


class Pairs(Protocol):
    """A data set of image-mask pairs: `DrawnFaces`, `PreparedFolder`, `PairFolder`, `Crops`, or your own class.

    Attributes:
        labels: the classes of the masks.
    """

    labels: LabelSet

    def __len__(self) -> int:
        """Number of pairs."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image ``(3, height, width)`` uint8 RGB and mask ``(height, width)`` uint8 class ids."""

    def fingerprint(self) -> str:
        """A string that is equal only for equal data: the record of a latent cache or a run holds it."""
