"""SDM (arXiv 2207.00050): a pixel UNet whose decoder is steered by the mask through SPADE, SISMA's rival in its paper.

The UNet is that of guided diffusion: residual blocks that also halve or double the image, attention at the coarse
levels, time as scale and shift after the second norm. The mask enters in the middle and the decoder alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssmgen.models.conditioned import MaskCondition, part_of_batch
from ssmgen.nn import SPADE, SelfAttention, TimeEmbedding
from ssmgen.ops.label_check import check_labels
from ssmgen.registry import register


class SDMBlock(nn.Module):
    """Residual block: norm, SiLU, (resize,) conv, norm, time's scale and shift, SiLU, conv; then attention if asked.

    Args:
        channels, out_channels: of its input and output.
        time_dim: width of the time embedding.
        num_classes: of the mask; both norms are SPADE. 0 makes them plain group norms.
        resize: 0.5 halves the image, 2 doubles it, 1 keeps it.
        head_dim: width of an attention head; 0 is without attention.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        time_dim: int,
        *,
        num_classes: int = 0,
        resize: float = 1,
        head_dim: int = 0,
    ) -> None:
        super().__init__()
        self.resize = resize
        self.steered = num_classes > 0
        self.norm1 = SPADE(channels, num_classes) if self.steered else nn.GroupNorm(32, channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_channels)
        self.norm2 = SPADE(out_channels, num_classes) if self.steered else nn.GroupNorm(32, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        self.attention_norm = nn.GroupNorm(32, out_channels) if head_dim else None
        self.attention = SelfAttention(out_channels, out_channels // head_dim) if head_dim else None

    def condition(self, mask: Tensor, size: tuple[int, int]) -> tuple[Any, Any] | None:
        """Scale and shift maps of both norms for an input of ``size``; None where the block is not steered."""
        if not self.steered:
            return None
        after = int(size[0] * self.resize), int(size[1] * self.resize)
        return self.norm1.condition(mask, size), self.norm2.condition(mask, after)  # type: ignore[operator]

    def forward(self, x: Tensor, time: Tensor, conds: list[Any]) -> Tensor:
        """``(b, channels, h, w)``, what ``self.time`` made of the time embedding, and one condition per batch part."""
        steer1, steer2 = ([[own[i] for own in conds]] if self.steered else [] for i in (0, 1))
        h = F.silu(self.norm1(x, *steer1))
        h = self.conv1(self._resized(h))
        scale, shift = time[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm2(h, *steer2) * (1 + scale) + shift)
        x = self.skip(self._resized(x)) + self.conv2(h)
        if self.attention is None or self.attention_norm is None:
            return x
        size = (x.shape[2], x.shape[3])
        mixed = self.attention(rearrange(self.attention_norm(x), "b c h w -> b (h w) c"), size)
        return x + rearrange(mixed, "b (h w) c -> b c h w", h=size[0])

    def _resized(self, x: Tensor) -> Tensor:
        if self.resize == 0.5:
            return F.avg_pool2d(x, 2)
        return x if self.resize == 1 else F.interpolate(x, scale_factor=2.0, mode="nearest")


@register("model", "sdm-debug", channels=32, multipliers=(1, 2), attention_levels=(1,), head_dim=16)
@register("model", "sdm")
class SDM(nn.Module):
    """Velocity model in pixels: UNet with SPADE group norms in middle and decoder.

    ``sdm`` is the paper's size for 256 x 256: attention at 32, 16 and 8 pixels. Its parameters lie within 5 % of the
    653 M that SISMA's paper gives; the head has no variance channels, which flow matching does not need.

    Args:
        channels: of the finest level.
        multipliers: channels of each level as a multiple of that; each level halves the image.
        blocks_per_level: residual blocks of a level in the encoder; the decoder has one more.
        attention_levels: levels with attention, 0 is the finest.
        head_dim: width of an attention head.
        in_channels: channels of the image; the output has as many.
        num_classes: classes of the mask.
        mask_dropout: probability with which training replaces a mask by the null condition, an all-zero one-hot map.
        time_scale: what t is multiplied by before its sinusoids.
    """

    patch_size = 1
    mask_scale = 1

    def __init__(
        self,
        *,
        channels: int = 256,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4, 4),
        blocks_per_level: int = 2,
        attention_levels: Sequence[int] = (3, 4, 5),
        head_dim: int = 64,
        in_channels: int = 3,
        num_classes: int = 19,
        mask_dropout: float = 0.0,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.mask_dropout = mask_dropout
        self.multiple = 2 ** (len(multipliers) - 1)
        time_dim = 4 * channels
        self.time_embedding = TimeEmbedding(time_dim, frequency_dim=channels, scale=time_scale)
        self.first = nn.Conv2d(in_channels, channels, 3, padding=1)
        widths, attended = [channels * m for m in multipliers], set(attention_levels)
        encoder, kept, width = list[SDMBlock](), [channels], channels
        for level, wide in enumerate(widths):
            head = head_dim if level in attended else 0
            for _ in range(blocks_per_level):
                encoder.append(SDMBlock(width, wide, time_dim, head_dim=head))
                width = wide
                kept.append(width)
            if level + 1 < len(widths):
                encoder.append(SDMBlock(width, width, time_dim, resize=0.5))
                kept.append(width)
        middle = [SDMBlock(width, width, time_dim, num_classes=num_classes, head_dim=h) for h in (head_dim, 0)]
        decoder = list[SDMBlock]()
        for level, wide in reversed(list(enumerate(widths))):
            head = head_dim if level in attended else 0
            for _ in range(blocks_per_level + 1):
                decoder.append(SDMBlock(width + kept.pop(), wide, time_dim, num_classes=num_classes, head_dim=head))
                width = wide
            if level:
                decoder.append(SDMBlock(width, width, time_dim, num_classes=num_classes, resize=2))
        self.encoder, self.decoding = len(encoder), len(encoder) + len(middle)
        self.blocks: Any = nn.ModuleList([*encoder, *middle, *decoder])
        self.head_norm = nn.GroupNorm(32, width)
        self.head = nn.Conv2d(width, in_channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor,
        t: Tensor | None,
        mask: Tensor | None = None,
        *,
        cond: MaskCondition | list[MaskCondition] | None = None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity; arguments as in `MaskConditioned.forward`, ``x`` in pixels.

        Raises:
            ValueError: a side that is no multiple of the coarsest level's pixel, or as in `MaskConditioned.forward`.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels or x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(
                f"x must be (batch, {self.in_channels}, height, width) with sides multiples of {self.multiple}, "
                f"got {tuple(x.shape)}"
            )
        size = (x.shape[2], x.shape[3])
        if cond is None:
            cond = self.condition(mask, size)
        conds = [cond] if isinstance(cond, MaskCondition) else cond
        part_of_batch(conds, x.shape[0], size)
        if modulation is None:
            if t is None or t.shape not in ((1,), (x.shape[0],)):
                given = None if t is None else tuple(t.shape)
                raise ValueError(f"t must be ({x.shape[0]},), one time per image, or (1,), got {given}")
            modulation = self.modulation(t)
        times = modulation.split([block.time.out_features for block in self.blocks], dim=1)
        h, kept = self.first(x), []
        kept.append(h)
        for i, (block, time, *own) in enumerate(zip(self.blocks, times, *(c.layers for c in conds), strict=True)):
            if i >= self.decoding and block.resize == 1:
                h = torch.cat([h, kept.pop()], dim=1)
            h = block(h, time, own)
            if i < self.encoder:
                kept.append(h)
        return self.head(F.silu(self.head_norm(h)))

    def modulation(self, t: Tensor) -> Tensor:
        """Time's scales and shifts in all blocks for times ``(n,)``, side by side: ``(n, values)``."""
        c = F.silu(self.time_embedding(t))
        return torch.cat([block.time(c) for block in self.blocks], dim=1)

    def condition(self, mask: Tensor | None, size: tuple[int, int] | None = None) -> MaskCondition:
        """Every SPADE map, once per mask; arguments as in `MaskConditioned.condition`."""
        weight = self.first.weight
        if mask is None:
            if size is None:
                raise ValueError("the null condition needs size=(height, width) of the image")
            one_hot = torch.zeros(1, self.num_classes, *size, dtype=weight.dtype, device=weight.device)
        else:
            one_hot = self._one_hot(mask.to(weight.device)).to(weight.dtype)
            if self.training and self.mask_dropout:
                keep = torch.rand(len(one_hot), device=weight.device) >= self.mask_dropout
                one_hot = one_hot * keep.view(-1, 1, 1, 1)
        height, width = made_for = (one_hot.shape[2], one_hot.shape[3])
        layers = []
        for block in self.blocks:
            layers.append(block.condition(one_hot, (height, width)))
            height, width = int(height * block.resize), int(width * block.resize)
        return MaskCondition(made_for, len(one_hot), None, tuple(layers))

    def _one_hot(self, mask: Tensor) -> Tensor:
        if mask.dim() == 4:
            return mask
        if not (mask.is_meta or torch.compiler.is_compiling()):
            check_labels(mask, self.num_classes)
        return rearrange(F.one_hot(mask.long(), self.num_classes), "b h w c -> b c h w")
