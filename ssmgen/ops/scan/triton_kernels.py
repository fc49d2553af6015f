"""The kernels of `ssmgen.ops.scan.triton`, imported when first used: importing Triton takes a while.

Triton compiles these functions to machine code: a subset of Python, with its own arrays and loops.
"""

import triton
import triton.language as tl


@triton.jit
def _step_size(delta, bias, SOFTPLUS: tl.constexpr):
    """softplus(delta + bias) (Mamba, algorithm 2); log(1 + e) by its series where e is tiny."""
    x = delta + bias
    if SOFTPLUS:
        e = tl.exp(-tl.abs(x))
        x = tl.maximum(x, 0) + tl.where(e < 1e-3, e - e * e * 0.5, tl.log(1 + e))
    return x


@triton.jit
def _slope(step, SOFTPLUS: tl.constexpr):
    """Derivative of softplus, from its value: 1 - exp(-step), by its series where step is tiny."""
    if SOFTPLUS:
        return tl.where(step < 1e-3, step - step * step * 0.5, 1 - tl.exp(-step))
    return step * 0 + 1


@triton.jit
def _tile(block, dim, n, CHANNELS: tl.constexpr, STATES: tl.constexpr):
    """Channels and states of a program, where its states lie in ``(dim, n)``, and which exist: states, d, i."""
    d, i = block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
    in_d, in_n = d < dim, i < n
    return d, i, d[:, None] * n + i[None, :], in_d[:, None] & in_n[None, :], in_d, in_n


@triton.jit
def _step(order, first, k, last, length, d, dim, i, n, HAS_ORDER: tl.constexpr):
    """The token of step k, and which channels and states to load: none from step ``last`` on.

    ``order + first`` is where this image's order begins.
    """
    token = tl.load(order + first + k, mask=length > k, other=0) if HAS_ORDER else tl.full([], 0, tl.int64) + k
    return token, d < tl.where(last > k, dim, 0), i < tl.where(last > k, n, 0)


@triton.jit
def _row(at, mask):
    """The values at these addresses as float32, zero where masked out."""
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    u, delta, A, B, C, D, bias, order, start, y, end, total, saved,
    u_batch, u_step, delta_batch, delta_step, B_batch, B_step, C_batch, C_step, order_batch,
    length, dim, n, chunk_length, groups,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_START: tl.constexpr, OUTPUT: tl.constexpr, SAVE: tl.constexpr,
    CHANNELS: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """SISMA eq. 5 over a chunk of one image and a few channels: the output, or the end state and sum of step sizes."""
    chunk, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(1)
    d, i, at, tile, in_d, in_n = _tile(tl.program_id(0), dim, n, CHANNELS, STATES)
    a = tl.load(A + at, mask=tile, other=0.0) * 1.4426950408889634
    skip = tl.load(D + d, mask=in_d, other=0.0) if HAS_D else tl.zeros([CHANNELS], tl.float32)
    shift = tl.load(bias + d, mask=in_d, other=0.0) if HAS_BIAS else tl.zeros([CHANNELS], tl.float32)
    h = tl.zeros([CHANNELS, STATES], tl.float32)
    if HAS_START:
        h = tl.load(start + (batch * chunks + chunk) * dim * n + at, mask=tile, other=0.0)
    passed = tl.zeros([CHANNELS], tl.float32)
    last = tl.minimum((chunk + 1) * chunk_length, length)
    for k0 in range(chunk * chunk_length, last, STEPS):
        if SAVE:
            tl.store(saved + (batch * groups + k0 // STEPS) * dim * n + at, h, mask=tile)
        # All loads of a group of steps first, so that they are under way together.
        xs, steps, Bs, Cs = (), (), (), ()
        for j in tl.static_range(STEPS):
            o, live, row = _step(order, batch * order_batch, k0 + j, last, length, d, dim, i, n, HAS_ORDER)
            xs += (_row(u + batch * u_batch + o * u_step + d, live),)
            raw = _row(delta + batch * delta_batch + o * delta_step + d, live)
            steps += (tl.where(live, _step_size(raw, shift, SOFTPLUS), 0.0),)
            Bs += (_row(B + batch * B_batch + o * B_step + i, row),)
            if OUTPUT:
                Cs += (_row(C + batch * C_batch + o * C_step + i, row),)
        for j in tl.static_range(STEPS):
            h = tl.exp2(steps[j][:, None] * a) * h + (steps[j] * xs[j])[:, None] * Bs[j][None, :]
            if OUTPUT:
                o, live, _ = _step(order, batch * order_batch, k0 + j, last, length, d, dim, i, n, HAS_ORDER)
                out = tl.sum(h * Cs[j][None, :], axis=1) + skip * xs[j]
                tl.store(y + (batch * length + o) * dim + d, out, mask=live)
            else:
                passed += steps[j]
    tl.store(end + (batch * chunks + chunk) * dim * n + at, h, mask=tile)
    if not OUTPUT:
        tl.store(total + (batch * chunks + chunk) * dim + d, passed, mask=in_d)


@triton.jit
def chain_kernel(
    A, first, end, total, start, last, dim, n, chunks,
    HAS_FIRST: tl.constexpr, REVERSE: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """The state at each chunk's start, from the end states of chunks that start at zero; from the back if REVERSE."""
    batch = tl.program_id(1).to(tl.int64)
    d, i, at, tile, in_d, in_n = _tile(tl.program_id(0), dim, n, CHANNELS, STATES)
    a = tl.load(A + at, mask=tile, other=0.0) * 1.4426950408889634
    h = tl.zeros([CHANNELS, STATES], tl.float32)
    if HAS_FIRST:
        h = tl.load(first + batch * dim * n + at, mask=tile, other=0.0)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        place = batch * chunks + chunk
        tl.store(start + place * dim * n + at, h, mask=tile)
        passed = tl.load(total + place * dim + d, mask=in_d, other=0.0)
        h = tl.exp2(passed[:, None] * a) * h + tl.load(end + place * dim * n + at, mask=tile, other=0.0)
    tl.store(last + batch * dim * n + at, h, mask=tile)


@triton.jit
def gradient_kernel(
    delta, A, C, bias, order, dy, end, total,
    delta_batch, delta_step, C_batch, C_step, order_batch, length, dim, n, chunk_length,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr,
    CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """The gradient that a chunk passes to the chunk before it if it receives none, and its sum of step sizes."""
    chunk, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(1)
    d, i, at, tile, in_d, in_n = _tile(tl.program_id(0), dim, n, CHANNELS, STATES)
    a = tl.load(A + at, mask=tile, other=0.0) * 1.4426950408889634
    shift = tl.load(bias + d, mask=in_d, other=0.0) if HAS_BIAS else tl.zeros([CHANNELS], tl.float32)
    g, passed = tl.zeros([CHANNELS, STATES], tl.float32), tl.zeros([CHANNELS], tl.float32)
    first = chunk * chunk_length
    last = tl.minimum(first + chunk_length, length)
    for back in range(0, last - first):
        k = last - 1 - back
        o, _, _ = _step(order, batch * order_batch, k, last, length, d, dim, i, n, HAS_ORDER)
        raw = _row(delta + batch * delta_batch + o * delta_step + d, in_d)
        step = tl.where(in_d, _step_size(raw, shift, SOFTPLUS), 0.0)
        up = _row(dy + (batch * length + o) * dim + d, in_d)
        c = _row(C + batch * C_batch + o * C_step + i, in_n)
        g = tl.exp2(step[:, None] * a) * (g + up[:, None] * c[None, :])
        passed += step
    tl.store(end + (batch * chunks + chunk) * dim * n + at, g, mask=tile)
    tl.store(total + (batch * chunks + chunk) * dim + d, passed, mask=in_d)


@triton.jit
def backward_kernel(
    u, delta, A, B, C, D, bias, order, dy, saved, start, du, ddelta, dA, dB, dC, dD, dbias, dinitial,
    u_batch, u_step, delta_batch, delta_step, B_batch, B_step, C_batch, C_step, order_batch,
    length, dim, n, chunk_length, groups,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr,
    CHANNELS: tl.constexpr, STATES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk, by the adjoint of SISMA eq. 5; those of several programs as partial sums."""
    block, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks, chunks = tl.num_programs(0), tl.num_programs(1)
    d, i, at, tile, in_d, in_n = _tile(block, dim, n, CHANNELS, STATES)
    a = tl.load(A + at, mask=tile, other=0.0)
    skip = tl.load(D + d, mask=in_d, other=0.0) if HAS_D else tl.zeros([CHANNELS], tl.float32)
    shift = tl.load(bias + d, mask=in_d, other=0.0) if HAS_BIAS else tl.zeros([CHANNELS], tl.float32)
    place = batch * chunks + chunk
    g = tl.load(start + place * dim * n + at, mask=tile, other=0.0)
    sum_A = tl.zeros([CHANNELS, STATES], tl.float32)
    sum_D, sum_bias = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    first = chunk * chunk_length
    last = tl.minimum(first + chunk_length, length)
    rounds = tl.cdiv(last - first, STEPS)
    for back in range(rounds):
        k0 = first + (rounds - 1 - back) * STEPS
        h = tl.load(saved + (batch * groups + k0 // STEPS) * dim * n + at, mask=tile, other=0.0)
        xs, steps, ups, hs = (), (), (), (h,)
        for j in tl.static_range(STEPS):
            o, live, _ = _step(order, batch * order_batch, k0 + j, last, length, d, dim, i, n, HAS_ORDER)
            xs += (_row(u + batch * u_batch + o * u_step + d, live),)
            raw = _row(delta + batch * delta_batch + o * delta_step + d, live)
            steps += (tl.where(live, _step_size(raw, shift, SOFTPLUS), 0.0),)
            ups += (_row(dy + (batch * length + o) * dim + d, live),)
        for j in tl.static_range(STEPS):
            o, _, row = _step(order, batch * order_batch, k0 + j, last, length, d, dim, i, n, HAS_ORDER)
            b = _row(B + batch * B_batch + o * B_step + i, row)
            decay = tl.exp2(steps[j][:, None] * (a * 1.4426950408889634))
            h = decay * h + (steps[j] * xs[j])[:, None] * b[None, :]
            hs += (h,)
        for j in tl.static_range(STEPS - 1, -1, -1):
            o, live, row = _step(order, batch * order_batch, k0 + j, last, length, d, dim, i, n, HAS_ORDER)
            b = _row(B + batch * B_batch + o * B_step + i, row)
            c = _row(C + batch * C_batch + o * C_step + i, row)
            g += ups[j][:, None] * c[None, :]
            partial = ((batch * blocks + block) * length + o) * n + i
            tl.store(dC + partial, tl.sum(ups[j][:, None] * hs[j + 1], axis=0), mask=row)
            tl.store(dB + partial, tl.sum(g * (steps[j] * xs[j])[:, None], axis=0), mask=row)
            to_input = tl.sum(g * b[None, :], axis=1)
            g = g * tl.exp2(steps[j][:, None] * (a * 1.4426950408889634))
            exponent = g * hs[j]
            d_step = (tl.sum(exponent * a, axis=1) + to_input * xs[j]) * _slope(steps[j], SOFTPLUS)
            sum_A += exponent * steps[j][:, None]
            sum_D += ups[j] * xs[j]
            sum_bias += tl.where(live, d_step, 0.0)
            dense = (batch * length + o) * dim + d
            tl.store(du + dense, to_input * steps[j] + skip * ups[j], mask=live)
            tl.store(ddelta + dense, d_step, mask=live)
    tl.store(dA + place * dim * n + at, sum_A, mask=tile)
    tl.store(dD + place * dim + d, sum_D, mask=in_d)
    tl.store(dbias + place * dim + d, sum_bias, mask=in_d)
    if chunk == 0:
        tl.store(dinitial + batch * dim * n + at, g, mask=tile)
