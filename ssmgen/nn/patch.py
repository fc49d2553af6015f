"""Images to tokens and back."""

from einops import rearrange
from torch import Tensor, nn

from ssmgen.registry import register


@register("block", "patchify")
class Patchify(nn.Module):
    """Cut an image into square patches and project each to a token (ViT, arXiv 2010.11929, section 3.1).

    Args:
        in_channels: channels of the image.
        dim: width of the tokens.
        patch_size: side of a patch in pixels.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int = 2) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.proj = nn.Linear(patch_size**2 * in_channels, dim)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, height, width)`` to ``(batch, height * width / patch_size^2, dim)``, row-major.

        Raises:
            ValueError: the channels differ, or a side is no multiple of the patch size.
        """
        check_image(x, self.in_channels, self.patch_size)
        p = self.patch_size
        return self.proj(rearrange(x, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=p, p2=p))


@register("block", "unpatchify")
class Unpatchify(nn.Module):
    """Project each token to a square patch and put the patches together: the inverse layout of `Patchify`.

    Its weights start at zero, so that a model starts by predicting zero.

    Args:
        dim: width of the tokens.
        out_channels: channels of the image.
        patch_size: side of a patch in pixels.
    """

    def __init__(self, dim: int, out_channels: int, patch_size: int = 2) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(dim, patch_size**2 * out_channels)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """``(batch, h * w, dim)`` to ``(batch, channels, h * patch_size, w * patch_size)``; ``size`` is (h, w)."""
        if tokens.dim() != 3 or tokens.shape[1] != size[0] * size[1]:
            raise ValueError(
                f"tokens must be (batch, {size[0] * size[1]}, dim) for size {size}, got {tuple(tokens.shape)}"
            )
        p = self.patch_size
        return rearrange(self.proj(tokens), "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=size[0], p1=p, p2=p)


def check_image(x: Tensor, channels: int, multiple: int) -> None:
    """Reject images that are not ``(batch, channels, height, width)`` or whose sides the patches do not fill."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x must be (batch, {channels}, height, width), got {tuple(x.shape)}")
    if not x.shape[0]:
        raise ValueError(f"the batch is empty: x must hold at least one image, got {tuple(x.shape)}")
    if x.shape[2] % multiple or x.shape[3] % multiple or 0 in x.shape:
        raise ValueError(f"height and width of x must be positive multiples of {multiple}, got {tuple(x.shape)}")
