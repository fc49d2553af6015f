"""AdaLN-Zero: layer norms whose shift and scale, and residual gates, come from a conditioning vector."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ssmgen.ops import norm
from ssmgen.registry import register


class Modulation(NamedTuple):
    """Shift, scale and gate of one sublayer, each ``(batch, 1, dim)``; the gate is None where none was asked for."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None

    def norm(self, x: Tensor) -> Tensor:
        """``LayerNorm(x) (1 + scale) + shift``, the norm without weights of its own and in float32."""
        return norm(x, 1 + self.scale, self.shift, eps=1e-6)

    def residual(self, x: Tensor, update: Tensor) -> Tensor:
        """``x + gate * update``."""
        return x + update if self.gate is None else x + self.gate * update


@register("block", "adaln")
class AdaLNZero(nn.Module):
    """Modulations for the sublayers of a block from one conditioning vector (DiT, arXiv 2212.09748, section 3.2).

    ``(shift, scale, gate)_i = Linear(SiLU(c))``. The linear map starts at zero, so that a block with gates starts as
    the identity.

    Args:
        dim: width of the tokens and of the conditioning vector.
        sublayers: how many modulations to produce.
        gates: produce gates too; without them a sublayer's update is added as it is.
    """

    def __init__(self, dim: int, sublayers: int = 1, gates: bool = True) -> None:
        super().__init__()
        if dim < 1 or sublayers < 1:
            raise ValueError(f"dim and sublayers must be positive, got dim={dim}, sublayers={sublayers}")
        self.sublayers = sublayers
        self.gates = gates
        self.linear = nn.Linear(dim, sublayers * (3 if gates else 2) * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @property
    def width(self) -> int:
        """Values per conditioning vector."""
        return self.linear.out_features

    def forward(self, c: Tensor) -> list[Modulation]:
        """Conditioning vectors ``(batch, dim)`` to one `Modulation` per sublayer."""
        return self.divide(self.project(c))

    def project(self, c: Tensor) -> Tensor:
        """Conditioning vectors ``(..., dim)`` to all shifts, scales and gates side by side, ``(..., width)``."""
        if c.dim() < 2 or c.shape[-1] != self.linear.in_features:
            raise ValueError(f"c must be (batch, {self.linear.in_features}), got {tuple(c.shape)}")
        return self.linear(F.silu(c))

    def divide(self, projected: Tensor) -> list[Modulation]:
        """What `project` made, ``(batch, width)``, as one `Modulation` per sublayer."""
        parts = projected.unsqueeze(1).chunk(self.sublayers * (3 if self.gates else 2), dim=-1)
        if not self.gates:
            return [Modulation(parts[2 * i], parts[2 * i + 1], None) for i in range(self.sublayers)]
        return [Modulation(*parts[3 * i : 3 * i + 3]) for i in range(self.sublayers)]
