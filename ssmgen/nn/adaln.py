"""Adaptive norms: shift and scale of a norm, and a residual's gate, come from a conditioning vector."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmgen.ops import norm
from ssmgen.registry import closest, register

_NORMS = ("layer", "rms")


class Modulation(NamedTuple):
    """Shift, scale and gate of one sublayer, each ``(batch, 1, dim)``; the gate is None where none was asked for.

    ``rms`` says which norm is modulated: RMSNorm, or LayerNorm where False.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor | None
    rms: bool = False

    def norm(self, x: Tensor) -> Tensor:
        """``Norm(x) (1 + scale) + shift`` of tokens ``(batch, length, dim)``, in float32 (float64 for float64)."""
        if not self.rms:
            return norm(x, 1 + self.scale, self.shift, eps=1e-6)
        return (_rms_norm(x) * (1 + self.scale) + self.shift).to(x.dtype)

    def residual(self, x: Tensor, update: Tensor) -> Tensor:
        """``x + gate * update``."""
        return x + update if self.gate is None else x + self.gate * update


class _Modulator(nn.Module):
    """What the modulators of a block share: how many values they make, and how these are divided.

    The weights of an RMSNorm are a part of the scales: `Modulation` has no weights of its own.
    """

    def __init__(self, dim: int, sublayers: int, gates: bool, norm: str) -> None:
        super().__init__()
        if dim < 1 or sublayers < 1:
            raise ValueError(f"dim and sublayers must be positive, got dim={dim}, sublayers={sublayers}")
        if norm not in _NORMS:
            raise ValueError(f"norm must be 'layer' or 'rms', got {norm!r}{closest(norm, _NORMS)}")
        self.dim, self.sublayers, self.gates, self.kind = dim, sublayers, gates, norm
        self.norm_weight = nn.Parameter(torch.ones(sublayers * dim)) if norm == "rms" else None

    @property
    def width(self) -> int:
        """Values per conditioning vector."""
        return self.sublayers * (3 if self.gates else 2) * self.dim

    def divide(self, projected: Tensor) -> list[Modulation]:
        """What `project` made, ``(batch, width)``, as one `Modulation` per sublayer."""
        parts = projected.unsqueeze(1).chunk(self.width // self.dim, dim=-1)
        each, rms = (3 if self.gates else 2), self.kind == "rms"
        gates = parts[2::3] if self.gates else [None] * self.sublayers
        return [Modulation(*each, rms) for each in zip(parts[0::each], parts[1::each], gates, strict=True)]

    def _weighted(self, projected: Tensor) -> Tensor:
        """Scales such that ``1 + scale`` includes the norm's weights; ``(..., width)`` in and out."""
        if self.norm_weight is None:
            return projected
        parts = list(projected.chunk(self.width // self.dim, dim=-1))
        each = 3 if self.gates else 2
        for i, weight in enumerate(self.norm_weight.chunk(self.sublayers)):
            parts[each * i + 1] = (1 + parts[each * i + 1]) * weight - 1
        return torch.cat(parts, dim=-1)


@register("block", "adaln")
class AdaLNZero(_Modulator):
    """Modulations for the sublayers of a block from one conditioning vector (DiT, arXiv 2212.09748, section 3.2).

    ``(shift, scale, gate)_i = Linear(SiLU(c))``. The linear map starts at zero, so that a block with gates starts as
    the identity.

    Args:
        dim: width of the tokens and of the conditioning vector.
        sublayers: how many modulations to produce.
        gates: produce gates too; without them a sublayer's update is added as it is.
        norm: what is modulated: ``"layer"``, a LayerNorm without weights, or ``"rms"``, an RMSNorm with weights.
    """

    def __init__(self, dim: int, sublayers: int = 1, gates: bool = True, norm: str = "layer") -> None:
        super().__init__(dim, sublayers, gates, norm)
        self.linear = nn.Linear(dim, self.width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, c: Tensor) -> list[Modulation]:
        """Conditioning vectors ``(batch, dim)`` to one `Modulation` per sublayer."""
        return self.divide(self.project(c))

    def project(self, c: Tensor) -> Tensor:
        """Conditioning vectors ``(..., dim)`` to all shifts, scales and gates side by side, ``(..., width)``."""
        if c.dim() < 2 or c.shape[-1] != self.linear.in_features:
            raise ValueError(f"c must be (batch, {self.linear.in_features}), got {tuple(c.shape)}")
        return self._weighted(self.linear(F.silu(c)))


@register("block", "adaln-single")
class AdaLNSingle(_Modulator):
    """A block's offsets to modulations that all blocks share (PixArt, arXiv 2310.00426, section 2.3).

    The model makes the shared values once, by one linear map for all blocks, so that a block holds one vector where
    `AdaLNZero` holds a matrix. As in DiM (arXiv 2405.14224) a gate is 1 plus its offset and its shared value.

    Args:
        dim: width of the tokens.
        sublayers, gates, norm: as of `AdaLNZero`.
    """

    #: Tells a model to make the values that the blocks share.
    shares = True

    def __init__(self, dim: int, sublayers: int = 1, gates: bool = True, norm: str = "layer") -> None:
        super().__init__(dim, sublayers, gates, norm)
        offsets = torch.randn(sublayers, self.width // (sublayers * dim), dim) / dim**0.5
        if gates:
            offsets[:, 2] += 1
        self.offsets = nn.Parameter(offsets.flatten())

    def forward(self, shared: Tensor) -> list[Modulation]:
        """Shared values ``(batch, width)`` to one `Modulation` per sublayer."""
        return self.divide(self.project(shared))

    def project(self, shared: Tensor) -> Tensor:
        """The shared values ``(..., width)`` plus the block's own."""
        if shared.shape[-1] != self.width:
            raise ValueError(f"shared must be (batch, {self.width}), got {tuple(shared.shape)}")
        return self._weighted(shared + self.offsets)


class PlainNorm(nn.Module):
    """In the place of a head's AdaLN: an RMSNorm with weights, then a LayerNorm without (ZigMa, arXiv 2403.13802).

    Args:
        dim: width of the tokens.
    """

    width = 0

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def project(self, c: Tensor) -> Tensor:
        """Nothing of the conditioning vectors ``(..., dim)``: ``(..., 0)``."""
        return c[..., :0]

    def divide(self, projected: Tensor) -> "list[PlainNorm]":
        """Itself, whatever the ``(batch, 0)`` values."""
        return [self]

    def norm(self, x: Tensor) -> Tensor:
        """Tokens ``(batch, length, dim)`` normalised."""
        return F.layer_norm(_rms_norm(x) * self.weight, x.shape[-1:], eps=1e-6).to(x.dtype)


def _rms_norm(x: Tensor) -> Tensor:
    """RMSNorm (arXiv 1910.07467) of ``(..., dim)`` in float32, or in float64 if it is."""
    return F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:], eps=1e-5)
