"""SDM (arXiv 2207.00050): a pixel UNet whose decoder is steered by the mask through SPADE, SISMA's rival in its paper.

The UNet is that of guided diffusion: residual blocks that also halve or double the image, attention at the coarse
levels, time as scale and shift after the second norm. The mask enters in the middle and the decoder alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssmgen.conditions import OneHotMap
from ssmgen.models.conditional import ConditionalModel, Conditioning, batch_of
from ssmgen.models.sisma import NUM_CLASSES
from ssmgen.nn import SPADE, SelfAttention, TimeEmbedding
from ssmgen.nn.signal import Signal
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

    def condition(self, mask: Signal, size: tuple[int, int]) -> tuple[Any, Any] | None:
        """Scale and shift maps of both norms for an input of ``size``; None where the block is not steered."""
        if not self.steered:
            return None
        return self.norm1.condition(mask, size), self.norm2.condition(mask, self.size_after(size))  # type: ignore[operator]

    def size_after(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the output for an input of ``size``."""
        return int(size[0] * self.resize), int(size[1] * self.resize)

    def forward(self, x: Tensor, time: Tensor, conds: list[Any]) -> Tensor:
        """``(b, channels, h, w)``, what ``self.time`` made of the time, and one condition per part of the batch."""
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


@register(
    "model", "sdm-debug", channels=32, multipliers=(1, 2), attention_levels=(1,), head_dim=16, num_classes=NUM_CLASSES
)
@register("model", "sdm", num_classes=NUM_CLASSES)
class SDM(ConditionalModel):
    """Velocity model in pixels, or of latents: UNet with SPADE group norms in middle and decoder.

    ``sdm`` is the paper's size for 256 x 256: attention at 32, 16 and 8 pixels. Its 652,998,403 parameters are the
    653 M that SISMA's paper gives; the head has no variance channels, which flow matching does not need.

    Args:
        num_classes: classes of the mask.
        channels: of the finest level.
        multipliers: channels of each level as a multiple of that; each level halves the image.
        blocks_per_level: residual blocks of a level in the encoder; the decoder has one more.
        attention_levels: levels with attention, 0 is the finest.
        head_dim: width of an attention head.
        in_channels: channels of the image; the output has as many.
        mask_scale: label pixels per pixel along a side: 1 for images, 8 for latents of an f8 autoencoder.
        mask_dropout: probability with which training replaces a mask by the null, an all-zero one-hot map.
        time_scale: what t is multiplied by before its sinusoids.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int = 256,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4, 4),
        blocks_per_level: int = 2,
        attention_levels: Sequence[int] = (3, 4, 5),
        head_dim: int = 64,
        in_channels: int = 3,
        mask_scale: int = 1,
        mask_dropout: float = 0.0,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        self.in_channels, self.patch_size, self.multiple = in_channels, 1, 2 ** (len(multipliers) - 1)
        self.set_conditions({"mask": OneHotMap(num_classes, mask_scale, mask_dropout)})
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

    def predict(self, x: Tensor, rows: Sequence[Tensor], conds: list[Conditioning]) -> Tensor:
        """See `ConditionalModel.predict`; ``x`` is ``(batch, channels, height, width)``."""
        h, kept = self.first(x), []
        kept.append(h)
        for i, (block, row, *own) in enumerate(zip(self.blocks, rows, *(c.blocks for c in conds), strict=True)):
            if i >= self.decoding and block.resize == 1:
                h = torch.cat([h, kept.pop()], dim=1)
            h = self.run_block(i, h, row, own)
            if i < self.encoder:
                kept.append(h)
        return self.head(F.silu(self.head_norm(h)))

    def _conditioning(self, signals: dict[str, Signal], size: tuple[int, int]) -> Conditioning:
        grid, states = size, []
        for block in self.blocks:
            states.append(block.condition(signals["mask"], size))
            size = block.size_after(size)
        return Conditioning(grid, batch_of(signals), None, None, tuple(states))

    def project(self, c: Tensor) -> list[Tensor]:
        """Scale and shift of every block, ``(batch, width)`` each, from vectors ``(batch, time_dim)``."""
        c = F.silu(c)
        return [block.time(c) for block in self.blocks]

    def fsdp_units(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        """Every block, and its layer for the time by itself: `project` uses it before the first block runs."""
        return [shard for block in self.blocks for shard in ((block.time, ()), (block, ("condition",)))]

    @property
    def widths(self) -> list[int]:
        """Values of each block's scale and shift."""
        return [block.time.out_features for block in self.blocks]
