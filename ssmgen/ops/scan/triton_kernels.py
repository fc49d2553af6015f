"""The kernels of `ssmgen.ops.scan.triton`, imported when first used: importing Triton takes a while.

Triton compiles these functions to machine code: a subset of Python, with its own arrays and loops.
"""

import triton
import triton.language as tl

from ssmgen.ops.scan.triton_groups import (
    advanced,
    before,
    group_step_sizes,
    group_tokens,
    lane_sums,
    load_channel_rows,
    load_map_rows,
    load_maps_of_group,
    pieces_of,
    pieces_of_both,
    rows_at,
    split_pairs,
    stacked,
    sum_of_lanes,
)
from ssmgen.ops.scan.triton_tiles import (
    LOG2_E,
    advance,
    along,
    both,
    decayed,
    entering,
    load_channels,
    load_group,
    load_outputs,
    load_rows,
    load_states,
    mapped,
    next_group,
    no_states,
    over,
    plus_outer,
    row,
    scaled,
    sigmoid,
    slope,
    step_sizes,
    steps_of,
    store_states,
    store_sum,
    tile,
    tokens_of,
)
from ssmgen.ops.triton_place import program_place


@triton.jit
def prepared(inputs, shift, k0, last, SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr):
    """Of a group: the sequence ``(steps, channels)`` in float32, and its rows of step sizes and of drives in turn."""
    step, x = group_step_sizes(inputs[0], shift, k0, last, SOFTPLUS, WHOLE), inputs[1].to(tl.float32)
    return x, split_pairs(step, step * x)


@triton.jit
def group_outputs(h, fed, maps, a, WIDTH: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr):
    """The states after a group of steps, and what it reads from them, ``(steps, channels)``."""
    PIECES: tl.constexpr = STATES // WIDTH
    pieces, sums = pieces_of_both(maps[0], maps[1], WIDTH), ()
    for j in tl.static_range(STEPS):
        h = advanced(h, fed[2 * j], fed[2 * j + 1], a, pieces, 2 * j * PIECES)
        sums += (lane_sums(h, pieces, (2 * j + 1) * PIECES),)
    return h, sum_of_lanes(stacked(sums, 0, STEPS))


@triton.jit
def states_at_entry(
    first_state, end, total, a, batch, chunk, chunks, d, i, in_d, dim: tl.constexpr, n: tl.constexpr,
    STATES: tl.constexpr,
):  # fmt: skip
    """The states before a chunk: those given for the image, decayed by the chunks before it, and what these add."""
    h = no_states(d, i, STATES)
    if first_state is not None:
        h = load_states(first_state + batch * dim * n, d, i, in_d, dim, n, STATES)
    if end is not None:
        h = entering(h, end, total, a, batch * chunks, chunk, 1, d, i, in_d, dim, n, STATES)
    return h


@triton.jit
def forward_kernel(
    u, delta, A, B, C, D, z, bias, order, first_state, y, end, total, last_state, saved,
    u_batch, delta_batch, B_batch, C_batch, z_batch, order_batch, length, chunk_length, chunks,
    u_step: tl.constexpr, delta_step: tl.constexpr, B_step: tl.constexpr, C_step: tl.constexpr, z_step: tl.constexpr,
    dim: tl.constexpr, n: tl.constexpr, SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr, CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr, ROUND: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """SISMA eq. 5 over a chunk of one image and a few channels: the output, and the states that backward starts from.

    Where there is a gate ``z``, the output is times SiLU(z).

    The rows of the next group of steps are loaded, as they are stored, before the work on this group begins, and the
    tokens of the group after it. A round of the loop works on several groups, so that no register is copied between.
    """
    MOVED: tl.constexpr = order is not None or not WHOLE
    block, chunk, batch = program_place(tl.cdiv(dim, CHANNELS), chunks)
    d, i, in_d = tile(block, dim, CHANNELS, WIDTH)
    a = scaled(load_states(A, d, i, in_d, dim, n, STATES), LOG2_E)
    skip, shift = load_channels(D, d), load_channels(bias, d)
    h = states_at_entry(first_state, end, total, a, batch, chunk, chunks, d, i, in_d, dim, n, STATES)
    u, delta, y = u + batch * u_batch, delta + batch * delta_batch, y + batch * length * dim
    B, C = B + batch * B_batch, C + batch * C_batch
    if z is not None:
        z += batch * z_batch
    if order is not None:
        order += batch * order_batch
    first, last = steps_of(chunk, chunk_length, length)
    k1 = next_group(first, last, WHOLE, STEPS)
    tokens, tokens1 = group_tokens(order, first, last, WHOLE, STEPS), group_tokens(order, k1, last, WHOLE, STEPS)
    tokens2 = group_tokens(order, next_group(k1, last, WHOLE, STEPS), last, WHOLE, STEPS)
    map_tokens = group_tokens(order, k1, last, WHOLE, STEPS)
    inputs = load_channel_rows(delta, u, tokens, first, d, delta_step, u_step, MOVED)
    maps = load_maps_of_group(B, C, tokens, first, B_step, C_step, n, STATES, MOVED)
    x, fed = prepared(inputs, shift, first, last, SOFTPLUS, WHOLE)
    inputs = load_channel_rows(delta, u, tokens1, k1, d, delta_step, u_step, MOVED)
    for start in range(first, last, ROUND):
        for group in tl.static_range(ROUND // STEPS):
            k0 = start + group * STEPS
            k1 = next_group(k0, last, WHOLE, STEPS)
            k2 = next_group(k1, last, WHOLE, STEPS)
            inputs_ahead = load_channel_rows(delta, u, tokens2, k2, d, delta_step, u_step, MOVED)
            maps_ahead = load_maps_of_group(B, C, map_tokens, k1, B_step, C_step, n, STATES, MOVED)
            tokens3 = group_tokens(order, next_group(k2, last, WHOLE, STEPS), last, WHOLE, STEPS)
            map_tokens = group_tokens(order, k2, last, WHOLE, STEPS)
            if z is not None:
                gate = tl.load(rows_at(z, tokens, k0, d, z_step, MOVED))
            if saved is not None and group == 0:
                segment = (tl.full([], 0, tl.int32) + k0) // SEGMENT
                place = batch * tl.cdiv(length, SEGMENT) + segment
                store_states(saved + place * dim * n, h, d, i, both(in_d, segment * SEGMENT == k0), n)
            x_ahead, fed_ahead = prepared(inputs, shift, k1, last, SOFTPLUS, WHOLE)
            h, out = group_outputs(h, fed, maps, a, WIDTH, STATES, STEPS)
            out += skip[None, :] * x
            if z is not None:
                out *= gate.to(tl.float32) * sigmoid(gate.to(tl.float32))
            live = in_d[None, :] if WHOLE else in_d[None, :] & before(last, k0, STEPS)
            tl.store(rows_at(y, tokens, k0, d, dim, MOVED), out.to(y.dtype.element_ty), mask=live)
            x, fed, inputs, maps = x_ahead, fed_ahead, inputs_ahead, maps_ahead
            tokens, tokens1, tokens2 = tokens1, tokens2, tokens3
    store_states(last_state + batch * dim * n, h, d, i, both(in_d, chunk == chunks - 1), n)


@triton.jit
def carry_kernel(
    x, delta, A, maps, z, bias, order, end, total,
    x_batch, delta_batch, maps_batch, z_batch, order_batch, length, chunk_length, chunks,
    x_step: tl.constexpr, delta_step: tl.constexpr, maps_step: tl.constexpr, z_step: tl.constexpr,
    dim: tl.constexpr, n: tl.constexpr, SOFTPLUS: tl.constexpr, BACKWARD: tl.constexpr, WHOLE: tl.constexpr,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state, and its sum of step sizes, for all chunks but the last.

    If BACKWARD, what it adds to the state's gradient, from dy, C and the gate, for all chunks but the first.
    """
    MOVED: tl.constexpr = order is not None or not WHOLE
    PIECES: tl.constexpr = STATES // WIDTH
    block, chunk, batch = program_place(tl.cdiv(dim, CHANNELS), chunks - 1)
    if BACKWARD:
        chunk += 1
    d, i, in_d = tile(block, dim, CHANNELS, WIDTH)
    a = scaled(load_states(A, d, i, in_d, dim, n, STATES), LOG2_E)
    shift, passed = load_channels(bias, d), tl.zeros([CHANNELS], tl.float32)
    x, delta, maps = x + batch * x_batch, delta + batch * delta_batch, maps + batch * maps_batch
    if z is not None:
        z += batch * z_batch
    if order is not None:
        order += batch * order_batch
    h = no_states(d, i, STATES)
    first, last = steps_of(chunk, chunk_length, length)
    groups = tl.cdiv(last - first, STEPS)
    k0 = first + (groups - 1) * STEPS if BACKWARD else first
    tokens = group_tokens(order, k0, last, WHOLE, STEPS)
    inputs = load_channel_rows(delta, x, tokens, k0, d, delta_step, x_step, MOVED)
    rows = load_map_rows(maps, tokens, k0, maps_step, n, STATES, MOVED)
    for _ in range(groups):
        k1 = tl.maximum(k0 - STEPS, first) if BACKWARD else next_group(k0, last, WHOLE, STEPS)
        if BACKWARD and z is not None:
            gate = tl.load(rows_at(z, tokens, k0, d, z_step, MOVED)).to(tl.float32)
        tokens = group_tokens(order, k1, last, WHOLE, STEPS)
        inputs_ahead = load_channel_rows(delta, x, tokens, k1, d, delta_step, x_step, MOVED)
        rows_ahead = load_map_rows(maps, tokens, k1, maps_step, n, STATES, MOVED)
        step, drive = group_step_sizes(inputs[0], shift, k0, last, SOFTPLUS, WHOLE), inputs[1].to(tl.float32)
        if BACKWARD:
            if z is not None:
                drive *= gate * sigmoid(gate)
            if not WHOLE:
                drive = tl.where(before(last, k0, STEPS), drive, 0.0)
        else:
            drive *= step
        fed, pieces = split_pairs(step, drive), pieces_of(rows, WIDTH)
        if BACKWARD:
            for j in tl.static_range(STEPS - 1, -1, -1):
                h = decayed(plus_outer(h, fed[2 * j + 1], pieces, j * PIECES), fed[2 * j], a)
        else:
            for j in tl.static_range(STEPS):
                h = advanced(h, fed[2 * j], fed[2 * j + 1], a, pieces, j * PIECES)
        passed += tl.sum(step, axis=0)
        inputs, rows, k0 = inputs_ahead, rows_ahead, k1
    place = batch * chunks + chunk
    store_states(end + place * dim * n, h, d, i, in_d, n)
    tl.store(total + place * dim + d, passed, mask=in_d)


@triton.jit
def store_scratch(at, tiles):
    """Write tiles of states one after another; ``at`` holds the places of the first."""
    for r in tl.static_range(len(tiles)):
        tl.store(at + r * tiles[r].numel, tiles[r])


@triton.jit
def load_scratch(at, REPEATS: tl.constexpr):
    """Read what `store_scratch` wrote."""
    tiles = ()
    for r in tl.static_range(REPEATS):
        tiles += (tl.load(at + r * at.numel),)
    return tiles


@triton.jit
def store_starts(
    h, starts, k1, groups, last, order, u, delta, B, i, a, shift,
    u_step: tl.constexpr, delta_step: tl.constexpr, B_step: tl.constexpr, n: tl.constexpr, SOFTPLUS: tl.constexpr,
    WHOLE: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write the state before each group of a segment, from ``h`` before the first."""
    store_scratch(starts, h)
    for q in range(1, groups):
        k0 = k1 + (q - 1) * STEPS
        tokens = tokens_of(order, k0, last, WHOLE, STEPS)
        raw = load_group(tokens, k0, order, u, delta, B, i, u_step, delta_step, B_step, n, STATES, WHOLE, STEPS)
        steps = step_sizes(raw[1], shift, k0, last, SOFTPLUS, True, STEPS)
        h = advance(h, raw, steps, scaled(a, LOG2_E), STEPS)
        store_scratch(starts + q * SIZE, h)
    tl.debug_barrier()  # of one warp: it may now load what it has stored


@triton.jit
def backward_group(
    g, h, sum_A, sum_D, sum_bias, raw, dys, outputs, a, skip, shift, k0, last, i, in_d, summed,
    du, ddelta, dB, dC, dz,
    du_step: tl.constexpr, n: tl.constexpr, SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr, MOVED: tl.constexpr,
    STATES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Gradients of a group of steps from the state before it and the gradient ``g`` of the state after it."""
    REPEATS: tl.constexpr = len(a)
    steps = step_sizes(raw[1], shift, k0, last, SOFTPLUS, WHOLE, STEPS)
    hs, decays = (h,), ()
    for j in tl.static_range(STEPS):
        decay, after, drive = (), (), steps[j] * raw[2][j].to(tl.float32)
        for r in tl.static_range(REPEATS):
            decay += (tl.exp2(over(steps[j]) * (a[r] * LOG2_E)),)
            after += (decay[r] * hs[j][r] + over(drive) * along(raw[3][j][r]),)
        hs += (after,)
        decays += (decay,)
    for j in tl.static_range(STEPS - 1, -1, -1):
        token, step, x = raw[0][j], steps[j], raw[2][j].to(tl.float32)
        live, counted = (in_d, summed) if WHOLE else (both(in_d, k0 + j < last), both(summed, k0 + j < last))
        up = tl.where(live, dys[j].to(tl.float32), 0.0)
        if dz is not None:
            gate = outputs[1][j].to(tl.float32)
            opened = sigmoid(gate)
            d_gate = up * (mapped(hs[j + 1], outputs[0][j]) + skip * x) * (opened * (1 + gate * (1 - opened)))
            tl.store(row(dz, token, k0, j, du_step, MOVED), d_gate, mask=live)
            up *= gate * opened
        before, sums_A = (), ()
        for r in tl.static_range(REPEATS):
            b, after = along(raw[3][j][r]), g[r] + over(up) * along(outputs[0][j][r])
            store_sum(row(dC, token, k0, j, n, MOVED), over(up) * hs[j + 1][r], i, r, counted, n)
            store_sum(row(dB, token, k0, j, n, MOVED), after * over(step * x), i, r, counted, n)
            before += (after * decays[j][r],)
            exponent = before[r] * hs[j][r]
            sums_A += (sum_A[r] + exponent * over(step),)
            if r == 0:
                inputs, exponents = after * b, exponent * a[r]
            else:
                inputs, exponents = inputs + after * b, exponents + exponent * a[r]
        g, sum_A, to_input = before, sums_A, tl.sum(inputs, axis=1)
        d_step = (tl.sum(exponents, axis=1) + to_input * x) * slope(step, SOFTPLUS)
        sum_D += up * x
        sum_bias += tl.where(live, d_step, 0.0)
        tl.store(row(du, token, k0, j, du_step, MOVED), to_input * step + skip * up, mask=live)
        tl.store(row(ddelta, token, k0, j, du_step, MOVED), d_step, mask=live)
    return g, sum_A, sum_D, sum_bias


@triton.jit
def backward_kernel(
    u, delta, A, B, C, D, z, bias, order, dy, dlast, saved, end, total, starts,
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial,
    u_batch, delta_batch, B_batch, C_batch, z_batch, order_batch, length, chunk_length, chunks,
    u_step: tl.constexpr, delta_step: tl.constexpr, B_step: tl.constexpr, C_step: tl.constexpr, z_step: tl.constexpr,
    dim: tl.constexpr, n: tl.constexpr, SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr, CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk, by the adjoint of SISMA eq. 5; those of several programs as partial sums.

    A segment starts from a saved state: the states before its groups are computed first, then gradients from the end.
    """
    MOVED: tl.constexpr = order is not None or not WHOLE
    SIZE: tl.constexpr = CHANNELS * STATES
    block, chunk, batch = program_place(tl.cdiv(dim, CHANNELS), chunks)
    d, i, in_d = tile(block, dim, CHANNELS, WIDTH)
    a = load_states(A, d, i, in_d, dim, n, STATES)
    skip, shift = load_channels(D, d), load_channels(bias, d)
    g = load_states(dlast + batch * dim * n, d, i, in_d, dim, n, STATES)
    if end is not None:
        place = batch * chunks + chunks - 1
        g = entering(g, end, total, scaled(a, LOG2_E), place, chunks - 1 - chunk, -1, d, i, in_d, dim, n, STATES)
    sum_A, sum_D, sum_bias = no_states(d, i, STATES), tl.zeros(d.shape, tl.float32), tl.zeros(d.shape, tl.float32)
    summed = tl.arange(0, CHANNELS) == 0
    u, delta, B, C = u + batch * u_batch + d, delta + batch * delta_batch + d, B + batch * B_batch, C + batch * C_batch
    dense, partial = batch * length * dim + d, (batch * tl.cdiv(dim, CHANNELS) + block) * length * n
    dy, du, ddelta, dB, dC = dy + dense, du + dense, ddelta + dense, dB + partial, dC + partial
    if z is not None:
        z, dz = z + batch * z_batch + d, dz + dense
    if order is not None:
        order += batch * order_batch
    first, last = steps_of(chunk, chunk_length, length)
    starts += tl.program_id(0).to(tl.int64) * (SEGMENT // STEPS * SIZE)
    starts += tl.arange(0, CHANNELS)[:, None] * WIDTH + i[None, :]
    segments = tl.cdiv(last - first, SEGMENT)
    for back in range(segments):
        k1 = first + (segments - 1 - back) * SEGMENT
        groups = tl.cdiv(tl.minimum(last - k1, SEGMENT), STEPS)
        place = batch * tl.cdiv(length, SEGMENT) + k1 // SEGMENT
        h = load_states(saved + place * dim * n, d, i, in_d, dim, n, STATES)
        store_starts(
            h, starts, k1, groups, last, order, u, delta, B, i, a, shift,
            u_step, delta_step, B_step, n, SOFTPLUS, WHOLE, STATES, STEPS, SIZE,
        )  # fmt: skip
        for q in range(groups):
            k0 = k1 + (groups - 1 - q) * STEPS
            h = load_scratch(starts + (groups - 1 - q) * SIZE, STATES // WIDTH)
            tokens = tokens_of(order, k0, last, WHOLE, STEPS)
            raw = load_group(tokens, k0, order, u, delta, B, i, u_step, delta_step, B_step, n, STATES, WHOLE, STEPS)
            dys = load_rows(dy, raw[0], k0, dim, MOVED, STEPS)
            outputs = load_outputs(C, z, i, raw[0], k0, C_step, z_step, n, STATES, MOVED, STEPS)
            g, sum_A, sum_D, sum_bias = backward_group(
                g, h, sum_A, sum_D, sum_bias, raw, dys, outputs, a, skip, shift, k0, last, i, in_d, summed,
                du, ddelta, dB, dC, dz, dim, n, SOFTPLUS, WHOLE, MOVED, STATES, STEPS,
            )  # fmt: skip
    place = batch * chunks + chunk
    store_states(dA + place * dim * n, sum_A, d, i, in_d, n)
    tl.store(dD + place * dim + d, sum_D, mask=in_d)
    tl.store(dbias + place * dim + d, sum_bias, mask=in_d)
    store_states(dinitial + batch * dim * n, g, d, i, both(in_d, chunk == 0), n)
