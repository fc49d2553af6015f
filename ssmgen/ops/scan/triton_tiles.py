"""What the kernels of `ssmgen.ops.scan.triton` are made of: tiles of states, and the rows of a group of steps.

A program is one warp and holds its states as REPEATS tiles (CHANNELS, WIDTH), d_state being REPEATS x WIDTH. Triton
gives a lane four neighbours of the last axis, spreads the rest of that axis and then the channels over the lanes, and
what is left over further registers of each lane. So WIDTH says how many lanes share a channel, and REPEATS how many
times four of its states a lane owns. Channels beyond ``dim`` read the last channel, and only what they would write is
masked; steps beyond the last read the step before it, and have no size.

Rows of B and C are loaded in pieces of WIDTH numbers. Triton loads less than 32 of them in the layout in which they are
used; more, as with many states a channel, pass through shared memory.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def step_size(raw, shift, SOFTPLUS: tl.constexpr):
    """softplus(raw + shift) (Mamba, algorithm 2) as max(x, 0) + log1p(exp(-|x|)); relative error below 2e-7.

    log1p(e) / e is a polynomial of degree 9 through Chebyshev's nodes of [0, 1].
    """
    x = raw.to(tl.float32) + shift
    if SOFTPLUS:
        e = tl.exp2(tl.abs(x) * -LOG2_E)
        p = e * -0.00317605701 + 0.0195425265
        p = p * e - 0.0563736111
        p = p * e + 0.105436236
        p = p * e - 0.152696669
        p = p * e + 0.196632743
        p = p * e - 0.249516159
        p = p * e + 0.333297104
        p = p * e - 0.499998927
        p = p * e + 1.0
        x = p * e + tl.maximum(x, 0.0)
    return x


@triton.jit
def step_sizes(raws, shift, k0, last, SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr, STEPS: tl.constexpr):
    """Step sizes of a group; zero, so that they leave the states as they are, from step ``last`` on."""
    steps = ()
    for j in tl.static_range(STEPS):
        step = step_size(raws[j], shift, SOFTPLUS)
        steps += (step if WHOLE else tl.where(k0 + j < last, step, 0.0),)
    return steps


@triton.jit
def tile(block, dim: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Channels of a program, all of which exist; the states of its first tile; and which channels to write."""
    d = block * CHANNELS + tl.arange(0, CHANNELS)
    in_d = tl.arange(0, CHANNELS) >= 0
    if dim % CHANNELS:
        in_d = d < dim
        d = tl.minimum(d, dim - 1)
    return d, tl.arange(0, WIDTH), in_d


@triton.jit
def steps_of(chunk, chunk_length, length):
    """The first step of a chunk, and the one after its last."""
    first = chunk * chunk_length
    return first, tl.minimum(first + chunk_length, length)


@triton.jit
def both(mask, condition):
    """A mask where a scalar condition holds, else nothing; Triton's interpreter cannot join them with &."""
    return mask & (tl.zeros(mask.shape, tl.int32) + condition.to(tl.int32) > 0)


@triton.jit
def states_of(d, i, n: tl.constexpr, r: tl.constexpr):
    """Where the states of tile ``r`` lie in ``(dim, n)``."""
    return d[:, None] * n + (i + r * i.shape[0])[None, :]


@triton.jit
def no_states(d, i, STATES: tl.constexpr):
    """Tiles of zeros."""
    tiles = ()
    for _ in tl.static_range(STATES // i.shape[0]):
        tiles += (tl.zeros([d.shape[0], i.shape[0]], tl.float32),)
    return tiles


@triton.jit
def load_states(base, d, i, in_d, dim: tl.constexpr, n: tl.constexpr, STATES: tl.constexpr):
    """Tiles of states, zero where there are none."""
    tiles = ()
    for r in tl.static_range(STATES // i.shape[0]):
        at = base + states_of(d, i, n, r)
        if n < STATES or dim // d.shape[0] * d.shape[0] < dim:
            tiles += (tl.load(at, mask=in_d[:, None] & (i + r * i.shape[0] < n)[None, :], other=0.0),)
        else:
            tiles += (tl.load(at),)
    return tiles


@triton.jit
def store_states(base, tiles, d, i, written, n: tl.constexpr):
    """Write tiles of states for the channels that are ``written``."""
    for r in tl.static_range(len(tiles)):
        tl.store(base + states_of(d, i, n, r), tiles[r], mask=written[:, None] & (i + r * i.shape[0] < n)[None, :])


@triton.jit
def load_channels(at, d):
    """A float32 for each channel; zero where there is no tensor."""
    if at is None:
        return tl.zeros(d.shape, tl.float32)
    return tl.load(at + d)


@triton.jit
def tokens_of(order, k0, last, WHOLE: tl.constexpr, STEPS: tl.constexpr):
    """The tokens of a group of steps; from step ``last`` on, that of the step before it."""
    tokens = ()
    for j in tl.static_range(STEPS):
        k = tl.full([], j, tl.int64) + k0
        if not WHOLE:
            k = tl.minimum(k, last - 1)
        tokens += (k if order is None else tl.load(order + k),)
    return tokens


@triton.jit
def row(base, token, k0, j: tl.constexpr, step: tl.constexpr, MOVED: tl.constexpr):
    """Where the row of step ``k0 + j`` lies: at its token, or at a distance from that of ``k0`` known when compiled."""
    if MOVED:
        return base + token * step
    return base + (tl.full([], 0, tl.int64) + k0) * step + j * step


@triton.jit
def load_rows(base, tokens, k0, step: tl.constexpr, MOVED: tl.constexpr, STEPS: tl.constexpr):
    """The rows of a group of steps, as they are stored."""
    rows = ()
    for j in tl.static_range(STEPS):
        rows += (tl.load(row(base, tokens[j], k0, j, step, MOVED)),)
    return rows


@triton.jit
def load_maps(
    base, i, tokens, k0, step: tl.constexpr, n: tl.constexpr, STATES: tl.constexpr,
    MOVED: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Rows of B or C as they are stored, in a piece for each tile of states, zero beyond ``n``.

    Words of 32 bits hold two numbers each.
    """
    PACKED: tl.constexpr = 2 if base.dtype.element_ty == tl.int32 else 1
    WIDTH: tl.constexpr = i.shape[0] // PACKED
    rows = ()
    for j in tl.static_range(STEPS):
        pieces = ()
        for r in tl.static_range(STATES // i.shape[0]):
            place = tl.arange(0, WIDTH) + r * WIDTH
            if MOVED:
                at = row(base + place, tokens[j], k0, j, step, MOVED)
            else:
                at = row(base, tokens[j], k0, j, step, MOVED) + place
            pieces += (tl.load(at, mask=place < n // PACKED, other=0) if n < STATES else tl.load(at),)
        rows += (pieces,)
    return rows


@triton.jit
def load_outputs(
    C, z, i, tokens, k0, C_step: tl.constexpr, z_step: tl.constexpr, n: tl.constexpr, STATES: tl.constexpr,
    MOVED: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """What a group of steps makes its outputs with, as stored: rows of C, and of the gate if there is one."""
    maps, gates = load_maps(C, i, tokens, k0, C_step, n, STATES, MOVED, STEPS), ()
    if z is not None:
        gates = load_rows(z, tokens, k0, z_step, MOVED, STEPS)
    return maps, gates


@triton.jit
def sigmoid(x):
    """The logistic function."""
    return 1 / (1 + tl.exp2(x * -LOG2_E))


@triton.jit
def over(x):
    """A value for each channel beside a tile of states."""
    return x[:, None]


@triton.jit
def along(x):
    """A piece of a row of B or C beside a tile of states."""
    if x.dtype == tl.int32:  # two bfloat16 each, which are the upper halves of a float32
        low, high = (x << 16).to(tl.float32, bitcast=True), (x & -65536).to(tl.float32, bitcast=True)
        x = tl.reshape(tl.join(low, high), [2 * x.shape[0]])
    return x.to(tl.float32)[None, :]


@triton.jit
def mapped(tiles, pieces):
    """The sum over its states of the products of a row of B or C with tiles of states."""
    total = tiles[0] * along(pieces[0])
    for r in tl.static_range(1, len(tiles)):
        total += tiles[r] * along(pieces[r])
    return tl.sum(total, axis=1)


@triton.jit
def decayed(tiles, step, a):
    """Tiles of states times their decays in a step; ``a`` is a multiple of log2(e)."""
    result = ()
    for r in tl.static_range(len(tiles)):
        result += (tl.exp2(over(step) * a[r]) * tiles[r],)
    return result


@triton.jit
def plus_outer(tiles, x, pieces, first: tl.constexpr = 0):
    """Tiles of states plus the products of a value for each channel and a row of B or C, from the ``first`` piece."""
    result = ()
    for r in tl.static_range(len(tiles)):
        result += (tiles[r] + over(x) * along(pieces[first + r]),)
    return result


@triton.jit
def scaled(tiles, factor):
    """Tiles of states times a number."""
    result = ()
    for r in tl.static_range(len(tiles)):
        result += (tiles[r] * factor,)
    return result


@triton.jit
def entering(
    h, end, total, a, place, count, step: tl.constexpr, d, i, in_d,
    dim: tl.constexpr, n: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """The state that enters a chunk, from what enters the first and what each chunk in between adds to it.

    ``place`` is the first of those chunks and ``step`` leads to the next. What they add is loaded four at a time.
    """
    for q0 in range(0, count, 4):
        ends, totals = (), ()
        for j in tl.static_range(4):
            q = place + step * tl.minimum(q0 + j, count - 1)
            ends += (load_states(end + q * dim * n, d, i, in_d, dim, n, STATES),)
            totals += (tl.load(total + q * dim + d),)
        for j in tl.static_range(4):
            passed, result = decayed(h, totals[j], a), ()
            for r in tl.static_range(len(h)):
                result += (tl.where(q0 + j < count, passed[r] + ends[j][r], h[r]),)
            h = result
    return h


@triton.jit
def load_group(
    tokens, k0, order, x, delta, maps, i, x_step: tl.constexpr, delta_step: tl.constexpr, maps_step: tl.constexpr,
    n: tl.constexpr, STATES: tl.constexpr, WHOLE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A group of steps as stored: its tokens, rows of delta, of a sequence and of B or C."""
    MOVED: tl.constexpr = order is not None or not WHOLE
    deltas = load_rows(delta, tokens, k0, delta_step, MOVED, STEPS)
    xs = load_rows(x, tokens, k0, x_step, MOVED, STEPS)
    return tokens, deltas, xs, load_maps(maps, i, tokens, k0, maps_step, n, STATES, MOVED, STEPS)


@triton.jit
def next_group(k0, last, WHOLE: tl.constexpr, STEPS: tl.constexpr):
    """The first step of the group after ``k0``, or of a group that exists if there is none."""
    return tl.minimum(k0 + STEPS, last - STEPS) if WHOLE else k0 + STEPS


@triton.jit
def advance(h, raw, steps, a, STEPS: tl.constexpr):
    """The state after a group of steps."""
    for j in tl.static_range(STEPS):
        h = plus_outer(decayed(h, steps[j], a), steps[j] * raw[2][j].to(tl.float32), raw[3][j])
    return h


@triton.jit
def slope(step, SOFTPLUS: tl.constexpr):
    """Derivative of softplus, from its value: 1 - exp(-step), by its series where step is tiny."""
    if SOFTPLUS:
        return tl.where(step < 1e-3, step - step * step * 0.5, 1 - tl.exp2(step * -LOG2_E))
    return step * 0 + 1


@triton.jit
def store_sum(at, x, i, r: tl.constexpr, summed, n: tl.constexpr):
    """Write the sum of a tile over its channels, from the lanes of the first: so it needs no other layout."""
    total = tl.broadcast_to(tl.sum(x, axis=0)[None, :], x.shape)
    place = (i + r * i.shape[0])[None, :] + tl.zeros(x.shape, tl.int32)
    tl.store(at + place, total, mask=summed[:, None] & (i + r * i.shape[0] < n)[None, :])
