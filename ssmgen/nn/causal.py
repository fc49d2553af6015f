"""The original Mamba block over a 2-D grid of tokens: its convolution, too, runs along the scan.

Letters: b batch, l length (= height x width tokens), d dim, e inner width (expand x dim).
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ssmgen.nn.mamba import ScanConstants, SelectiveSSM, check_tokens
from ssmgen.ops import reorder, scan_order
from ssmgen.registry import passes_on, register


class CausalSSM(SelectiveSSM):
    """`SelectiveSSM` as in the original block: a causal convolution along the sequence, and no norm after the scan.

    Args:
        dim: width of the tokens.
        d_conv: tokens that the convolution sees, the current one and those before it.
        **ssm: other arguments of `SelectiveSSM`, without ``order`` and ``directions``.
    """

    @passes_on(SelectiveSSM, "order", "directions")
    def __init__(self, dim: int, *, d_conv: int = 4, **ssm: Any) -> None:
        super().__init__(dim, **ssm)
        if d_conv < 1:
            raise ValueError(f"d_conv must be positive, got {d_conv}")
        inner = self.d_inner
        self.conv: Any = nn.Conv1d(inner, inner, d_conv, padding=d_conv - 1, groups=inner)
        self.out_norm: Any = nn.Identity()

    def mix_locally(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Causal depthwise convolution and SiLU of a sequence ``(b, l, e)`` that is in the scan's order."""
        return F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))

    def finish(self, y: Tensor, z: Tensor) -> Tensor:
        """Scan output ``(b, l, e)`` gated by ``z`` and projected to ``(b, l, d)``."""
        return self.out_proj(y * F.silu(z))


@register("block", "mamba")
class Mamba(nn.Module):
    """The Mamba block of its paper (arXiv 2312.00752, section 3.4), on the tokens of a grid in one scan order.

    ``x, z = in_proj(content)``; ``x = SiLU(causal conv1d(x))``; ``delta, B, C = linear(x)``;
    ``y = scan(x, delta, A, B, C) + D x``; output ``out_proj(y * SiLU(z))``. `SelfMamba` has a convolution over the
    grid and a norm after the scan instead.

    Args:
        dim: width of the tokens.
        order: the sequence in which the grid is scanned, a name that `ssmgen.ops.scan_order` takes.
        **ssm: other arguments of `CausalSSM`.
    """

    @passes_on(CausalSSM)
    def __init__(self, dim: int, *, order: str = "row", **ssm: Any) -> None:
        super().__init__()
        scan_order(order, 1, 1)  # an unknown order is an error here, not in the first forward
        self.order = order
        self.ssm = CausalSSM(dim, **ssm)  # gets the sequence in this order
        self.in_proj = nn.Linear(dim, 2 * self.ssm.d_inner, bias=False)
        self.x_proj = nn.Linear(self.ssm.d_inner, self.ssm.dt_rank + 2 * self.ssm.d_state, bias=False)

    def constants(self, size: tuple[int, int]) -> ScanConstants:
        """What sampling computes once for a grid of ``size``, (height, width); the order is that of the layer."""
        order = scan_order(self.order, *size, device=self.ssm.A_log.device)
        return ScanConstants(self.ssm.constants(size).A, (order,))

    def forward(self, x: Tensor, size: tuple[int, int], constants: ScanConstants | None = None) -> Tensor:
        """Mix tokens ``(batch, height * width, dim)`` in row-major order; ``size`` is (height, width) in tokens.

        ``constants`` is the result of `constants`, to compute it once; its A is not used where gradients are needed.

        Raises:
            ValueError: the tokens do not fit ``size`` or the layer's width.
        """
        check_tokens(x, size, self.in_proj.in_features, "x")
        ssm = self.ssm
        order = scan_order(self.order, *size, device=x.device) if constants is None else constants.orders[0]
        sequence = x if order is None else reorder(x, order.forward)
        content, z = self.in_proj(sequence).chunk(2, dim=-1)
        u = ssm.mix_locally(content, size)
        dt, B, C = self.x_proj(u).split([ssm.dt_rank, ssm.d_state, ssm.d_state], dim=-1)
        y = ssm.scan(u, ssm.step_size(dt), B, C, size, [None], constants)  # the sequence is in order already
        out = ssm.finish(y, z)
        return out if order is None else reorder(out, order.inverse)
