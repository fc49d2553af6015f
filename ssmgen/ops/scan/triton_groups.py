"""Groups of steps as tiles: how the kernels of `ssmgen.ops.scan.triton` load, prepare and add up several steps at once.

What a step needs once for each channel (its step size, its drive, its output) is computed in a tile (steps, channels)
whose numbers are spread over the lanes, so that no two lanes compute the same. Rows of B and C are loaded and made
float32 in the same way. Splitting such a tile into its rows then makes Triton pass it through shared memory to the
lanes that hold the states: one store for each lane, and reads of four numbers at a time.
"""

import triton
import triton.language as tl

from ssmgen.ops.scan.triton_tiles import along, over, step_size


@triton.jit
def group_tokens(order, k0, last, WHOLE: tl.constexpr, STEPS: tl.constexpr):
    """The tokens of a group of steps; from step ``last`` on, the last token."""
    k = tl.arange(0, STEPS) + k0
    if not WHOLE:
        k = tl.minimum(k, last - 1)
    return k if order is None else tl.load(order + k).to(tl.int32)


@triton.jit
def rows_at(base, tokens, k0, place, step: tl.constexpr, MOVED: tl.constexpr):
    """Pointers to ``place`` in the rows of a group: at its tokens, or at distances from ``k0`` known when compiled."""
    if MOVED:
        return base + (tokens.to(tl.int64) * step)[:, None] + place[None, :]
    distance = tl.arange(0, tokens.shape[0]) * step
    return base + (tl.full([], 0, tl.int64) + k0) * step + (distance[:, None] + place[None, :])


@triton.jit
def load_map_rows(base, tokens, k0, step: tl.constexpr, n: tl.constexpr, STATES: tl.constexpr, MOVED: tl.constexpr):
    """Rows of B or C of a group as they are stored, zero beyond ``n``; words of 32 bits hold two numbers each."""
    PACKED: tl.constexpr = 2 if base.dtype.element_ty == tl.int32 else 1
    place = tl.arange(0, STATES // PACKED)
    at = rows_at(base, tokens, k0, place, step, MOVED)
    return tl.load(at, mask=(place < n // PACKED)[None, :], other=0) if n < STATES else tl.load(at)


@triton.jit
def load_maps_of_group(
    B, C, tokens, k0, B_step: tl.constexpr, C_step: tl.constexpr, n: tl.constexpr, STATES: tl.constexpr,
    MOVED: tl.constexpr,
):  # fmt: skip
    """Rows of B and of C, as `load_map_rows`."""
    Bs = load_map_rows(B, tokens, k0, B_step, n, STATES, MOVED)
    return Bs, load_map_rows(C, tokens, k0, C_step, n, STATES, MOVED)


@triton.jit
def load_channel_rows(delta, x, tokens, k0, d, delta_step: tl.constexpr, x_step: tl.constexpr, MOVED: tl.constexpr):
    """Rows ``(steps, channels)`` of delta and of a sequence, as they are stored."""
    return tl.load(rows_at(delta, tokens, k0, d, delta_step, MOVED)), tl.load(rows_at(x, tokens, k0, d, x_step, MOVED))


@triton.jit
def before(last, k0, STEPS: tl.constexpr):
    """Which steps of a group come before ``last``, beside a row of channels."""
    return (tl.arange(0, STEPS) + k0 < last)[:, None]


@triton.jit
def group_step_sizes(raw, shift, k0, last, SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr):
    """Step sizes ``(steps, channels)``; zero, so that they leave the states as they are, from step ``last`` on."""
    step = step_size(raw, shift[None, :], SOFTPLUS)
    return step if WHOLE else tl.where(before(last, k0, raw.shape[0]), step, 0.0)


@triton.jit
def floats(rows):
    """Numbers of rows of B or C in float32."""
    if rows.dtype == tl.int32:  # two bfloat16 each, which are the upper halves of a float32
        low, high = (rows << 16).to(tl.float32, bitcast=True), (rows & -65536).to(tl.float32, bitcast=True)
        rows = tl.reshape(tl.join(low, high), [rows.shape[0], 2 * rows.shape[1]])
    return rows.to(tl.float32)


@triton.jit
def split_rows(x):
    """``(rows, width)`` as a tuple of its rows, whose number is a power of two."""
    ROWS: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1]
    if ROWS == 1:
        return (tl.reshape(x, [WIDTH]),)
    else:
        first, second = tl.split(tl.permute(tl.reshape(x, [2, ROWS // 2, WIDTH]), [1, 2, 0]))
        return split_rows(first) + split_rows(second)


@triton.jit
def split_pairs(x, y):
    """The rows of two tensors ``(rows, width)`` in turn: through shared memory together."""
    both = tl.permute(tl.join(x, y), [0, 2, 1])
    return split_rows(tl.reshape(both, [2 * x.shape[0], x.shape[1]]))


@triton.jit
def pieces_of(rows, WIDTH: tl.constexpr):
    """Rows of B or C as a tuple of pieces for tiles of states, those of the first row first."""
    return split_rows(tl.reshape(floats(rows), [rows.numel * (2 if rows.dtype == tl.int32 else 1) // WIDTH, WIDTH]))


@triton.jit
def pieces_of_both(B, C, WIDTH: tl.constexpr):
    """As `pieces_of`: the first row of B, the first of C, and so on."""
    both = tl.permute(tl.join(floats(B), floats(C)), [0, 2, 1])
    return split_rows(tl.reshape(both, [both.numel // WIDTH, WIDTH]))


@triton.jit
def advanced(tiles, step, drive, a, pieces, first: tl.constexpr):
    """Tiles of states after a step; ``a`` is a multiple of log2(e), the row's pieces start with ``first``."""
    result = ()
    for r in tl.static_range(len(tiles)):
        result += (tl.exp2(over(step) * a[r]) * tiles[r] + over(drive) * along(pieces[first + r]),)
    return result


@triton.jit
def lane_sums(tiles, pieces, first: tl.constexpr):
    """Products of tiles of states with a row of C, added up by each lane alone: ``(channels, lanes)``."""
    total = tiles[0] * along(pieces[first])
    for r in tl.static_range(1, len(tiles)):
        total += tiles[r] * along(pieces[first + r])
    return tl.sum(tl.reshape(total, [total.shape[0], total.shape[1] // 4, 4]), axis=2)


@triton.jit
def stacked(tensors, first: tl.constexpr, COUNT: tl.constexpr):
    """``COUNT`` tensors with two axes, from ``first`` on, along a new first axis."""
    if COUNT == 1:
        return tensors[first][None, :, :]
    else:
        both = tl.join(stacked(tensors, first, COUNT // 2), stacked(tensors, first + COUNT // 2, COUNT // 2))
        return tl.reshape(tl.permute(both, [3, 0, 1, 2]), [COUNT, both.shape[1], both.shape[2]])


@triton.jit
def sum_of_lanes(x):
    """The sum over the last axis, in the lanes that own a step and a channel: through shared memory, in a tree."""
    if x.shape[2] == 1:
        return tl.reshape(x, [x.shape[0], x.shape[1]])
    else:
        first, second = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))
        return sum_of_lanes(first + second)
