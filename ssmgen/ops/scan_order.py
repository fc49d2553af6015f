"""2-D token orders: the sequence in which a scan visits the tokens of a height x width grid, square or not."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ssmgen.registry import closest

_CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")

#: One direction each; a stack of layers cycles through them (USM's eight plain and boustrophedon orders).
SCAN_ORDERS = (
    *("row", "column", "row-reversed", "column-reversed", "row-boustrophedon", "column-boustrophedon"),
    *("row-boustrophedon-reversed", "column-boustrophedon-reversed"),
)


def _from_each_corner(shape: str) -> tuple[str, ...]:
    starts = ("", *(f"-{corner}" for corner in _CORNERS[1:]))
    return tuple(f"{axis}-{shape}{start}" for start in starts for axis in ("row", "column"))


#: ZigMa's eight zigzag orders in its sequence (``zigzagN8``): boustrophedon from each corner, by rows and by columns.
ZIGZAG_ORDERS = _from_each_corner("boustrophedon")

#: The Hilbert curve from each corner, along rows and along columns.
HILBERT_ORDERS = _from_each_corner("hilbert")


class ScanOrder(NamedTuple):
    """``tokens[:, forward]`` is the sequence that is scanned; ``sequence[:, inverse]`` puts it back.

    Both are int64, ``(length,)`` for all images or ``(batch, length)``, one order per image.
    """

    forward: Tensor
    inverse: Tensor


#: A path through a grid: takes the tokens' indices ``(height, width)``, and its number if its name ends in one, and
#: returns them ``(height * width,)`` in the sequence of the path, which starts at the first token.
Path = Callable[..., Tensor]

Whole = TypeVar("Whole", int, Tensor)


class _Known(NamedTuple):
    path: Path
    number: int | None  # in the name that `scan_orders` lists; None where the path takes no number


_PATHS: dict[str, _Known] = {}


def register_order(name: str, number: int | None = None) -> Callable[[Path], Path]:
    """Decorator that makes a path through a grid known as ``row-NAME``, ``column-NAME`` and their variants.

    Args:
        name: one word, without a number.
        number: an example of the path's argument, such as the side of a window, if it takes one; the order is then
            called ``row-NAME-N``.

    Raises:
        ValueError: the name is taken or has another form.
    """
    taken = {*_PATHS, "row", "column", "reversed", *"-".join(_CORNERS).split("-")}
    if name in taken or not name.isalpha():
        raise ValueError(f"a scan order's name is one word that is not taken, got {name!r}; taken: {sorted(taken)}")

    def decorate(path: Path) -> Path:
        _PATHS[name] = _Known(path, number)
        return path

    return decorate


def scan_orders() -> list[str]:
    """Names that `scan_order` takes, without the corners; a number in a name may be any other."""
    paths = [name if known.number is None else f"{name}-{known.number}" for name, known in _PATHS.items()]
    shaped = [f"{axis}-{path}{end}" for path in paths for axis in ("row", "column") for end in ("", "-reversed")]
    return [*SCAN_ORDERS, *(name for name in shaped if name not in SCAN_ORDERS)]


def scan_directions(name: str, count: int) -> tuple[str, ...]:
    """Names of 1, 2 or 4 orders that a layer scans in parallel, of which ``name`` is the first.

    Two are an order and its reverse (Vim, arXiv 2401.09417); four are those and the same two on the transposed grid,
    the cross-scan of VMamba (arXiv 2401.10166): row, column, row-reversed, column-reversed.

    Raises:
        ValueError: another count.
    """
    if count not in (1, 2, 4):
        raise ValueError(f"directions must be 1, 2 (an order and its reverse) or 4 (a cross-scan), got {count!r}")
    forwards = (name, _transposed(name)) if count == 4 else (name,)
    return forwards if count == 1 else (*forwards, *(_backwards(other) for other in forwards))


def _backwards(name: str) -> str:
    plain = name.removesuffix("-reversed")
    return plain if plain != name else f"{name}-reversed"


def _transposed(name: str) -> str:
    axis, dash, rest = name.partition("-")  # the whole word: a path's name may start with "row" too
    if axis == "column":
        return f"row{dash}{rest}"
    return f"column{dash}{rest}" if axis == "row" else f"column-{name}"


def scan_order(name: str, height: int, width: int, device: torch.device | str = "cpu") -> ScanOrder | None:
    """The permutation of ``height * width`` row-major tokens for an order, or None for ``"row"``, the identity.

    A name is ``row`` or ``column``, then a path, a corner to start from, and ``reversed``, each optional:
    ``"column-boustrophedon"``, ``"row-hilbert-bottom-left"``, ``"row-window-4-reversed"``. The paths are:

    - none: line by line;
    - ``boustrophedon``: line by line, turning at the end of each ("as the ox ploughs"; the zigzag of ZigMa,
      arXiv 2403.13802), so that neighbours in the sequence are neighbours in the image;
    - ``hilbert``: a Hilbert curve, generalised to rectangles of any size; here too, neighbours stay neighbours. It ends
      at the far end of the first row, or with ``column`` of the first column; where one side is odd and the other even,
      no such path ends along the odd side, so both follow the even one;
    - ``diagonal``: diagonal by diagonal, turning at the end of each, as JPEG orders coefficients and DiMSUM
      (arXiv 2411.04168) scans: neighbours in the sequence touch at least at a corner;
    - ``window-N``: windows of N x N tokens, one after the other, each line by line (LocalMamba, arXiv 2403.09338);
      those at the far edges are smaller where N does not divide the side;
    - ``random-N``: a fixed random order with seed N, the same on every machine.

    ``column`` is the path of the transposed grid; ``row-`` may be left out before a path (``"random-7"``). A path
    starts at the top left unless the name says ``top-right``, ``bottom-left`` or ``bottom-right``.

    Raises:
        ValueError: an unknown order, with the closest names.
    """
    column, path, number, corner, backwards = _parsed(name)
    if path is None and corner == "top-left" and not column and not backwards:
        return None
    # A compiled graph contains the computation itself; the cache would break it.
    permutation = _permutation if torch.compiler.is_compiling() else _kept_permutation
    return permutation(name, height, width, torch.device(device))


def _parsed(name: str) -> tuple[bool, Path | None, int | None, str, bool]:
    """By columns, path, its number, corner, reversed.

    Plain string operations: a graph being compiled evaluates them.
    """
    body = name.removesuffix("-reversed")
    corner = "top-left"
    for other in _CORNERS[1:]:
        if body.endswith(f"-{other}"):
            corner, body = other, body.removesuffix(f"-{other}")
            break
    axis, _, shape = body.partition("-")
    if axis in _PATHS:
        axis, shape = "row", body
    path, _, number = shape.partition("-")
    known = _PATHS.get(path)
    if body.endswith("-") or not _fits(axis, shape, known, number):
        names = scan_orders()
        raise ValueError(f"unknown scan order {name!r}{closest(name, names)} All: {', '.join(names)}.")
    taken = known.path if known else None
    return axis == "column", taken, int(number) if number else None, corner, name.endswith("-reversed")


def _fits(axis: str, shape: str, known: _Known | None, number: str) -> bool:
    if axis not in ("row", "column"):
        return False
    if known is None or known.number is None:
        return number == "" and (known is not None or shape == "")
    return number.isdecimal() and number.isascii() and int(number) > 0


def _permutation(name: str, height: int, width: int, device: torch.device) -> ScanOrder:
    column, path, number, corner, backwards = _parsed(name)
    lines = torch.arange(height * width, device=device).view(height, width)
    if corner.startswith("bottom"):
        lines = lines.flip(0)
    if corner.endswith("right"):
        lines = lines.flip(1)
    if column:
        lines = lines.t()
    sequence = lines.flatten() if path is None else path(lines) if number is None else path(lines, number)
    if backwards:
        sequence = sequence.flip(0)
    return ScanOrder(sequence, torch.argsort(sequence))


@lru_cache(maxsize=256)
def _kept_permutation(name: str, height: int, width: int, device: torch.device) -> ScanOrder:
    with torch.inference_mode(False):  # a cached order must serve training too
        return _permutation(name, height, width, device)


@register_order("boustrophedon")
def _boustrophedon(lines: Tensor) -> Tensor:
    back = torch.arange(len(lines), device=lines.device) % 2 == 1
    return torch.where(back.unsqueeze(1), lines.flip(1), lines).flatten()


@register_order("hilbert")
def _hilbert(lines: Tensor) -> Tensor:
    height, width = range(lines.shape[0]).stop, range(lines.shape[1]).stop  # fixed in a graph being compiled
    return lines.flatten()[_hilbert_places(height, width, lines.device)]


def _hilbert_places(height: int, width: int, device: torch.device) -> Tensor:
    """Row-major places in the sequence of the curve, which ends at the far end of the first line if it can.

    No path of neighbours through all cells ends there where the line is odd and the number of lines even; the curve
    then follows the columns.
    """
    across = width % 2 == 1 and height % 2 == 0
    along, away = (1j * height, width + 0j) if across else (width + 0j, 1j * height)
    return torch.tensor([int(c.imag) * width + int(c.real) for c in _curve(0j, along, away)], device=device)


# The recursion would not fit into a compiled graph, so its result is a constant there. torch.compiler's decorator
# assume_constant_result sets this too, but imports the compiler, which takes longer than all of ssmgen.
_hilbert_places._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _curve(start: complex, along: complex, away: complex) -> Iterator[complex]:
    """Cells, ``column + row i``, of a curve through a rectangle from ``start`` to the far end of ``along``.

    Červený's generalised Hilbert curve (github.com/jakubcerveny/gilbert): a long rectangle is cut in two along its
    length; another into a part away from ``start``, one along, and one back. Parts have even sides where possible.
    """
    length, height = int(abs(along)), int(abs(away))
    step, rise = along / length, away / height
    if height == 1 or length == 1:
        yield from (start + i * (step if height == 1 else rise) for i in range(max(length, height)))
    elif 2 * length > 3 * height:
        cut = (length // 2 + (length // 2 % 2 if length > 2 else 0)) * step
        yield from _curve(start, cut, away)
        yield from _curve(start + cut, along - cut, away)
    else:
        cut, half = (height // 2 + (height // 2 % 2 if height > 2 else 0)) * rise, length // 2 * step
        yield from _curve(start, cut, half)
        yield from _curve(start + cut, along, away - cut)
        yield from _curve(start + along - step + cut - rise, -cut, half - along)


@register_order("diagonal")
def _diagonal(lines: Tensor) -> Tensor:
    height, width = lines.shape
    row = torch.arange(height, device=lines.device).unsqueeze(1)
    column = torch.arange(width, device=lines.device)
    place = torch.where((row + column) % 2 == 1, row, column)
    return lines.flatten()[torch.argsort(((row + column) * max(height, width) + place).flatten())]


@register_order("window", number=4)
def _window(lines: Tensor, side: int) -> Tensor:
    height, width = lines.shape
    row = torch.arange(height, device=lines.device).unsqueeze(1)
    column = torch.arange(width, device=lines.device)
    window = row // side * (width // side + 1) + column // side
    return lines.flatten()[torch.argsort((window * side**2 + row % side * side + column % side).flatten())]


@register_order("random", number=1)
def _random(lines: Tensor, seed: int) -> Tensor:
    """Tokens sorted by a hash of their place: torch's own random permutations differ between versions and devices."""
    place = torch.arange(lines.numel(), device=lines.device) ^ _mixed(seed)
    return lines.flatten()[torch.argsort(_mixed(place))]


def _mixed(x: Whole) -> Whole:
    """MurmurHash3's finaliser, a bijection of the numbers below 2^32: no two places have one key."""
    x = (x ^ (x >> 16)) & 0xFFFFFFFF
    x = _times(x, 0x85EBCA6B)
    x = x ^ (x >> 13)
    x = _times(x, 0xC2B2AE35)
    return x ^ (x >> 16)


def _times(x: Whole, factor: int) -> Whole:
    """``x * factor`` modulo 2^32, in halves that do not overflow 64 bits."""
    return (x * (factor & 0xFFFF) + ((x * (factor >> 16) & 0xFFFF) << 16)) & 0xFFFFFFFF


def reorder(tokens: Tensor, index: Tensor | None) -> Tensor:
    """Permute tokens ``(batch, length, ...)`` by an index ``(length,)`` or ``(batch, length)``; None keeps them."""
    if index is None:
        return tokens
    if index.dim() == 1:
        return tokens.index_select(1, index)
    return torch.take_along_dim(tokens, index.view(*index.shape, *(1,) * (tokens.dim() - 2)), dim=1)
