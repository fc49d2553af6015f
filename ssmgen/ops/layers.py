"""The pointwise work around the scan: norm, gate, depthwise convolution, GELU, sums of embedding rows.

On a CPU each is one kernel of `ssmgen.ops.cpu_layers`; elsewhere, and for other dtypes, it is torch's own functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ssmgen.ops import cpu_layers


def norm(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """``(LayerNorm(x) weight + bias) SiLU(z)``, over the channels; computed in float32 (float64 for float64).

    With ``weight = 1 + scale`` and ``bias = shift`` per image it is AdaLN (DiT); with a gate ``z`` it is what Mamba-2
    and VMamba do after the scan.

    Args:
        x: tokens, ``(batch, length, dim)``.
        weight, bias: ``(dim,)``, or one row an image, ``(batch, dim)``; ``(1, dim)`` serves all.
        z: gate of the shape and dtype of ``x``; None for none.
        eps: added to the variance.

    Returns:
        Shape and dtype of ``x``.
    """
    precision = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (p.to(precision).view(-1, x.shape[-1]) for p in (weight, bias))
    if cpu_layers.runs(x):
        return cpu_layers.norm(x, weight, bias, None if z is None else z.to(x.dtype), eps)
    normed = F.layer_norm(x.to(precision), x.shape[-1:], eps=eps) * weight.unsqueeze(1) + bias.unsqueeze(1)
    return (normed if z is None else normed * F.silu(z.to(precision))).to(x.dtype)


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """Depthwise convolution over a grid of tokens, padded with zeros to keep its size, then SiLU.

    Args:
        x: tokens in row-major order, ``(batch, height * width, dim)``; may be a slice of wider rows.
        weight: ``(dim, 1, k, k)``, k odd.
        bias: ``(dim,)``.
        size: (height, width).

    Returns:
        Shape and dtype of ``x``.
    """
    if cpu_layers.runs(x):
        return cpu_layers.conv_silu(x, weight.float(), bias.float(), *size)
    grid = rearrange(x, "b (h w) e -> b e h w", h=size[0])  # a channels-last view: nothing is copied
    made = F.conv2d(grid, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return F.silu(rearrange(made, "b e h w -> b (h w) e"))


def gelu(x: Tensor) -> Tensor:
    """GELU approximated by a hyperbolic tangent (Hendrycks and Gimpel), elementwise."""
    return cpu_layers.gelu(x) if cpu_layers.runs(x) else F.gelu(x, approximate="tanh")


def sum_rows(table: Tensor, rows: Tensor, classes: int) -> Tensor:
    """The sum of a few rows of a table for each token: an embedding of what lies at each place of its patch.

    Args:
        table: ``(places * classes, dim)``.
        rows: int64 ``(tokens, places)``; what stands at place p is one of ``p * classes ... (p + 1) * classes - 1``.
        classes: rows that a place has.

    Returns:
        ``(tokens, dim)``, the table's dtype.
    """
    if cpu_layers.runs(table):
        return cpu_layers.sum_rows(table, rows, classes)
    return F.embedding_bag(rows, table, mode="sum")
