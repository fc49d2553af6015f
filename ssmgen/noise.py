"""Seeds, and the noise that images start from: image i depends on its own seed alone."""

import hashlib
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


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
