"""Mamba-2 over a 2-D grid of tokens: heads that decay as one, scanned by products of matrices.

Letters: b batch, l length (= height x width tokens), d dim, e inner width (expand x dim), h heads, p width of a head,
g groups, n d_state.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmgen.nn.mamba import at_least_float32, check_tokens
from ssmgen.nn.step_size import reset_heads
from ssmgen.ops import conv_silu, scan_order, ssd
from ssmgen.registry import register


@register("block", "mamba2")
class Mamba2(nn.Module):
    """Mamba-2 layer (Dao and Gu, arXiv 2405.21060, section 7.1) with a depthwise convolution over the grid.

    ``z, (x, B, C), delta = in_proj(content)``; ``x, B, C = SiLU(conv3x3(x, B, C))``;
    ``y = ssd(x, softplus(delta + bias), A, B, C) + D x``; output ``out_proj(RMSNorm(y * SiLU(z)))``.
    Initialisation follows the paper's code: -A uniform in [1, 16], D = 1, and a step-size bias whose softplus is
    log-uniform in [1e-3, 1e-1].

    Args:
        dim: width of the tokens.
        d_state: states per channel.
        expand: inner width as a multiple of ``dim``.
        head_dim: width of a head; divides the inner width. The greatest common divisor of that and 64 where None.
        groups: heads share B and C in this many groups; divides the number of heads.
        d_conv: size of the square depthwise kernel; odd.
        order: the sequence in which the grid is scanned, a name that `ssmgen.ops.scan_order` takes.
        backend: form of `ssmgen.ops.ssd`.

    Raises:
        ValueError: a size that is not positive or does not divide the other.
    """

    #: Parameters that stay in float32 where a model samples in 16 bits.
    keep_float32 = ("A_log", "D", "dt_bias")

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 64,
        expand: int = 2,
        head_dim: int | None = None,
        groups: int = 1,
        d_conv: int = 3,
        order: str = "row",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        inner = expand * dim
        head_dim = math.gcd(inner, 64) if head_dim is None else head_dim
        if min(dim, d_state, expand, head_dim, groups, d_conv) < 1 or d_conv % 2 == 0:
            raise ValueError(
                f"dim, d_state, expand, head_dim, groups and d_conv must be positive and d_conv odd, got dim={dim}, "
                f"d_state={d_state}, expand={expand}, head_dim={head_dim}, groups={groups}, d_conv={d_conv}"
            )
        if inner % head_dim or (inner // head_dim) % groups:
            raise ValueError(
                f"head_dim must divide the inner width expand x dim = {inner}, and groups the number of heads, got "
                f"head_dim={head_dim}, groups={groups}"
            )
        scan_order(order, 1, 1)  # an unknown order is an error here, not in the first forward
        self.heads, self.groups, self.d_state = inner // head_dim, groups, d_state
        self.order, self.backend = order, backend
        mixed = inner + 2 * groups * d_state  # x, B and C
        self.in_proj = nn.Linear(dim, inner + mixed + self.heads, bias=False)
        self.conv = nn.Conv2d(mixed, mixed, d_conv, padding=d_conv // 2, groups=mixed)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.out_norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.D.no_weight_decay = True  # type: ignore[attr-defined]
        reset_heads(self.A_log, self.dt_bias)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mix tokens ``(batch, height * width, dim)`` in row-major order; ``size`` is (height, width) in tokens.

        Raises:
            ValueError: the tokens do not fit ``size`` or the layer's width.
        """
        check_tokens(x, size, self.in_proj.in_features, "x")
        inner, states = self.out_proj.in_features, self.groups * self.d_state
        z, mixed, delta = self.in_proj(x).split([inner, inner + 2 * states, self.heads], dim=-1)
        bias: Tensor = self.conv.bias  # type: ignore[assignment]
        u, B, C = conv_silu(mixed, self.conv.weight, bias, size).split([inner, states, states], dim=-1)
        y = ssd(
            u.unflatten(-1, (self.heads, -1)),
            delta,
            -torch.exp(at_least_float32(self.A_log)),
            B.unflatten(-1, (self.groups, -1)),
            C.unflatten(-1, (self.groups, -1)),
            at_least_float32(self.D),
            delta_bias=at_least_float32(self.dt_bias),
            delta_softplus=True,
            order=scan_order(self.order, *size, device=x.device),
            backend=self.backend,
        )
        assert isinstance(y, Tensor)
        gated = y.flatten(2) * F.silu(z)
        return self.out_proj(self.out_norm(gated.to(self.out_norm.weight.dtype)))
