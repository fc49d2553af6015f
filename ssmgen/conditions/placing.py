"""Codes of classes, placed on the image's token grid by the mask of the new image.

Letters: b batch, k classes, d width, H x W mask.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ssmgen.nn.mask_encoder import check_label_map


class Placed:
    """Part of a condition that makes a code for each class: where they lie in the new image, its label map says.

    A model gives such a condition the value of the one that it names, as ``target``.

    Attributes:
        classes: of both masks.
        placed_by: name of the label map of the model; None where the codes are not placed.
        patch_size: side of a token's patch in the latent.
    """

    added_fields: ClassVar[tuple[str, ...]] = ("target",)
    classes: int
    placed_by: str | None
    patch_size: int

    def placed(self, value: Mapping[str, Tensor], target: Tensor, keep: Tensor | None) -> dict[str, Tensor]:
        """A value with the mask of the new image, all of one batch. Where ``keep`` is False, the mask has no class.

        Args:
            value: tensors ``(b, ...)`` by name.
            target: labels ``(b, H, W)`` or one-hot ``(b, k, H, W)``.
            keep: ``(b,)`` bool of the target; None keeps all.

        Raises:
            ValueError: one value per item and another number of masks.
        """
        if keep is not None:
            kept = keep.view(-1, *[1] * (target.dim() - 1))
            target = target.to(keep.device)
            target = torch.where(kept, target.long(), self.classes) if target.dim() == 3 else target * kept
        whole = {**value, "target": target}
        batch = max(len(each) for each in whole.values())
        return {name: each.expand(batch, *each.shape[1:]) if len(each) == 1 else each for name, each in whole.items()}

    def check_placing(self, other: Any) -> None:
        """Reject a label map of other classes, by a `ValueError`."""
        if other.num_classes != self.classes:
            raise ValueError(
                f"codes of {self.classes} classes cannot be placed by {self.placed_by!r}, which has {other.num_classes}"
            )

    def grid_of(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """(height, width) in tokens of a latent; a `ValueError` where its size is not known."""
        if size is None:
            raise ValueError("placed codes need size=(height, width) of the latent")
        return size[0] // self.patch_size, size[1] // self.patch_size

    def placed_codes(self, codes: Tensor, nothing: Tensor, target: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """The codes ``(b, k, d)`` on a grid, ``(b, tokens, d)``: at each token the mean of the classes under it.

        Args:
            codes: one per class.
            nothing: ``(d,)``, where the target has no class, and everywhere without a target.
            target: labels ``(b, H, W)``, where the label k is none of the classes, or one-hot ``(b, k, H, W)``.
            grid: (height, width) in tokens.

        Raises:
            ValueError: a mask whose sides the grid does not divide, or with a label out of range.
        """
        nothing = nothing.to(codes.dtype)
        if target is None:
            return nothing.expand(codes.shape[0], grid[0] * grid[1], -1)
        check_label_map(target, self.classes + (target.dim() == 3), 1)
        if target.shape[-2] % grid[0] or target.shape[-1] % grid[1]:
            raise ValueError(
                f"the mask that places the codes has sides of {target.shape[-2]} x {target.shape[-1]}, which a grid of "
                f"{grid[0]} x {grid[1]} tokens does not divide"
            )
        return nothing + class_shares(target, grid, self.classes).to(codes.dtype) @ (codes - nothing)


def class_shares(mask: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """The share of each class in each cell of a grid.

    Args:
        mask: integer labels ``(b, H, W)``, where the label ``num_classes`` belongs to no class, or one-hot classes
            ``(b, num_classes, H, W)``.
        grid: (height, width) in cells, which divide the mask's.
        num_classes: classes.

    Returns:
        ``(b, cells, num_classes)`` float32, row-major.
    """
    if mask.dim() == 4:
        return rearrange(F.adaptive_avg_pool2d(mask.float(), grid), "b k h w -> b (h w) k")
    cells = rearrange(mask.long(), "b (h p) (w q) -> b (h w) (p q)", h=grid[0], w=grid[1])
    counts = torch.zeros(*cells.shape[:2], num_classes + 1, device=mask.device)
    counts = counts.scatter_add(2, cells, torch.ones_like(cells, dtype=counts.dtype))
    return counts[..., :num_classes] / cells.shape[2]
