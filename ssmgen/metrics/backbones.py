"""The networks that define FID, KID and LPIPS, with their published weights.

Weights are read from a folder; only ``download=True`` fetches them. Their SHA-256 is checked before they are loaded.
"""

import hashlib
import io
import shutil
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmgen.atomic import whole_file
from ssmgen.extras import require
from ssmgen.weights import load_weights


@dataclass(frozen=True)
class Weights:
    """A published file: its name, address and SHA-256."""

    file: str
    url: str
    sha256: str

    def find(self, folder: Path | str, *, download: bool = False) -> Path:
        """The verified file in ``folder``.

        Raises:
            FileNotFoundError: the file is missing and ``download`` is False or failed; names the file and its address.
            ValueError: the content is not the published one.
        """
        path = Path(folder).expanduser() / self.file
        if not path.is_file():
            if not download:
                raise FileNotFoundError(f"{path}: not found. Put {self.url} there, or set download=true.")
            self._fetch(path)
        self._check(path, path)
        return path

    def _fetch(self, path: Path) -> None:
        """Download and verify under a temporary name; another process may do the same."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with whole_file(path) as partial:
                with urllib.request.urlopen(self.url, timeout=60) as answer, partial.open("wb") as out:
                    shutil.copyfileobj(answer, out, 1 << 20)
                self._check(partial, path)
        except OSError as error:
            raise FileNotFoundError(f"{path}: could not be fetched ({error}). Put {self.url} there.") from error

    def _check(self, file: Path, path: Path) -> None:
        found = sha256_of(file)
        if found != self.sha256:
            raise ValueError(
                f"{path}: SHA-256 is {found}, the published file's is {self.sha256}. Put {self.url} there."
            )


INCEPTION = Weights(
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)


def alexnet_weights() -> Weights:
    """AlexNet's weights as torchvision publishes them."""
    published = require("torchvision.models", extra="metrics").AlexNet_Weights.IMAGENET1K_V1
    sha256 = "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02"
    return Weights("alexnet-owt-7be5be79.pth", published.url, sha256)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_hash(network: nn.Module) -> str:
    """SHA-256 over the names and values of a network's state, independent of the file it came from."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class InceptionTrunk(nn.Module):
    """The 2015 Inception network of FID and KID: images ``(batch, 3, h, w)`` to its 2048 pooled features.

    The network is torch-fidelity's. Papers differ in the preprocessing, which changes FID by whole points:

    - ``"tf1"``: torch-fidelity's, TensorFlow 1's bilinear resizing of the 8-bit image to 299;
    - ``"torch"``: pytorch-fid's and OASIS's, bilinear resizing without aligned corners, values in [-1, 1];
    - ``"antialias"``: bicubic with antialiasing, as clean-fid recommends.

    Args:
        state: the network's weights, as in the published file.
        resize: one of the three.
        side: side in pixels to which scikit-image first resizes the images, as OASIS does; 0 skips this. It leaves
            unrounded values, so it cannot be combined with ``"tf1"``, which takes 8 bits.

    Attributes:
        protocol: the preprocessing and network, for the string beside a number.
        weights: SHA-256 of the published file, or of the given state.
    """

    feature_size = 2048
    name = "inception-tf-2015"
    distances = ("fid", "kid")

    def __init__(self, state: dict[str, Tensor], resize: str = "tf1", side: int = 0) -> None:
        super().__init__()
        if resize not in ("tf1", "torch", "antialias"):
            raise ValueError(f"resize must be 'tf1', 'torch' or 'antialias', got {resize!r}")
        if side < 0 or (side and resize == "tf1"):
            raise ValueError(
                f"side must be 0 for resize='tf1' and at least 0 for the others, got {side} and {resize!r}"
            )
        module = require("torch_fidelity.feature_extractor_inceptionv3", extra="metrics")
        buffer = io.BytesIO()  # torch-fidelity unpickles its input, so it gets weights that were loaded safely
        torch.save(state, buffer)
        buffer.seek(0)
        self.network = module.FeatureExtractorInceptionV3(self.name, ["2048"], feature_extractor_weights_path=buffer)
        self.resize, self.side = resize, side
        before = f"skimage{side}+{resize}299" if side else f"{resize}299"
        self.protocol = f"{self.name},pool3-2048,resize={before}"
        self.weights = weights_hash(self.network)

    @classmethod
    def published(cls, folder: Path | str, resize: str = "tf1", side: int = 0, *, download: bool = False) -> Self:
        """The trunk with the published weights; see `Weights.find` for the errors."""
        trunk = cls(torch.load(INCEPTION.find(folder, download=download), weights_only=True), resize, side)
        trunk.weights = INCEPTION.sha256
        return trunk

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features ``(batch, 2048)`` of uint8 images ``(batch, 3, h, w)``."""
        check_uint8(images)
        device = next(self.network.parameters()).device
        if self.resize == "tf1":
            return self.network(images.to(device))[0]
        x = (_resized(images, self.side) if self.side else images.float()).to(device)
        if self.resize == "torch":
            x = F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
        else:
            x = (F.interpolate(x, (299, 299), mode="bicubic", antialias=True).clamp(0, 255) - 128) / 128
        for name, layer in self.network.named_children():
            if name != "fc":
                x = layer(x)
        return x.flatten(1)


def _resized(images: Tensor, side: int) -> Tensor:
    """Images resized by scikit-image, unrounded float32 in [0, 255]."""
    resize = require("skimage.transform", extra="metrics").resize
    scaled = [resize(image.movedim(0, -1).float().cpu().numpy(), (side, side, 3)) for image in images]
    return torch.stack([torch.from_numpy(image).movedim(-1, 0) for image in scaled]).float()


@dataclass(frozen=True)
class FIDProtocol:
    """A way to compute FID and KID: the preprocessing, and the real images that generated ones are compared with.

    Papers on CelebAMask-HQ differ in both, which changes FID by tens; a number means little without its protocol.

    Attributes:
        name: its name in `FID_PROTOCOLS`.
        side, resize: see `InceptionTrunk`.
        reference: the real images, ``test`` or ``train``.
    """

    name: str
    side: int
    resize: str
    reference: str

    def published(self, folder: Path | str, *, download: bool = False) -> InceptionTrunk:
        """The trunk with the published weights; see `Weights.find` for the errors."""
        return self._named(InceptionTrunk.published(folder, self.resize, self.side, download=download))

    def trunk(self, state: dict[str, Tensor]) -> InceptionTrunk:
        """The trunk with the given weights: tensors of any shape, by their names in the published file."""
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


class SqueezeNetTrunk(nn.Module):
    """SqueezeNet 1.1's pooled features (arXiv 1602.07360): a small substitute if Inception's weights are unavailable.

    Distances of these features are reported as a proxy, not as FID, KID or LPIPS.

    Args:
        file: safetensors in torchvision's layout, for BGR images in 0..255 minus ImageNet's mean.
    """

    feature_size = 512
    name = "squeezenet11"
    distances = ("proxy", "proxy-kernel")
    protocol = "squeezenet11,pooled512"
    mean: Tensor

    def __init__(self, file: Path | str) -> None:
        super().__init__()
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file}: not found; it should hold SqueezeNet 1.1's features as safetensors")
        models = require("torchvision.models", extra="metrics")
        self.network = models.squeezenet1_1().features.eval().requires_grad_(False)
        load_weights(self.network, Path(file))
        self.weights = sha256_of(Path(file))
        self.register_buffer("mean", torch.tensor([103.939, 116.779, 123.68]).view(3, 1, 1))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features ``(batch, 512)`` of uint8 images ``(batch, 3, h, w)``."""
        check_uint8(images)
        return self.network(images.to(self.mean.device).flip(1).float() - self.mean).mean(dim=(2, 3))


def check_uint8(images: Tensor) -> None:
    """Raise ValueError unless images are uint8 RGB ``(batch, 3, h, w)``."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images must be uint8 (batch, 3, height, width), got {images.dtype} {tuple(images.shape)}; "
            "convert grey or alpha images to RGB"
        )


def lpips_network(alexnet: dict[str, Tensor]) -> Any:
    """LPIPS (arXiv 1801.03924, eq. 1): the lpips package's AlexNet metric with its calibrated layers, over a trunk.

    Args:
        alexnet: weights of torchvision's AlexNet; the classifier is not used.

    Returns:
        A module that maps two batches ``(batch, 3, h, w)`` in [-1, 1] to distances ``(batch, 1, 1, 1)``.

    Raises:
        ValueError: weights are missing or unknown.
    """
    lpips = require("lpips", extra="metrics")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision in a deprecated way
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    given = {name.removeprefix("features."): value for name, value in alexnet.items() if name.startswith("features.")}
    # lpips cuts the trunk into slices; within each, layers keep torchvision's numbers.
    wanted = {name: value for part in network.net.children() for name, value in part.named_parameters()}
    if given.keys() != wanted.keys():
        raise ValueError(f"not torchvision's AlexNet: features {sorted(given)} given, {sorted(wanted)} expected")
    for name, parameter in wanted.items():
        parameter.data.copy_(given[name])
    network.protocol = "alex-0.1"
    return network.eval().requires_grad_(False)


def published_lpips(folder: Path | str, *, download: bool = False) -> Any:
    """`lpips_network` with torchvision's AlexNet weights; see `Weights.find` for the errors."""
    return lpips_network(torch.load(alexnet_weights().find(folder, download=download), weights_only=True))
