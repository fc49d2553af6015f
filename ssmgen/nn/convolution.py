"""A convolution as a mixer: what a Mamba layer is without its scan."""

from torch import Tensor, nn

from ssmgen.nn.mamba import check_tokens
from ssmgen.ops import conv_silu, norm
from ssmgen.registry import register


@register("block", "convolution")
class Convolution(nn.Module):
    """Gated depthwise convolution: a `SelfMamba` whose scan is left out, as MambaOut (arXiv 2405.07992) does.

    ``u, z = in_proj(x)``; ``u = SiLU(conv(u))``; output ``out_proj(LayerNorm(u) * SiLU(z))``. The kernel is 7 x 7, as
    in ConvNeXt (arXiv 2201.03545). A token reaches its surroundings only.

    Args:
        dim: width of the tokens.
        expand: inner width as a multiple of ``dim``.
        kernel: side of the square depthwise kernel in tokens; odd.

    Raises:
        ValueError: a size that is not positive, or an even kernel.
    """

    def __init__(self, dim: int, expand: int = 2, kernel: int = 7) -> None:
        super().__init__()
        if min(dim, expand, kernel) < 1 or kernel % 2 == 0:
            raise ValueError(
                f"dim, expand and kernel must be positive and kernel odd, got dim={dim}, expand={expand}, "
                f"kernel={kernel}"
            )
        inner = expand * dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = nn.Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mix tokens ``(batch, height * width, dim)`` in row-major order; ``size`` is (height, width) in tokens.

        Raises:
            ValueError: the tokens do not fit ``size`` or the layer's width.
        """
        check_tokens(x, size, self.in_proj.in_features, "x")
        content, z = self.in_proj(x).chunk(2, dim=-1)
        bias: Tensor = self.conv.bias  # type: ignore[assignment]
        u = conv_silu(content, self.conv.weight, bias, size)
        return self.out_proj(norm(u, self.out_norm.weight, self.out_norm.bias, z, eps=self.out_norm.eps))
