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
    the same noise it gives them nearly the same (docs/fidelity.md, alike). The noise of every cell is still standard
    normal, and the cells of one region are still independent; only left and right depend on one another. So a model
    need not be trained with it. Noise shared in part has made the frames of videos agree before (arXiv 2305.10474).

    A region is where a class has a part of a cell, and the cells next to it; where regions meet, a cell belongs to the
    class that has most of its neighbourhood. Noise is moved from the middle of one region to that of the other by whole
    cells. No cell gives its noise to two others, and none that got another's gives it on: such cells keep their own. So
    do pairs of which a mask has less than half a cell of either class. Shared twice is shared once.

    Args:
        noise: ``(batch, channels, h, w)``, independent standard normal values such as those of `initial_noise`.
        masks: integer labels ``(batch or 1, H, W)``; H and W may be multiples of h and w, or differ from them freely.
        mirrored: pairs of classes, such as a label set's ``mirrored``; without any, the noise is returned as it is.

    Returns:
        Noise of the shape, dtype and device given.

    Raises:
        ValueError: noise or masks of another dtype or shape, or something else than pairs of classes.
    """
    if noise.dim() != 4:
        raise ValueError(f"noise must be (batch, channels, h, w), got {tuple(noise.shape)}")
    if any(not isinstance(pair, Sequence) or [type(each) for each in pair] != [int, int] for pair in mirrored):
        raise ValueError(f"mirrored holds pairs of class ids, such as [(4, 5)], got {mirrored!r}")
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
    own = (y * width + x).expand(len(masks), -1, -1)
    source, most = own, torch.zeros(own.shape, dtype=torch.float64, device="cpu")
    for pair in mirrored:
        first, second = (F.adaptive_avg_pool2d((masks == each).float(), size).double() for each in pair)
        enough = (torch.minimum(first.sum((1, 2)), second.sum((1, 2))) >= _LEAST).view(-1, 1, 1)
        (y1, x1), (y2, x2) = _middle(first, y, x), _middle(second, y, x)
        from_y, from_x = y + (y1 - y2).round().long(), x + (x1 - x2).round().long()
        inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        moved = torch.where(enough & inside, from_y * width + from_x, own)
        for region, cells in ((first, own), (second, moved)):
            near = F.avg_pool2d(region.unsqueeze(1), 3, stride=1, padding=1).squeeze(1)
            source, most = torch.where(near > most, cells, source), torch.maximum(near, most)
    return _given_once(source.flatten(1), own.flatten(1), most.flatten(1)).view(own.shape)


def _given_once(source: Tensor, own: Tensor, most: Tensor) -> Tensor:
    """The sources ``(batch, cells)`` without those that were moved themselves, or that give to a cell with more."""
    source = torch.where(source.gather(1, source) == source, source, own)
    rank = torch.where(source == own, 0, most + own * 1e-9)  # of equal ones, the last
    best = torch.zeros_like(most).scatter_reduce(1, source, rank, "amax")
    return torch.where(rank == best.gather(1, source), source, own)


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
