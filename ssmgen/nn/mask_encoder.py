"""Label maps to mask tokens."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssmgen.ops import check_labels, sum_rows
from ssmgen.ops.readable import readable
from ssmgen.registry import register


@register("block", "mask-encoder")
class MaskEncoder(nn.Module):
    """A 1x1 convolution from one-hot classes to a narrow class embedding, then one token per patch of it.

    Labels come in at image resolution: resized to a latent grid first, small classes would vanish. The null condition
    is an all-zero one-hot map: its embedding is the convolution's bias.

    Args:
        dim: width of the tokens.
        num_classes: number of classes.
        patch_size: side in label pixels of the patch that becomes one token.
        class_dim: width of the class embedding.
    """

    def __init__(self, dim: int, num_classes: int, patch_size: int = 16, class_dim: int = 16) -> None:
        super().__init__()
        if min(dim, num_classes, patch_size, class_dim) < 1:
            raise ValueError(
                f"dim, num_classes, patch_size and class_dim must be positive, got dim={dim}, "
                f"num_classes={num_classes}, patch_size={patch_size}, class_dim={class_dim}"
            )
        self.num_classes = num_classes
        self.patch_size = patch_size
        self.classes = nn.Conv2d(num_classes, class_dim, 1)
        nn.init.normal_(self.classes.weight)  # the input is one-hot: this is an embedding table
        nn.init.zeros_(self.classes.bias)  # type: ignore[arg-type]
        self.proj = nn.Linear(patch_size**2 * class_dim, dim)

    def forward(self, mask: Tensor, keep: Tensor | None = None) -> Tensor:
        """Mask tokens ``(batch, height * width / patch_size^2, dim)``, row-major.

        Args:
            mask: integer labels ``(batch, height, width)``, or one-hot (or soft) classes
                ``(batch, num_classes, height, width)`` of a floating dtype.
            keep: ``(batch,)`` bool; False replaces an item's mask by the null condition.

        Raises:
            ValueError: wrong shape, other classes than the encoder's, a side that the patches do not fill, or a label
                out of range (its value, count and first position are named).
            TypeError: labels that are not integers, or a one-hot mask that is.
        """
        check_label_map(mask, self.num_classes, self.patch_size)
        if mask.dim() == 3:
            return self._from_labels(mask, keep)
        weight = self.classes.weight.flatten(1)
        features = rearrange(mask.to(weight.dtype), "b c h w -> b h w c") @ weight.t()
        if keep is not None:
            features = features * keep.view(-1, 1, 1, 1)
        features = features + self.classes.bias  # type: ignore[operator]
        p = self.patch_size
        return self.proj(rearrange(features, "b (h p1) (w p2) c -> b (h w) (p1 p2 c)", p1=p, p2=p))

    def _from_labels(self, mask: Tensor, keep: Tensor | None) -> Tensor:
        """The same for labels, without the map of features: a token is the sum of a row for each of its pixels.

        Convolution and projection are linear, so what a class adds to a token at a place in the patch is one row of a
        small table. The null condition is one more class, whose embedding is the bias alone.
        """
        p, count = self.patch_size, self.num_classes + 1
        bias: Tensor = self.classes.bias  # type: ignore[assignment]
        embedding = F.pad(self.classes.weight.flatten(1), (0, 1)).t() + bias
        weight = rearrange(self.proj.weight, "d (place c) -> place c d", place=p * p)
        table = (embedding @ weight).flatten(0, 1)
        labels = rearrange(mask.long(), "b (h p1) (w p2) -> b (h w) (p1 p2)", p1=p, p2=p)
        if keep is not None:
            labels = torch.where(keep.view(-1, 1, 1), labels, self.num_classes)
        rows = labels + count * torch.arange(p * p, device=mask.device)
        tokens = sum_rows(table, rows.flatten(0, 1), count).unflatten(0, rows.shape[:2])
        return tokens + self.proj.bias


def check_label_map(mask: Tensor, num_classes: int, multiple: int) -> None:
    """Reject what is neither labels ``(batch, height, width)`` nor one-hot ``(batch, num_classes, height, width)``.

    Raises:
        ValueError: wrong shape, another number of classes, sides that are no multiples of ``multiple``, or a label out
            of range (its value, count and first position are named).
        TypeError: labels that are not integers, or a one-hot mask that is.
    """
    one_hot = f"(batch, {num_classes}, height, width)"
    if mask.dim() in (3, 4) and not mask.shape[0]:
        raise ValueError(f"the batch is empty: give at least one mask, got {tuple(mask.shape)}")
    if mask.dim() not in (3, 4) or 0 in mask.shape:
        raise ValueError(
            f"mask must be integer labels (batch, height, width) or one-hot {one_hot}, got {tuple(mask.shape)}"
        )
    if mask.shape[-2] % multiple or mask.shape[-1] % multiple:
        raise ValueError(
            f"the mask's sides must be multiples of {multiple}, the label pixels of a token's side, "
            f"got {mask.shape[-2]} x {mask.shape[-1]}: resize the labels by nearest"
        )
    if mask.dim() == 4:
        if mask.shape[1] != num_classes:
            raise ValueError(
                f"a one-hot mask must be {one_hot} for the model's {num_classes} classes, got {tuple(mask.shape)}"
            )
        if not mask.is_floating_point():
            raise TypeError(f"a one-hot mask must be floating point, got {mask.dtype}: use mask.float()")
    elif mask.is_floating_point() or mask.is_complex() or mask.dtype == torch.bool:
        raise TypeError(f"labels (batch, height, width) must be integers, got {mask.dtype}: use mask.long()")
    elif readable(mask):
        check_labels(mask, num_classes)
