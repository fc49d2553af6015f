"""What all models conditioned on a mask share: tokens in and out, time, mask, and what can be computed beforehand.

Letters: b batch, c channels, h x w latent (or pixel) size, l tokens, d width, s mask_scale.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmgen.nn import AdaLNZero, MaskEncoder, Modulation, Patchify, PositionEmbedding, TimeEmbedding, Unpatchify
from ssmgen.registry import closest

_MASK_INPUTS = ("none", "add")


class MaskCondition(NamedTuple):
    """What a model computes from the mask alone; made by `MaskConditioned.condition`, taken as ``cond=``.

    Attributes:
        size: (height, width) of the token grid it was made for.
        batch: masks it was made from.
        tokens: mask tokens ``(b, l, d)`` that are added at the input, or None.
        layers: what each block's ``condition`` made of the tokens.
    """

    size: tuple[int, int]
    batch: int
    tokens: Tensor | None
    layers: tuple[Any, ...]


class MaskConditioned(nn.Module):
    """Velocity model conditioned on a semantic mask: patchify, blocks, AdaLN head, unpatchify.

    A block has ``adaln`` (an `AdaLNZero` of the width), ``condition(tokens, size)``, whatever it derives from the mask
    tokens ``(b, l, d)`` alone, and ``forward(x, modulations, conditions, size)`` with the list its ``adaln`` makes and
    a list of what its ``condition`` made, each for an equal part of the batch. `SISMABlock` is one.

    Args:
        block: called with 0 ... depth - 1, gives the blocks.
        dim: width of the tokens.
        depth: number of blocks.
        in_channels: channels of the latent (or image); the output has as many.
        patch_size: side of a token's patch in the latent.
        num_classes: classes of the mask.
        mask_scale: label pixels per latent pixel along a side: 8 for an f8 autoencoder, 1 for pixels.
        class_dim: width of the class embedding before it is patchified.
        mask_input: ``"add"`` also adds the mask tokens to the image tokens; ``"none"`` is SISMA's paper's.
        mask_dropout: probability with which training replaces a mask by the null condition, for guidance.
        time_scale: what t is multiplied by before its sinusoids.
    """

    def __init__(
        self,
        block: Callable[[int], nn.Module],
        *,
        dim: int,
        depth: int,
        in_channels: int = 4,
        patch_size: int = 2,
        num_classes: int = 19,
        mask_scale: int = 8,
        class_dim: int = 16,
        mask_input: str = "none",
        mask_dropout: float = 0.0,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        if mask_input not in _MASK_INPUTS:
            raise ValueError(
                f"mask_input must be 'none' or 'add', got {mask_input!r}{closest(mask_input, _MASK_INPUTS)}"
            )
        if not 0 <= mask_dropout < 1:
            raise ValueError(f"mask_dropout must be in [0, 1), got {mask_dropout}")
        if depth < 1:
            raise ValueError(f"depth must be positive, got {depth}")
        _warn_if_narrow(dim, patch_size, in_channels)
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.num_classes = num_classes
        self.mask_scale = mask_scale
        self.mask_input = mask_input
        self.mask_dropout = mask_dropout
        self.patchify = Patchify(in_channels, dim, patch_size)
        self.position = PositionEmbedding(dim)
        self.time_embedding = TimeEmbedding(dim, scale=time_scale)
        self.mask_encoder = MaskEncoder(dim, num_classes, mask_scale * patch_size, class_dim)
        self.blocks: Any = nn.ModuleList(block(i) for i in range(depth))
        self.head_adaln = AdaLNZero(dim, sublayers=1, gates=False)
        self.head = Unpatchify(dim, in_channels, patch_size)

    def forward(
        self,
        x: Tensor,
        t: Tensor | None,
        mask: Tensor | None = None,
        *,
        cond: MaskCondition | list[MaskCondition] | None = None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity at ``x`` and time ``t``.

        Args:
            x: ``(b, c, h, w)``.
            t: ``(b,)``, or ``(1,)`` for one time for all; 0 is noise, 1 is data.
            mask: what `condition` takes; None is the null condition.
            cond: the result of `condition`, instead of ``mask``. Made from one mask it serves any batch. Several in a
                list serve as many equal parts of the batch, as guidance needs it.
            modulation: rows of `modulation` made for ``t``, which is then not looked at and may be None.

        Returns:
            ``(b, c, h, w)``.

        Raises:
            ValueError: shapes that do not fit, a label out of range, or both ``mask`` and ``cond`` given.
            TypeError: x of another dtype than the weights, or a mask of the wrong dtype.
        """
        if mask is not None and cond is not None:
            raise ValueError("give either mask or cond, not both: cond was already made from a mask")
        self._check_dtype(x)
        tokens = self.patchify(x).to(x.dtype)  # under autocast the residual stream stays float32
        size = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        if cond is None:
            cond = self.condition(mask, size=(x.shape[2], x.shape[3]))
        conds = [cond] if isinstance(cond, MaskCondition) else cond
        part = part_of_batch(conds, x.shape[0], size)
        tokens = self.position(tokens, size)
        if self.mask_input == "add":
            added = [own.tokens for own in conds if own.tokens is not None]
            tokens = torch.cat([some + own for some, own in zip(tokens.split(part), added, strict=True)])
        *layers, (head,) = self._modulations(t, modulation, x.shape[0])
        for block, layer, *own in zip(self.blocks, layers, *(each.layers for each in conds), strict=True):
            tokens = block(tokens, layer, own, size)
        return self.head(head.norm(tokens), size)

    def modulation(self, t: Tensor) -> Tensor:
        """What every AdaLN makes of times ``(n,)``, side by side: ``(n, values)``.

        It depends on the time alone. A sampler computes it for its whole grid at once and passes rows of it to
        ``forward``: the AdaLN weights, over a quarter of the model's, are then read once and not at every step.
        """
        c = self.time_embedding(t)
        return torch.cat([adaln.project(c) for adaln in self._adalns()], dim=1)

    def _adalns(self) -> list[AdaLNZero]:
        return [*(block.adaln for block in self.blocks), self.head_adaln]

    def _modulations(self, t: Tensor | None, rows: Tensor | None, batch: int) -> list[list[Modulation]]:
        """The modulations of each block and of the head."""
        adalns = self._adalns()
        if rows is None:
            if t is None or t.dim() != 1 or t.shape[0] not in (1, batch):
                given = None if t is None else tuple(t.shape)
                raise ValueError(f"t must be ({batch},), one time per image, or (1,), got {given}")
            c = self.time_embedding(t)
            return [adaln(c) for adaln in adalns]
        widths = [adaln.width for adaln in adalns]
        if tuple(rows.shape) not in ((1, sum(widths)), (batch, sum(widths))):
            raise ValueError(
                f"modulation must be ({batch}, {sum(widths)}), rows of this model's modulation(t), or (1, "
                f"{sum(widths)}), got {tuple(rows.shape)}"
            )
        return [adaln.divide(part) for adaln, part in zip(adalns, rows.split(widths, dim=1), strict=True)]

    def condition(self, mask: Tensor | None, size: tuple[int, int] | None = None) -> MaskCondition:
        """Everything that depends on the mask alone, to be computed once and reused at every step.

        Args:
            mask: integer labels ``(b, s h, s w)``, or one-hot classes ``(b, num_classes, s h, s w)`` of a floating
                dtype; None is the null condition. In training, ``mask_dropout`` of the items become the null condition.
            size: (h, w) of the latent. Needed where the mask does not tell it: for None, and for labels given at the
                latent's own size, which are then repeated s times.

        Raises:
            ValueError: wrong shape, other classes than the model's, or a label out of range (its value, count and first
                position are named).
            TypeError: labels that are not integers.
        """
        device = self.mask_encoder.proj.weight.device
        keep = None
        if mask is None:
            if size is None:
                raise ValueError("the null condition needs size=(height, width) of the latent")
            mask = torch.zeros(
                1, size[0] * self.mask_scale, size[1] * self.mask_scale, dtype=torch.uint8, device=device
            )
            keep = torch.zeros(1, dtype=torch.bool, device=device)
        elif self.training and self.mask_dropout:
            keep = torch.rand(mask.shape[0], device=device) >= self.mask_dropout
        mask = self._at_label_resolution(mask, size).to(device)
        grid = mask.shape[-2] // self.mask_encoder.patch_size, mask.shape[-1] // self.mask_encoder.patch_size
        tokens = self.mask_encoder(mask, keep)
        layers = tuple(block.condition(tokens, grid) for block in self.blocks)
        return MaskCondition(grid, tokens.shape[0], tokens if self.mask_input == "add" else None, layers)

    def _check_dtype(self, x: Tensor) -> None:
        weights = self.head.proj.weight.dtype
        device = x.device.type
        if x.dtype != weights and not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            raise TypeError(f"x is {x.dtype} but the model's weights are {weights}: convert one, e.g. x.to({weights})")

    def _at_label_resolution(self, mask: Tensor, size: tuple[int, int] | None) -> Tensor:
        scale = self.mask_scale
        given = tuple(mask.shape[-2:])
        if size is None or given == (size[0] * scale, size[1] * scale):
            return mask
        if given == tuple(size):
            return mask.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
        raise ValueError(
            f"a latent of {size[0]} x {size[1]} takes a mask of {size[0] * scale} x {size[1] * scale} "
            f"(mask_scale {scale}) or of its own size, got {' x '.join(map(str, given))}: resize the labels by nearest"
        )


def part_of_batch(conds: list[MaskCondition], batch: int, size: tuple[int, int]) -> int:
    """How many images each condition serves; refuses conditions made for another batch or size."""
    if not conds or batch % len(conds):
        raise ValueError(f"{len(conds)} conditions cannot serve equal parts of a batch of {batch}")
    part = batch // len(conds)
    for cond in conds:
        if cond.size != size:
            raise ValueError(f"cond was made for {cond.size} (height, width in tokens), x has {size}: make it again")
        if cond.batch not in (1, part):
            raise ValueError(
                f"the condition was made for batch {cond.batch}, x has batch {part}: give one mask or one each"
            )
    return part


def _warn_if_narrow(dim: int, patch_size: int, channels: int) -> None:
    values = patch_size**2 * channels
    if dim < 2 * values:
        warnings.warn(
            f"width {dim} is under twice the {values} values (patch_size^2 x channels) that each token carries: the "
            "noise a velocity must contain does not fit through, and training stalls. Use a smaller patch or a "
            "larger dim.",
            stacklevel=4,
        )
