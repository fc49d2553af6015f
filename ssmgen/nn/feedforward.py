"""The feed-forward sublayer."""

from torch import Tensor, nn

from ssmgen.ops import gelu
from ssmgen.registry import register


@register("block", "feed-forward")
class FeedForward(nn.Module):
    """Two linear maps (arXiv 1706.03762, section 3.3) with a tanh-approximated GELU (arXiv 1606.08415) between them.

    Args:
        dim: width of the tokens.
        ratio: inner width as a multiple of ``dim``.
    """

    def __init__(self, dim: int, ratio: float = 4.0) -> None:
        super().__init__()
        inner = int(dim * ratio)
        self.up = nn.Linear(dim, inner)
        self.down = nn.Linear(inner, dim)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """``(..., dim)`` in and out; the grid's size does not matter."""
        return self.down(gelu(self.up(x)))
