"""A semantic mask: one label per pixel of the image."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ssmgen.conditions.maps import MapCondition
from ssmgen.conditions.placing import class_shares
from ssmgen.nn.mask_encoder import MaskEncoder, check_label_map
from ssmgen.nn.signal import Signal
from ssmgen.registry import register


class _Mask(MapCondition):
    """Label maps, whose null is zeros."""

    num_classes: int

    def check(self, given: Tensor) -> None:  # type: ignore[override]
        """Reject a label out of range, or another number of classes."""
        check_label_map(given, self.num_classes, 1)

    def null(self, size: tuple[int, int] | None, device: torch.device) -> Tensor:
        """Zeros of the size."""
        if size is None:
            raise ValueError("the null condition needs size=(height, width) of the latent")
        return torch.zeros(1, size[0] * self.scale, size[1] * self.scale, dtype=torch.uint8, device=device)


@register("condition", "label-map")
class LabelMap(_Mask):
    """A mask as one token per image token, see `ssmgen.nn.MaskEncoder`.

    It takes integer labels ``(b, scale h, scale w)`` or ``(b, h, w)``, or one-hot classes ``(b, num_classes, ...)`` of
    a floating dtype.

    Args:
        dim: width of the tokens.
        num_classes: classes of the mask.
        scale: label pixels per latent pixel along a side: 8 for an f8 autoencoder, 1 for pixels.
        patch_size: side of a token's patch in the latent.
        class_dim: width of the class embedding before it is patchified.
        dropout: see `Condition`.

    Attributes:
        gives_classes: its signals say the class of each token; a model sets it if one of its layers reads them.
    """

    gives_classes = False

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        scale: int = 8,
        patch_size: int = 2,
        class_dim: int = 16,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dropout)
        self.num_classes = num_classes
        self.scale = scale
        self.encoder = MaskEncoder(dim, num_classes, scale * patch_size, class_dim)

    def signal(self, given: Tensor, size: tuple[int, int] | None, keep: Tensor | None) -> Signal:
        """Mask tokens on the image's token grid."""
        mask = self.at_full_size(given, size)
        tokens = self.encoder(mask, keep)
        side = self.encoder.patch_size
        classes = token_classes(mask, self.num_classes, side, keep) if self.gives_classes else None
        return Signal(tokens, (mask.shape[-2] // side, mask.shape[-1] // side), classes=classes)


def token_classes(mask: Tensor, num_classes: int, side: int, keep: Tensor | None = None) -> Tensor:
    """The class of which a token holds the largest share, ``(b, l)``: an eye is smaller than any patch that it lies in.

    Args:
        mask: labels ``(b, h, w)``, or one-hot classes ``(b, num_classes, h, w)``.
        num_classes: classes.
        side: of a token's patch in labels.
        keep: ``(b,)`` bool; tokens of items with False are of the class ``num_classes``.
    """
    held = class_shares(mask, (mask.shape[-2] // side, mask.shape[-1] // side), num_classes)
    classes = (held / held.sum(1, keepdim=True).clamp(min=1e-6)).argmax(2)
    return classes if keep is None else torch.where(keep.unsqueeze(1), classes, num_classes)


@register("condition", "one-hot-map")
class OneHotMap(_Mask):
    """A mask as it is, one-hot, for layers that convolve it themselves, such as `ssmgen.nn.SPADE`.

    It takes integer labels ``(b, scale h, scale w)`` or ``(b, h, w)``, or one-hot classes ``(b, num_classes, ...)`` of
    a floating dtype. The null is all zero.

    Args:
        num_classes: classes of the mask.
        scale: label pixels per latent pixel along a side; a latent pixel gets the share of each class in its labels.
        dropout: see `Condition`.
    """

    def __init__(self, num_classes: int, scale: int = 1, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        if min(num_classes, scale) < 1:
            raise ValueError(f"num_classes and scale must be positive, got num_classes={num_classes}, scale={scale}")
        self.num_classes, self.scale, self.token_width = num_classes, scale, num_classes

    def null(self, size: tuple[int, int] | None, device: torch.device) -> Tensor:
        """One-hot zeros of the size."""
        zeros = super().null(size, device).float()
        return zeros.unsqueeze(1).repeat(1, self.num_classes, 1, 1)

    def signal(self, given: Tensor, size: tuple[int, int] | None, keep: Tensor | None) -> Signal:
        """One token per latent pixel, of width ``num_classes``."""
        mask = self.at_full_size(given, size)
        check_label_map(mask, self.num_classes, self.scale)
        one_hot = mask
        if mask.dim() == 3:
            one_hot = rearrange(F.one_hot(mask.long(), self.num_classes).float(), "b h w k -> b k h w")
        if self.scale > 1:
            one_hot = F.avg_pool2d(one_hot, self.scale)
        if keep is not None:
            one_hot = one_hot * keep.view(-1, 1, 1, 1)
        return Signal(rearrange(one_hot, "b k h w -> b (h w) k"), (one_hot.shape[2], one_hot.shape[3]))
