"""Seeds, and the noise that images start from: image i depends on its own seed and mask alone."""

import hashlib
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# In cells of the grid: the middle of a smaller region is hardly known.
_LEAST = 0.5


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Noise ``(len(seeds), *shape)``, float32 on the CPU, in which image i depends on ``seeds[i]`` alone.

    Every bit of a seed counts. Seeds below 2**32 go to torch's CPU generator. It (mt19937) uses the lower 32 bits of a
    seed only, so the noise of larger seeds is made from the output of SHAKE-128, a hash function whose output is as
    long as one asks for.

    Args:
        seeds: one for each image, whole numbers from 0 to 2**64 - 1.
        shape: of one image's noise, (channels, height, width).

    Raises:
        TypeError: one seed instead of a list of them, one number instead of (channels, height, width), or a seed that
            is no whole number.
        ValueError: no seeds, or one out of range.
    """
    if not isinstance(seeds, Iterable) or not isinstance(shape, Iterable):
        raise TypeError(
            f"seeds is a list, one for each image, and shape is (channels, height, width): got {seeds!r} and {shape!r}"
        )
    wanted, size = [checked_seed(seed) for seed in seeds], tuple(shape)
    if not wanted:
        raise ValueError("seeds is empty: give one for each image")
    return torch.stack([_drawn(seed, size) if seed < 2**32 else _hashed(seed, size) for seed in wanted])


def shared_noise(noise: Tensor, masks: Tensor, mirrored: Sequence[Sequence[int]]) -> Tensor:
    """Noise in which the second class of each pair starts as the first does.

    A model that paints an iris by the noise in its place gives two eyes two colours, however well it paints each. From
    the same noise it gives them nearly the same. The noise of every cell is still standard normal, and so is that of
    every region with its surroundings, which is all that such a model sees; only the two regions together are no longer
    independent. So a model need not be trained with it. Noise shared in part has made the frames of videos agree before
    (arXiv 2305.10474).

    A region is where a class has a part of a cell, and the cells next to it. The noise is moved from the middle of one
    region to that of the other by whole cells, and not flipped: so irises agreed best. Where two regions meet, a cell
    belongs to the class that has more of its neighbourhood. A pair of which a mask has less than half a cell of either
    class keeps its noise.

    Args:
        noise: ``(batch, channels, h, w)``, independent standard normal values such as those of `initial_noise`.
        masks: integer labels ``(batch or 1, H, W)``; H and W may be multiples of h and w, or differ from them freely.
        mirrored: pairs of classes, such as a label set's ``mirrored``; without any, the noise is returned as it is.

    Returns:
        Noise of the shape, dtype and device given.

    Raises:
        ValueError: masks of another dtype or shape.
    """
    if masks.is_floating_point() or masks.dtype == torch.bool or masks.dim() != 3 or not masks.numel():
        raise ValueError(f"masks must be integer labels (batch, H, W), got {masks.dtype} {tuple(masks.shape)}")
    if len(masks) not in (1, len(noise)):
        raise ValueError(f"give one mask, or one per image: got {len(masks)} masks for the noise of {len(noise)}")
    if not mirrored:
        return noise
    source = _shared_cells(masks.cpu(), mirrored, (noise.shape[2], noise.shape[3])).to(noise.device)
    cells = source.flatten(1).unsqueeze(1).expand(len(noise), noise.shape[1], -1)
    return noise.flatten(2).gather(2, cells).view_as(noise)


def _shared_cells(masks: Tensor, mirrored: Sequence[Sequence[int]], size: tuple[int, int]) -> Tensor:
    """For each cell ``(batch, h, w)`` the index of the cell whose noise it gets: its own, or one of the other side.

    On the CPU and in float64, so that a middle between two cells is rounded alike everywhere.
    """
    height, width = size
    y, x = torch.meshgrid(*(torch.arange(n, device="cpu") for n in size), indexing="ij")
    source, most = (
        (y * width + x).expand(len(masks), -1, -1),
        torch.zeros(len(masks), *size, dtype=torch.float64, device="cpu"),
    )
    for pair in mirrored:
        first, second = (F.adaptive_avg_pool2d((masks == each).double(), size) for each in pair)
        enough = (torch.minimum(first.sum((1, 2)), second.sum((1, 2))) >= _LEAST).view(-1, 1, 1)
        (y1, x1), (y2, x2) = _middle(first, y, x), _middle(second, y, x)
        from_y, from_x = y + (y1 - y2).round().long(), x + (x1 - x2).round().long()
        inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        near = F.avg_pool2d(second.unsqueeze(1), 3, stride=1, padding=1).squeeze(1)
        taken = enough & inside & (near > most)
        source = torch.where(taken, from_y * width + from_x, source)
        most = torch.where(taken, near, most)
    return source


def _middle(shares: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean row and column, ``(batch, 1, 1)`` each, of a region given by its shares of the cells."""
    whole = shares.sum((1, 2), keepdim=True).clamp(min=_LEAST)
    return (shares * y).sum((1, 2), keepdim=True) / whole, (shares * x).sum((1, 2), keepdim=True) / whole


def _drawn(seed: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _hashed(seed: int, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    stream = bytearray(hashlib.shake_128(seed.to_bytes(8, "little")).digest(8 * count))
    bits = torch.frombuffer(stream, dtype=torch.int64)
    # The midpoints of 2**52 equal intervals: never 0 or 1, and exact in float64.
    uniform = ((bits >> 12 & 2**52 - 1).double() + 0.5) / 2**52
    return torch.special.ndtri(uniform).float().view(shape)


def hashed_seed(content: bytes) -> int:
    """A seed for `initial_noise` that follows from any bytes, by SHA-256."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def checked_seed(seed: Any) -> int:
    """A seed as an int.

    Raises:
        TypeError: no whole number; True and False are none.
        ValueError: below 0, or 2**64 and above.
    """
    wanted = f"a seed is a whole number from 0 to 2**64 - 1, got {seed!r}"
    if isinstance(seed, bool):
        raise TypeError(wanted)
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(wanted) from None
    if not 0 <= number < 2**64:
        raise ValueError(wanted)
    return number


def image_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """The seeds of ``count`` images: those given, or ``seed`` and the next ones.

    Raises:
        TypeError, ValueError: see `checked_seed`; or a list of another length.
    """
    if isinstance(seed, str) or not isinstance(seed, Sequence):
        first = checked_seed(seed)
        return [checked_seed(first + i) for i in range(count)]
    if len(seed) != count:
        raise ValueError(f"give one seed, or one per image: got {len(seed)} seeds for {count} image(s)")
    return [checked_seed(one) for one in seed]
