"""A map of numbers: edges, depth, a sketch, normals, another picture."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ssmgen.conditions.maps import MapCondition
from ssmgen.nn.patch import Patchify
from ssmgen.nn.signal import Signal
from ssmgen.ops.readable import readable
from ssmgen.registry import register


@register("condition", "dense-map")
class DenseMap(MapCondition):
    """A map of any channels as one token per image token: its patches, each projected as those of the image are.

    It takes floating-point maps ``(b, channels, scale h, scale w)`` or ``(b, channels, h, w)``. Bring the values to
    about [-1, 1]. The null is a learned token, the same at every place: a map of zeros says something else, for example
    that there are no edges.

    Args:
        dim: width of the tokens.
        channels: channels of the map: 1 for edges, depth or a sketch, 3 for normals or a picture.
        scale: pixels of the map per latent pixel along a side: 8 for an f8 autoencoder, 1 for pixels.
        patch_size: side of a token's patch in the latent.
        dropout: see `Condition`.
    """

    takes: ClassVar[str] = "map"
    noun: ClassVar[str] = "map"
    resizing: ClassVar[str] = "resize the map"

    def __init__(self, dim: int, channels: int, *, scale: int = 8, patch_size: int = 2, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        if min(channels, scale, patch_size) < 1:
            raise ValueError(
                f"channels, scale and patch_size must be positive, got channels={channels}, scale={scale}, "
                f"patch_size={patch_size}"
            )
        self.channels = channels
        self.scale = scale
        self.encoder = Patchify(channels, dim, scale * patch_size)
        self.nothing = nn.Parameter(0.02 * torch.randn(dim))

    def null(self, size: tuple[int, int] | None, device: torch.device) -> Tensor:
        """Zeros of the size."""
        if size is None:
            raise ValueError("the null condition needs size=(height, width) of the latent")
        return torch.zeros(1, self.channels, size[0] * self.scale, size[1] * self.scale, device=device)

    def signal(self, given: Tensor, size: tuple[int, int] | None, keep: Tensor | None) -> Signal:
        """Tokens of the map on the image's token grid.

        Raises:
            ValueError: another shape, number of channels or size, or a value that is not finite.
            TypeError: a map that is not floating point.
        """
        self.check(given)
        given = self.at_full_size(given, size).to(self.nothing.dtype)
        tokens = self.encoder(given)
        if keep is not None:
            tokens = torch.where(keep.view(-1, 1, 1), tokens, self.nothing.to(tokens.dtype))
        side = self.encoder.patch_size
        return Signal(tokens, (given.shape[-2] // side, given.shape[-1] // side))

    def check(self, given: Tensor) -> None:  # type: ignore[override]
        """Reject another shape or dtype, and values that are not finite."""
        if given.dim() != 4 or given.shape[1] != self.channels or 0 in given.shape:
            raise ValueError(f"a map must be (batch, {self.channels}, height, width), got {tuple(given.shape)}")
        if not given.is_floating_point():
            raise TypeError(
                f"a map must be floating point, got {given.dtype}: use map.float(), and scale it to [-1, 1]"
            )
        if not readable(given):
            return
        bad = (~given.isfinite()).nonzero()
        if len(bad):
            item, channel, row, column = bad[0].tolist()
            raise ValueError(
                f"the map of item {item} is {float(given[item, channel, row, column])} in channel {channel} at row "
                f"{row}, column {column}, and {len(bad)} values in all are not finite: replace them"
            )
