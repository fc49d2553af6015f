"""Gated DeltaNet over a 2-D grid of tokens: linear attention whose state is corrected, not only added to.

Letters: b batch, l length (= height x width tokens), d dim, e inner width (expand x dim), h heads, p width of a head's
value, n width of its key.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmgen.nn.mamba import at_least_float32, check_tokens
from ssmgen.nn.step_size import reset_heads
from ssmgen.ops import conv_silu, gated_delta_rule, scan_order
from ssmgen.registry import register


@register("block", "gated-delta")
class GatedDelta(nn.Module):
    """Gated DeltaNet layer (Yang et al., arXiv 2412.06464, section 3.4) with a depthwise convolution over the grid.

    ``z, (q, k, v), delta, b = in_proj(content)``; ``q, k, v = SiLU(conv3x3(q, k, v))``, then q and k scaled to length 1
    in each head; ``y = gated_delta_rule(q, k, v, g = -A softplus(delta + bias), beta = sigmoid(b))``; output
    ``out_proj(RMSNorm(y) * SiLU(z))``, normalised in each head. A and the bias start as in `Mamba2`. The norm makes a
    scale of q superfluous.

    Args:
        dim: width of the tokens.
        expand: inner width as a multiple of ``dim``.
        head_dim: width of a head's value; divides the inner width. The greatest common divisor of that and 64 where
            None.
        d_state: width of a head's key and query; ``head_dim`` where None.
        d_conv: size of the square depthwise kernel; odd.
        order: the sequence in which the grid is scanned, a name that `ssmgen.ops.scan_order` takes.
        backend: form of `ssmgen.ops.gated_delta_rule`.

    Raises:
        ValueError: a size that is not positive or does not divide the other.
    """

    #: Parameters that stay in float32 where a model samples in 16 bits.
    keep_float32 = ("A_log", "dt_bias")

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 1,
        head_dim: int | None = None,
        d_state: int | None = None,
        d_conv: int = 3,
        order: str = "row",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        inner = expand * dim
        head_dim = math.gcd(inner, 64) if head_dim is None else head_dim
        d_state = head_dim if d_state is None else d_state
        if min(dim, expand, head_dim, d_state, d_conv) < 1 or d_conv % 2 == 0:
            raise ValueError(
                f"dim, expand, head_dim, d_state and d_conv must be positive and d_conv odd, got dim={dim}, "
                f"expand={expand}, head_dim={head_dim}, d_state={d_state}, d_conv={d_conv}"
            )
        if inner % head_dim:
            raise ValueError(f"head_dim must divide the inner width expand x dim = {inner}, got head_dim={head_dim}")
        scan_order(order, 1, 1)  # an unknown order is an error here, not in the first forward
        self.heads, self.keys = inner // head_dim, inner // head_dim * d_state
        self.order, self.backend = order, backend
        mixed = 2 * self.keys + inner  # q, k and v
        self.in_proj = nn.Linear(dim, inner + mixed + 2 * self.heads, bias=False)
        self.conv = nn.Conv2d(mixed, mixed, d_conv, padding=d_conv // 2, groups=mixed)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.out_norm = nn.RMSNorm(head_dim, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        reset_heads(self.A_log, self.dt_bias)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mix tokens ``(batch, height * width, dim)`` in row-major order; ``size`` is (height, width) in tokens.

        Raises:
            ValueError: the tokens do not fit ``size`` or the layer's width.
        """
        check_tokens(x, size, self.in_proj.in_features, "x")
        inner = self.out_proj.in_features
        z, mixed, delta, b = self.in_proj(x).split([inner, 2 * self.keys + inner, self.heads, self.heads], dim=-1)
        bias: Tensor = self.conv.bias  # type: ignore[assignment]
        mixed = conv_silu(mixed, self.conv.weight, bias, size)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in mixed.split([self.keys, self.keys, inner], dim=-1))
        step = F.softplus(at_least_float32(delta) + at_least_float32(self.dt_bias))
        y = gated_delta_rule(
            _unit(q),
            _unit(k),
            v,
            -torch.exp(at_least_float32(self.A_log)) * step,
            torch.sigmoid(at_least_float32(b)),
            order=scan_order(self.order, *size, device=x.device),
            backend=self.backend,
        )
        assert isinstance(y, Tensor)
        normed = self.out_norm(y.to(self.out_norm.weight.dtype)).flatten(2)
        return self.out_proj(normed * F.silu(z))


def _unit(x: Tensor) -> Tensor:
    """``x`` at length 1 along its last dimension, computed in float32; zero stays zero."""
    return F.normalize(at_least_float32(x), dim=-1, eps=1e-6).to(x.dtype)
