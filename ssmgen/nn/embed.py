"""Time and position embeddings."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ssmgen.registry import register


@register("block", "time-embedding")
class TimeEmbedding(nn.Module):
    """t in [0, 1] to a vector: sinusoids (arXiv 1706.03762, section 3.5) of ``scale * t``, then a perceptron (DiT).

    Args:
        dim: width of the result.
        frequency_dim: number of sinusoids, even.
        scale: what t is multiplied by first; 1000 gives the frequencies their usual range.
    """

    def __init__(self, dim: int, frequency_dim: int = 256, scale: float = 1000.0) -> None:
        super().__init__()
        if frequency_dim % 2:
            raise ValueError(f"frequency_dim must be even, got {frequency_dim}")
        self.frequency_dim = frequency_dim
        self.scale = scale
        self.mlp: Any = nn.Sequential(nn.Linear(frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        layers: tuple[Any, ...] = (self.mlp[0], self.mlp[2])
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor) -> Tensor:
        """``(batch,)`` times to ``(batch, dim)``."""
        if t.dim() != 1:
            raise ValueError(f"t must be (batch,), one time in [0, 1] per image, got {tuple(t.shape)}")
        half = self.frequency_dim // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
        angles = self.scale * t.float().unsqueeze(1) * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


def sincos_position(dim: int, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Fixed 2-D sine-cosine position embedding ``(height * width, dim)``, row-major, for any grid.

    Half of the channels encode the row and half the column (Vaswani et al., arXiv 1706.03762, section 3.5, in 2-D as in
    DiT and MAE). No table has a trained size, so other resolutions need no interpolation and fit every checkpoint.

    Raises:
        ValueError: ``dim`` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"the width must be a multiple of 4 for a 2-D sine-cosine embedding, got {dim}")
    # A graph being compiled holds the computation itself; the cache would break it.
    position = _position if torch.compiler.is_compiling() else _kept_position
    return position(dim, height, width, torch.device(device))


def _position(dim: int, height: int, width: int, device: torch.device) -> Tensor:
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 4, device=device) / (dim // 4))
    rows = torch.arange(height, device=device).unsqueeze(1) * frequencies
    columns = torch.arange(width, device=device).unsqueeze(1) * frequencies
    rows = torch.cat([rows.sin(), rows.cos()], dim=1).unsqueeze(1).expand(height, width, dim // 2)
    columns = torch.cat([columns.sin(), columns.cos()], dim=1).unsqueeze(0).expand(height, width, dim // 2)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


@lru_cache(maxsize=32)
def _kept_position(dim: int, height: int, width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is kept must serve training too
        return _position(dim, height, width, device)


@register("block", "position-embedding")
class PositionEmbedding(nn.Module):
    """Adds `sincos_position` to tokens; has no weights.

    Args:
        dim: width of the tokens, a multiple of 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        sincos_position(dim, 1, 1)  # an impossible width is an error here, not in the first forward
        self.dim = dim

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens ``(batch, height * width, dim)`` plus their positions; ``size`` is (height, width) in tokens."""
        return tokens + sincos_position(self.dim, *size, device=tokens.device).to(tokens.dtype)
