"""Which FID: what stands before the network, and what the generated images are compared with.

Papers on CelebAMask-HQ differ in both, and FID moves by tens with them; a number is only as good as its protocol.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssmgen.extras import require


@dataclass(frozen=True)
class FIDProtocol:
    """A way to compute FID and KID.

    Attributes:
        name: what it is asked for by.
        side: pixels a side to which images are resized by scikit-image first; 0 leaves them.
        resize: how the network's 299 pixels come about, see `InceptionTrunk`.
        reference: which real images: ``test`` or ``train``.
    """

    name: str
    side: int
    resize: str
    reference: str

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images ``(batch, 3, h, w)`` as the protocol sees them before the network."""
        if not self.side or images.shape[-2:] == (self.side, self.side):
            return images
        resize = require("skimage.transform", extra="metrics").resize
        shape = (self.side, self.side)
        resized = [resize(image.permute(1, 2, 0).numpy(), shape, preserve_range=True) for image in images.cpu()]
        return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in resized]).round().to(torch.uint8)

    def string(self, count: int, reference_count: int, seed: int) -> str:
        """What to print beside the number."""
        before = f"skimage{self.side}+{self.resize}299" if self.side else f"{self.resize}299"
        return (
            f"fid[{self.name},inception-tf-2015,pool3-2048,resize={before},ref={self.reference}{reference_count},"
            f"n={count},seed={seed}]"
        )


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
