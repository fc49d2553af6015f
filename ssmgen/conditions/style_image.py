"""A picture whose colours and textures the new one shall have, as a whole or region by region.

Letters: b batch, c channels, h x w latent of the style picture, H x W its mask, k classes, d width.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssmgen.conditions.condition import Condition, check_positive
from ssmgen.conditions.placing import Placed, class_shares
from ssmgen.nn.mask_encoder import check_label_map
from ssmgen.nn.signal import Signal
from ssmgen.ops.readable import readable
from ssmgen.registry import register


@register("condition", "style-image")
class StyleImage(Placed, Condition):
    """The style of another picture, from its latents and its own mask (after SEAN, arXiv 1911.12861, section 3.1).

    A value is ``{"latents": (b, c, h, w), "mask": (b, H, W)}`` of any size, whose mask has a whole number of label
    pixels per latent pixel. Mean and deviation of the latents over each class become one style code per class. Where
    things are in the picture does not enter. A class that it lacks has the null code.

    The codes are tokens ``(b, k, d)`` for layers that read sequences. With ``placed_by`` they lie on the image's token
    grid instead: a token is the mean of the codes of the classes under it, by the mask of the new image. The whole
    picture gives a vector that joins the time.

    Args:
        dim: width of the tokens and of the vector.
        in_channels: channels of the latents.
        num_classes: classes of both masks; needed with ``regions``.
        regions: one code per class. False takes the latents alone, and the one token is the vector of the picture.
        placed_by: name of the label map of the model that says where the classes are in the new image. Where that one
            is null, the placed codes are too.
        patch_size: side of a token's patch in the latent of the new image.
        dropout: see `Condition`.
        class_dropout: probability with which training takes a class from a style picture. A picture that is its own
            style lacks none of its classes, but another one may.
    """

    gives: ClassVar[tuple[str, ...]] = ("tokens", "vector")
    takes: ClassVar[str] = "picture"
    fields: ClassVar[tuple[str, ...]] = ("latents", "mask")

    def __init__(
        self,
        dim: int,
        in_channels: int,
        num_classes: int | None = None,
        *,
        regions: bool = True,
        placed_by: str | None = None,
        patch_size: int = 2,
        dropout: float = 0.0,
        class_dropout: float = 0.0,
    ) -> None:
        super().__init__(dropout)
        if not isinstance(class_dropout, int | float) or not 0 <= class_dropout < 1:
            raise ValueError(f"class_dropout must be in [0, 1), got {class_dropout!r}")
        self.class_dropout = class_dropout
        self.needs_reader, self.on_grid = regions, placed_by is not None  # type: ignore[misc]
        counts = {} if num_classes is None else {"num_classes": num_classes}
        check_positive(in_channels=in_channels, patch_size=patch_size, **counts)
        if regions and num_classes is None:
            raise ValueError("a style by regions needs num_classes, those of the masks: give it, or set regions=False")
        if placed_by is not None and not regions:
            raise ValueError(f"placed_by={placed_by!r} needs regions=True: the style of a whole picture has no place")
        if class_dropout and not regions:
            raise ValueError(f"class_dropout={class_dropout} needs regions=True: the whole picture has no classes")
        self.in_channels, self.patch_size, self.placed_by = in_channels, patch_size, placed_by
        self.classes = num_classes if regions and num_classes else 0
        if self.classes:
            self.embedding = nn.Parameter(0.02 * torch.randn(self.classes, dim))
            self.inner = nn.Linear(2 * in_channels, dim)
            self.outer = nn.Linear(dim, dim)
            self.nothing = nn.Parameter(torch.zeros(dim))
        else:
            self.fields = ("latents",)  # type: ignore[misc]
        self.whole = nn.Sequential(nn.Linear(2 * in_channels, dim), nn.SiLU(), nn.Linear(dim, dim))
        nn.init.normal_(self.whole[2].weight, std=0.02)  # type: ignore[arg-type]

    def null(self, size: tuple[int, int] | None, device: torch.device) -> dict[str, Tensor]:
        """A picture of one latent pixel, of the first class."""
        latents = torch.zeros(1, self.in_channels, 1, 1, dtype=next(self.whole.parameters()).dtype, device=device)
        return {"latents": latents, "mask": torch.zeros(1, 1, 1, dtype=torch.uint8, device=device)}

    def signal(self, given: Mapping[str, Tensor], size: tuple[int, int] | None, keep: Tensor | None) -> Signal:
        """The style's codes and vector.

        Args:
            given: ``latents``, with ``regions`` also ``mask``, and for placed codes ``target``: the mask of the new
                image, labels ``(b, H', W')``, where the label ``num_classes`` is none of the classes, or one-hot.
            size: (height, width) of the latent of the new image, for placed codes.
            keep: see `Condition`.

        Raises:
            ValueError: latents of other channels, no mask or one that does not fit them, or a label out of range.
            TypeError: latents that are not floating point, or labels that are not integers.
        """
        latents = self._checked(given)
        everywhere = torch.ones(len(latents), latents.shape[2] * latents.shape[3], 1, device=latents.device)
        vector = self.whole(_moments(latents, everywhere).squeeze(1).to(next(self.whole.parameters()).dtype))
        vector = vector if keep is None else vector * keep.unsqueeze(1).to(vector.dtype)
        if not self.classes:
            return Signal(vector.unsqueeze(1), None, vector)
        shares = class_shares(given["mask"], (latents.shape[2], latents.shape[3]), self.classes)
        codes, present = self._codes(latents, shares, keep)
        if self.placed_by is None:
            some = present.any(1, keepdim=True)  # a sequence without a valid token would leave attention undefined
            return Signal(codes, None, vector, valid=present | ~some)
        grid = self.grid_of(size)
        tokens = self.placed_codes(codes, self.nothing, given.get("target"), grid)
        return Signal(tokens, grid, vector)

    def check(self, given: Mapping[str, Tensor]) -> None:  # type: ignore[override]
        """Reject latents of other channels or not finite, and a mask that does not fit them."""
        self._checked(given)

    def _checked(self, given: Mapping[str, Tensor]) -> Tensor:
        """The latents; everything given is checked."""
        expected = f"latents of a style image must be (batch, {self.in_channels}, height, width)"
        if "latents" not in given:
            raise ValueError(f"{expected}, and there are none: encode the picture by the model's autoencoder")
        latents, mask = given["latents"], given.get("mask")
        if latents.dim() != 4 or latents.shape[1] != self.in_channels or 0 in latents.shape:
            raise ValueError(f"{expected} with at least one pixel and one item, got {tuple(latents.shape)}")
        if not latents.is_floating_point():
            raise TypeError(f"{expected}, floating point, got {latents.dtype}: encode the picture")
        if readable(latents) and not bool(latents.isfinite().all()):
            raise ValueError("the latents of a style image hold values that are not finite: encode the picture again")
        if not self.classes:
            return latents
        if mask is None:
            raise ValueError(
                "a style image without its mask: this model takes the style by regions. Give "
                '{"latents": ..., "mask": labels of the style image}, or build the model with regions=False'
            )
        if (
            mask.dim() in (3, 4)
            and mask.shape[0]
            and (mask.shape[-2] % latents.shape[2] or mask.shape[-1] % latents.shape[3])
        ):
            raise ValueError(
                f"the mask of a style image must have a whole number of labels per pixel of its latents, "
                f"{latents.shape[2]} x {latents.shape[3]}, got {mask.shape[-2]} x {mask.shape[-1]}: resize the labels "
                "by nearest"
            )
        check_label_map(mask, self.classes, 1)
        return latents

    def _codes(self, latents: Tensor, shares: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """A code for each class ``(b, k, d)``, and ``(b, k)`` whether the picture has it."""
        moments = _moments(latents, shares).to(self.nothing.dtype)
        codes = self.outer(F.silu(self.inner(moments) + self.embedding))
        present = shares.sum(1) > 0
        present = present if keep is None else present & keep.unsqueeze(1)
        if self.training and self.class_dropout:
            rank, processes = self.share
            drawn = torch.rand(len(present) * processes, present.shape[1], device=present.device)[rank::processes]
            present = present & (drawn >= self.class_dropout)
        return torch.where(present.unsqueeze(2), codes, self.nothing.to(codes.dtype)), present


def _moments(latents: Tensor, shares: Tensor) -> Tensor:
    """Mean and deviation of latents over each class, ``(b, k, 2 c)``, at least float32; of an absent one zeros."""
    values = rearrange(latents, "b c h w -> b (h w) c").to(torch.promote_types(latents.dtype, torch.float32))
    shares = shares.to(values.dtype).mT
    area = shares.sum(2, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    mean, square = (shares @ power / area for power in (values, values**2))
    # The root of zero has no gradient, and a class of one pixel has no deviation.
    return torch.cat([mean, (square - mean**2).clamp(min=1e-8).sqrt()], dim=2)
