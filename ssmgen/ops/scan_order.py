"""2-D token orders: the sequence in which a scan visits the tokens of a height x width grid, square or not."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ssmgen.registry import closest

#: One direction each; a stack of layers cycles through them (USM's eight plain and boustrophedon orders).
SCAN_ORDERS = (
    *("row", "column", "row-reversed", "column-reversed", "row-boustrophedon", "column-boustrophedon"),
    *("row-boustrophedon-reversed", "column-boustrophedon-reversed"),
)


class ScanOrder(NamedTuple):
    """``tokens[:, forward]`` is the sequence that is scanned; ``sequence[:, inverse]`` puts it back.

    Both are int64, ``(length,)`` for all images or ``(batch, length)``, one order per image.
    """

    forward: Tensor
    inverse: Tensor


def scan_order(name: str, height: int, width: int, device: torch.device | str = "cpu") -> ScanOrder | None:
    """The permutation of ``height * width`` row-major tokens for an order, or None for ``"row"``, the identity.

    Boustrophedon orders turn at the end of each line ("as the ox ploughs"), so that neighbours in the sequence are
    neighbours in the image.

    Raises:
        ValueError: an unknown order, with the closest names.
    """
    if name not in SCAN_ORDERS:
        raise ValueError(f"unknown scan order {name!r}{closest(name, SCAN_ORDERS)} All: {', '.join(SCAN_ORDERS)}.")
    if name == "row":
        return None
    # A compiled graph contains the computation itself; the cache would break it.
    permutation = _permutation if torch.compiler.is_compiling() else _kept_permutation
    return permutation(name, height, width, torch.device(device))


def _permutation(name: str, height: int, width: int, device: torch.device) -> ScanOrder:
    index = torch.arange(height * width, device=device).view(height, width)
    lines = index if name.startswith("row") else index.t()
    if "boustrophedon" in name:
        lines = torch.where((torch.arange(len(lines), device=device) % 2 == 1).unsqueeze(1), lines.flip(1), lines)
    sequence = lines.flatten()
    if name.endswith("reversed"):
        sequence = sequence.flip(0)
    return ScanOrder(sequence, torch.argsort(sequence))


@lru_cache(maxsize=256)
def _kept_permutation(name: str, height: int, width: int, device: torch.device) -> ScanOrder:
    with torch.inference_mode(False):  # a cached order must serve training too
        return _permutation(name, height, width, device)


def reorder(tokens: Tensor, index: Tensor | None) -> Tensor:
    """Permute tokens ``(batch, length, ...)`` by an index ``(length,)`` or ``(batch, length)``; None keeps them."""
    if index is None:
        return tokens
    if index.dim() == 1:
        return tokens.index_select(1, index)
    return torch.take_along_dim(tokens, index.view(*index.shape, *(1,) * (tokens.dim() - 2)), dim=1)
