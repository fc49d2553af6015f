"""The kernels of `ssmgen.ops.scan.triton`, imported when first used: importing Triton takes a while.

Triton compiles these functions to machine code: a subset of Python, with its own arrays and loops.
"""

import triton
import triton.language as tl

from ssmgen.ops.scan.triton_tiles import (
    LOG2_E,
    advance,
    along,
    both,
    entering,
    load_channels,
    load_group,
    load_maps,
    load_rows,
    load_states,
    next_group,
    over,
    over_states,
    row,
    slope,
    step_sizes,
    store_sum,
    tile,
    tokens_of,
)
from ssmgen.ops.triton_place import program_place


@triton.jit
def forward_kernel(
    u, delta, A, B, C, D, bias, order, first_state, y, end, total, last_state, saved,
    u_batch, delta_batch, B_batch, C_batch, order_batch, length, chunk_length, chunks,
    u_step: tl.constexpr, delta_step: tl.constexpr, B_step: tl.constexpr, C_step: tl.constexpr,
    dim: tl.constexpr, n: tl.constexpr, SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr, CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """SISMA eq. 5 over a chunk of one image and a few channels: the output, and the states that backward starts from.

    The rows of the next group of steps are loaded, as they are stored, before the work on this group begins, and the
    tokens of the group after it.
    """
    MOVED: tl.constexpr = order is not None or not WHOLE
    block, chunk, batch = program_place(tl.cdiv(dim, CHANNELS), chunks)
    d, i, at, in_d, written = tile(block, dim, n, CHANNELS, WIDTH, STATES)
    a = load_states(A + at, written, n, STATES, dim, CHANNELS) * LOG2_E
    skip, shift = load_channels(D, d), load_channels(bias, d)
    h = tl.zeros(a.shape, tl.float32)
    if first_state is not None:
        h = load_states(first_state + batch * dim * n + at, written, n, STATES, dim, CHANNELS)
    if end is not None:
        h = entering(h, end, total, a, batch * chunks, chunk, 1, at, written, d, n, STATES, dim, CHANNELS)
    u, delta, y = u + batch * u_batch + d, delta + batch * delta_batch + d, y + batch * length * dim + d
    B, C = B + batch * B_batch, C + batch * C_batch
    if order is not None:
        order += batch * order_batch
    first = chunk * chunk_length
    last = tl.minimum(first + chunk_length, length)
    tokens = tokens_of(order, first, last, WHOLE, STEPS)
    raw = load_group(tokens, first, order, u, delta, B, i, u_step, delta_step, B_step, n, STATES, WHOLE, STEPS)
    Cs = load_maps(C, i, tokens, first, C_step, n, STATES, MOVED, STEPS)
    tokens = tokens_of(order, next_group(first, last, WHOLE, STEPS), last, WHOLE, STEPS)
    for k0 in range(first, last, STEPS):
        k1 = next_group(k0, last, WHOLE, STEPS)
        ahead = load_group(tokens, k1, order, u, delta, B, i, u_step, delta_step, B_step, n, STATES, WHOLE, STEPS)
        Cs_ahead = load_maps(C, i, tokens, k1, C_step, n, STATES, MOVED, STEPS)
        tokens = tokens_of(order, next_group(k1, last, WHOLE, STEPS), last, WHOLE, STEPS)
        if saved is not None:
            segment = (tl.full([], 0, tl.int32) + k0) // SEGMENT
            place = batch * tl.cdiv(length, SEGMENT) + segment
            tl.store(saved + place * dim * n + at, h, mask=both(written, segment * SEGMENT == k0))
        steps = step_sizes(raw[1], shift, k0, last, SOFTPLUS, WHOLE, STEPS)
        for j in tl.static_range(STEPS):
            x = raw[2][j].to(tl.float32)
            h = tl.exp2(over(steps[j]) * a) * h + over(steps[j] * x) * along(raw[3][j])
            out = over_states(h * along(Cs[j])) + skip * x
            tl.store(row(y, raw[0][j], k0, j, dim, MOVED), out, mask=in_d if WHOLE else both(in_d, k0 + j < last))
        raw, Cs = ahead, Cs_ahead
    tl.store(last_state + batch * dim * n + at, h, mask=both(written, chunk == chunks - 1))


@triton.jit
def carry_kernel(
    x, delta, A, maps, bias, order, end, total,
    x_batch, delta_batch, maps_batch, order_batch, length, chunk_length, chunks,
    x_step: tl.constexpr, delta_step: tl.constexpr, maps_step: tl.constexpr, dim: tl.constexpr, n: tl.constexpr,
    SOFTPLUS: tl.constexpr, BACKWARD: tl.constexpr, WHOLE: tl.constexpr, CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state, and its sum of step sizes, for all chunks but the last.

    If BACKWARD, what it adds to the state's gradient, from dy and C, for all chunks but the first.
    """
    block, chunk, batch = program_place(tl.cdiv(dim, CHANNELS), chunks - 1)
    if BACKWARD:
        chunk += 1
    d, i, at, in_d, written = tile(block, dim, n, CHANNELS, WIDTH, STATES)
    a = load_states(A + at, written, n, STATES, dim, CHANNELS) * LOG2_E
    shift, passed = load_channels(bias, d), tl.zeros([CHANNELS], tl.float32)
    x, delta, maps = x + batch * x_batch + d, delta + batch * delta_batch + d, maps + batch * maps_batch
    if order is not None:
        order += batch * order_batch
    h = tl.zeros(a.shape, tl.float32)
    first = chunk * chunk_length
    last = tl.minimum(first + chunk_length, length)
    groups = tl.cdiv(last - first, STEPS)
    k0 = first + (groups - 1) * STEPS if BACKWARD else first
    tokens = tokens_of(order, k0, last, WHOLE, STEPS)
    raw = load_group(tokens, k0, order, x, delta, maps, i, x_step, delta_step, maps_step, n, STATES, WHOLE, STEPS)
    for _ in range(groups):
        k1 = tl.maximum(k0 - STEPS, first) if BACKWARD else next_group(k0, last, WHOLE, STEPS)
        tokens = tokens_of(order, k1, last, WHOLE, STEPS)
        ahead = load_group(tokens, k1, order, x, delta, maps, i, x_step, delta_step, maps_step, n, STATES, WHOLE, STEPS)
        steps = step_sizes(raw[1], shift, k0, last, SOFTPLUS, WHOLE, STEPS)
        if BACKWARD:
            for j in tl.static_range(STEPS - 1, -1, -1):
                up = raw[2][j].to(tl.float32)
                if not WHOLE:
                    up = tl.where(k0 + j < last, up, 0.0)
                h = tl.exp2(over(steps[j]) * a) * (h + over(up) * along(raw[3][j]))
        else:
            h = advance(h, raw, steps, a, STEPS)
        for j in tl.static_range(STEPS):
            passed += steps[j]
        raw, k0 = ahead, k1
    place = batch * chunks + chunk
    tl.store(end + place * dim * n + at, h, mask=written)
    tl.store(total + place * dim + d, passed, mask=in_d)


@triton.jit
def store_starts(
    h, starts, k1, groups, last, order, u, delta, B, i, a, shift,
    u_step: tl.constexpr, delta_step: tl.constexpr, B_step: tl.constexpr, n: tl.constexpr, SOFTPLUS: tl.constexpr,
    WHOLE: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write the state before each group of a segment, from ``h`` before the first."""
    tl.store(starts, h)
    for q in range(1, groups):
        k0 = k1 + (q - 1) * STEPS
        tokens = tokens_of(order, k0, last, WHOLE, STEPS)
        raw = load_group(tokens, k0, order, u, delta, B, i, u_step, delta_step, B_step, n, STATES, WHOLE, STEPS)
        steps = step_sizes(raw[1], shift, k0, last, SOFTPLUS, True, STEPS)
        h = advance(h, raw, steps, a * LOG2_E, STEPS)
        tl.store(starts + q * SIZE, h)
    tl.debug_barrier()  # of one warp: it may now load what it has stored


@triton.jit
def backward_group(
    g, h, sum_A, sum_D, sum_bias, raw, dys, Cs, a, skip, shift, k0, last, i, in_d, summed, du, ddelta, dB, dC,
    du_step: tl.constexpr, n: tl.constexpr, SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr, MOVED: tl.constexpr,
    STATES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Gradients of a group of steps from the state before it and the gradient ``g`` of the state after it."""
    steps = step_sizes(raw[1], shift, k0, last, SOFTPLUS, WHOLE, STEPS)
    hs, decays = (h,), ()
    for j in tl.static_range(STEPS):
        decays += (tl.exp2(over(steps[j]) * (a * LOG2_E)),)
        h = decays[j] * h + over(steps[j] * raw[2][j].to(tl.float32)) * along(raw[3][j])
        hs += (h,)
    for j in tl.static_range(STEPS - 1, -1, -1):
        token, step, x, b = raw[0][j], steps[j], raw[2][j].to(tl.float32), along(raw[3][j])
        live = in_d if WHOLE else both(in_d, k0 + j < last)
        up = tl.where(live, dys[j].to(tl.float32), 0.0)
        g += over(up) * along(Cs[j])
        mapped = summed if WHOLE else both(summed, k0 + j < last)
        store_sum(row(dC, token, k0, j, n, MOVED), over(up) * hs[j + 1], i, mapped)
        store_sum(row(dB, token, k0, j, n, MOVED), g * over(step * x), i, mapped)
        to_input = over_states(g * b)
        g *= decays[j]
        exponent = g * hs[j]
        d_step = (over_states(exponent * a) + to_input * x) * slope(step, SOFTPLUS)
        sum_A += exponent * over(step)
        sum_D += up * x
        sum_bias += tl.where(live, d_step, 0.0)
        tl.store(row(du, token, k0, j, du_step, MOVED), to_input * step + skip * up, mask=live)
        tl.store(row(ddelta, token, k0, j, du_step, MOVED), d_step, mask=live)
    return g, sum_A, sum_D, sum_bias


@triton.jit
def backward_kernel(
    u, delta, A, B, C, D, bias, order, dy, dlast, saved, end, total, starts,
    du, ddelta, dA, dB, dC, dD, dbias, dinitial,
    u_batch, delta_batch, B_batch, C_batch, order_batch, length, chunk_length, chunks,
    u_step: tl.constexpr, delta_step: tl.constexpr, B_step: tl.constexpr, C_step: tl.constexpr,
    dim: tl.constexpr, n: tl.constexpr, SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr, CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk, by the adjoint of SISMA eq. 5; those of several programs as partial sums.

    A segment starts from a saved state: the states before its groups are computed first, then gradients from the end.
    """
    MOVED: tl.constexpr = order is not None or not WHOLE
    SIZE: tl.constexpr = CHANNELS * STATES
    block, chunk, batch = program_place(tl.cdiv(dim, CHANNELS), chunks)
    d, i, at, in_d, written = tile(block, dim, n, CHANNELS, WIDTH, STATES)
    a = load_states(A + at, written, n, STATES, dim, CHANNELS)
    skip, shift = load_channels(D, d), load_channels(bias, d)
    g = load_states(dlast + batch * dim * n + at, written, n, STATES, dim, CHANNELS)
    if end is not None:
        place = batch * chunks + chunks - 1
        g = entering(g, end, total, a * LOG2_E, place, chunks - 1 - chunk, -1, at, written, d, n, STATES, dim, CHANNELS)
    sum_A = tl.zeros(a.shape, tl.float32)
    sum_D, sum_bias = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    summed = (i < n)[:, None, :] & (tl.arange(0, CHANNELS) == 0)[None, :, None]
    u, delta, B, C = u + batch * u_batch + d, delta + batch * delta_batch + d, B + batch * B_batch, C + batch * C_batch
    dense, partial = batch * length * dim + d, (batch * tl.cdiv(dim, CHANNELS) + block) * length * n
    dy, du, ddelta, dB, dC = dy + dense, du + dense, ddelta + dense, dB + partial, dC + partial
    if order is not None:
        order += batch * order_batch
    first = chunk * chunk_length
    last = tl.minimum(first + chunk_length, length)
    starts += tl.program_id(0).to(tl.int64) * (SEGMENT // STEPS * SIZE)
    starts += tl.arange(0, CHANNELS)[None, :, None] * STATES + i[:, None, :]
    segments = tl.cdiv(last - first, SEGMENT)
    for back in range(segments):
        k1 = first + (segments - 1 - back) * SEGMENT
        groups = tl.cdiv(tl.minimum(last - k1, SEGMENT), STEPS)
        place = batch * tl.cdiv(length, SEGMENT) + k1 // SEGMENT
        h = load_states(saved + place * dim * n + at, written, n, STATES, dim, CHANNELS)
        store_starts(
            h, starts, k1, groups, last, order, u, delta, B, i, a, shift,
            u_step, delta_step, B_step, n, SOFTPLUS, WHOLE, STATES, STEPS, SIZE,
        )  # fmt: skip
        for q in range(groups):
            k0 = k1 + (groups - 1 - q) * STEPS
            h = tl.load(starts + (groups - 1 - q) * SIZE)
            tokens = tokens_of(order, k0, last, WHOLE, STEPS)
            raw = load_group(tokens, k0, order, u, delta, B, i, u_step, delta_step, B_step, n, STATES, WHOLE, STEPS)
            dys = load_rows(dy, raw[0], k0, dim, MOVED, STEPS)
            Cs = load_maps(C, i, raw[0], k0, C_step, n, STATES, MOVED, STEPS)
            g, sum_A, sum_D, sum_bias = backward_group(
                g, h, sum_A, sum_D, sum_bias, raw, dys, Cs, a, skip, shift, k0, last, i, in_d, summed,
                du, ddelta, dB, dC, dim, n, SOFTPLUS, WHOLE, MOVED, STATES, STEPS,
            )  # fmt: skip
    place = batch * chunks + chunk
    tl.store(dA + place * dim * n + at, sum_A, mask=written)
    tl.store(dD + place * dim + d, sum_D, mask=in_d)
    tl.store(dbias + place * dim + d, sum_bias, mask=in_d)
    tl.store(dinitial + batch * dim * n + at, g, mask=both(written, chunk == 0))
