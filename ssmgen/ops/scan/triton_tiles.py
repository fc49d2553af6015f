"""What the kernels of `ssmgen.ops.scan.triton` are made of: tiles of states, and the rows of a group of steps.

A program is one warp and holds its states as a tile (REPEATS, CHANNELS, WIDTH), d_state being REPEATS x WIDTH. Triton
gives a lane four neighbours of the last axis, spreads the rest of that axis and then the channels over the lanes, and
what is left over further registers of each lane. So WIDTH says how many lanes share a channel, and REPEATS how many
times four of its states a lane owns. Channels beyond ``dim`` read the last channel, and only what they would write is
masked; steps beyond the last read the step before it, and have no size.
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
def tile(block, dim: tl.constexpr, n: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr):
    """Channels (all of which exist) and states of a program, where they lie in ``(dim, n)``, and which to write."""
    d = block * CHANNELS + tl.arange(0, CHANNELS)
    i = tl.arange(0, STATES // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    in_d = tl.arange(0, CHANNELS) >= 0
    if dim % CHANNELS:
        in_d = d < dim
        d = tl.minimum(d, dim - 1)
    written = in_d[None, :, None] & (i < n)[:, None, :]
    return d, i, d[None, :, None] * n + i[:, None, :], in_d, written


@triton.jit
def both(mask, condition):
    """A mask where a scalar condition holds, else nothing; Triton's interpreter cannot join them with &."""
    return mask & (tl.zeros(mask.shape, tl.int32) + condition.to(tl.int32) > 0)


@triton.jit
def load_states(at, written, n: tl.constexpr, STATES: tl.constexpr, dim: tl.constexpr, CHANNELS: tl.constexpr):
    """A tile of states, zero where there are none."""
    if n < STATES or dim % CHANNELS:
        return tl.load(at, mask=written, other=0.0)
    return tl.load(at)


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
    return base + token * step if MOVED else base + (tl.full([], 0, tl.int64) + k0) * step + j * step


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
    """Rows of B or C, ``(REPEATS, WIDTH)`` each, zero beyond ``n``."""
    rows = ()
    for j in tl.static_range(STEPS):
        at = row(base, tokens[j], k0, j, step, MOVED) + i
        rows += (tl.load(at, mask=i < n, other=0.0) if n < STATES else tl.load(at),)
    return rows


@triton.jit
def over(x):
    """A value for each channel beside a tile of states."""
    return x[None, :, None]


@triton.jit
def along(x):
    """A row of B or C beside a tile of states."""
    return x.to(tl.float32)[:, None, :]


@triton.jit
def over_states(x):
    """The sum of a tile over its states: first within a lane, then between lanes."""
    return tl.sum(tl.sum(x, axis=0), axis=1)


@triton.jit
def entering(
    h, end, total, a, place, count, step: tl.constexpr, at, written, d,
    n: tl.constexpr, STATES: tl.constexpr, dim: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The state that enters a chunk, from what enters the first and what each chunk in between adds to it.

    ``place`` is the first of those chunks and ``step`` leads to the next. What they add is loaded four at a time.
    """
    for q0 in range(0, count, 4):
        ends, totals = (), ()
        for j in tl.static_range(4):
            q = place + step * tl.minimum(q0 + j, count - 1)
            ends += (load_states(end + q * dim * n + at, written, n, STATES, dim, CHANNELS),)
            totals += (tl.load(total + q * dim + d),)
        for j in tl.static_range(4):
            h = tl.where(q0 + j < count, tl.exp2(over(totals[j]) * a) * h + ends[j], h)
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
        h = tl.exp2(over(steps[j]) * a) * h + over(steps[j] * raw[2][j].to(tl.float32)) * along(raw[3][j])
    return h


@triton.jit
def slope(step, SOFTPLUS: tl.constexpr):
    """Derivative of softplus, from its value: 1 - exp(-step), by its series where step is tiny."""
    if SOFTPLUS:
        return tl.where(step < 1e-3, step - step * step * 0.5, 1 - tl.exp2(step * -LOG2_E))
    return step * 0 + 1


@triton.jit
def store_sum(at, x, i, mask):
    """Write the sum of a tile over its channels, from the lanes of the first: so it needs no other layout."""
    total = tl.broadcast_to(tl.sum(x, axis=1)[:, None, :], x.shape)
    tl.store(at + i[:, None, :] + tl.zeros(x.shape, tl.int32), total, mask=mask)
