"""FID protocols: the preprocessing, and the real images that generated ones are compared with.

Papers on CelebAMask-HQ differ in both, which changes FID by tens; a number means little without its protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ssmgen.metrics.backbones import InceptionTrunk


@dataclass(frozen=True)
class FIDProtocol:
    """A way to compute FID and KID.

    Attributes:
        name: its name in `FID_PROTOCOLS`.
        side: side in pixels to which scikit-image first resizes images; 0 skips this.
        resize: resizing to the network's 299 pixels, see `InceptionTrunk`.
        reference: the real images, ``test`` or ``train``.
    """

    name: str
    side: int
    resize: str
    reference: str

    def published(self, folder: Path | str, *, download: bool = False) -> InceptionTrunk:
        """The trunk with the published weights; see `ssmgen.metrics.backbones.Weights.find` for the errors."""
        return self._named(InceptionTrunk.published(folder, self.resize, self.side, download=download))

    def trunk(self, state: dict[str, Tensor]) -> InceptionTrunk:
        """The trunk with the given weights."""
        return self._named(InceptionTrunk(state, self.resize, self.side))

    def _named(self, trunk: InceptionTrunk) -> InceptionTrunk:
        trunk.protocol = f"{self.name},{trunk.protocol}"
        return trunk


#: ``sdm-oasis`` is what SDM and SCDM used (the code of OASIS), ``train-ref`` the same against training images (SEAN,
#: CLADE), ``clean`` antialiased resizing (clean-fid). SISMA's own protocol is not known.
FID_PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        FIDProtocol("sdm-oasis", 256, "torch", "test"),
        FIDProtocol("train-ref", 256, "torch", "train"),
        FIDProtocol("clean", 0, "antialias", "test"),
    )
}
