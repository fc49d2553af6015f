"""The kernels of `ssmgen.ops.ssd.triton`, imported when first used: importing Triton takes a while.

Triton compiles these functions to machine code: a subset of Python, with its own arrays and loops. A program works on
one chunk of one head of one image: STEPS steps, WIDTH channels and STATES states, each padded to a power of two. Dots
take float32 operands. PRECISION is "ieee" for float32 inputs, and "tf32" for 16-bit ones: it keeps all their bits, and
as many of what is computed from them as float16 has.
"""

import triton
import triton.language as tl

from ssmgen.ops.triton_place import program_place


@triton.jit
def _place(order, order_batch, length, heads, HAS_ORDER: tl.constexpr, STEPS: tl.constexpr):
    """Chunk, head and image of this program, the tokens of its steps and which of them exist."""
    chunk, head, batch = program_place(tl.cdiv(length, STEPS), heads)
    k = chunk * STEPS + tl.arange(0, STEPS)
    live = k < length
    token = k.to(tl.int64)
    if HAS_ORDER:
        token = tl.load(order + batch * order_batch + k, mask=live, other=0)
    return chunk, head, batch, token, live


@triton.jit
def _rows(at, token, step, i, count, live):
    """The rows of these tokens as float32 ``(STEPS, padded count)``, zero where there are none."""
    mask = live[:, None] & (i < count)[None, :]
    return tl.load(at + token[:, None] * step + i[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _exponents(delta, A, batch, head, heads, length, token, live, STEPS: tl.constexpr):
    """Step sizes, their head's A, the decay's exponent from the chunk's start to each step, and to the chunk's end."""
    a = tl.load(A + head)
    step = tl.load(delta + (batch * length + token) * heads + head, mask=live, other=0.0)
    return step, a, tl.cumsum(step * a, axis=0), tl.sum(step * a, axis=0)


@triton.jit
def _state(at, p, i, width, n):
    """A state ``(WIDTH, STATES)``, zero where it ends."""
    mask = (p < width)[:, None] & (i < n)[None, :]
    return tl.load(at + p[:, None] * n + i[None, :], mask=mask, other=0.0)


@triton.jit
def _put_state(at, value, p, i, width, n):
    mask = (p < width)[:, None] & (i < n)[None, :]
    tl.store(at + p[:, None] * n + i[None, :], value, mask=mask)


@triton.jit
def _put_rows(at, value, token, step, i, count, live):
    tl.store(at + token[:, None] * step + i[None, :], value, mask=live[:, None] & (i < count)[None, :])


@triton.jit
def _decays(total, STEPS: tl.constexpr):
    """``exp(total_i - total_j)`` for i >= j, else 0. An exponent may be positive, as ``delta A`` may."""
    k = tl.arange(0, STEPS)
    return tl.exp(tl.where(k[:, None] >= k[None, :], total[:, None] - total[None, :], float("-inf")))


@triton.jit
def gain_kernel(
    x, delta, A, B, order, gain, passed,
    x_batch, x_step, x_head, B_batch, B_step, B_group, order_batch, length, heads, groups, width, n,
    HAS_ORDER: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
    STEPS: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state that passes through it, and the factor by which it multiplies that state.

    BACKWARD: what it adds to the state's gradient on its way to the front; ``x`` and ``B`` are then ``dy`` and ``C``.
    """
    chunk, head, batch, token, live = _place(order, order_batch, length, heads, HAS_ORDER, STEPS)
    p, i, group = tl.arange(0, WIDTH), tl.arange(0, STATES), head // (heads // groups)
    step, _, total, whole = _exponents(delta, A, batch, head, heads, length, token, live, STEPS)
    rows = _rows(x + batch * x_batch + head * x_head, token, x_step, p, width, live)
    maps = _rows(B + batch * B_batch + group * B_group, token, B_step, i, n, live)
    weight = tl.exp(total) if BACKWARD else step * tl.exp(whole - total)
    added = tl.dot(tl.trans(rows * weight[:, None]), maps, input_precision=PRECISION)
    place = (batch * tl.cdiv(length, STEPS) + chunk) * heads + head
    _put_state(gain + place * width * n, added, p, i, width, n)
    tl.store(passed + place, tl.exp(whole))


@triton.jit
def pass_kernel(
    first, gain, passed, entering, last, heads, size, chunks,
    REVERSE: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """The state that enters each chunk, and the last one; from the back, the gradient that enters, if REVERSE."""
    part, head, batch = program_place(tl.cdiv(size, ELEMENTS), heads)
    at = part * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = at < size
    state = tl.load(first + (batch * heads + head) * size + at, mask=mask, other=0.0)
    for step in range(chunks):
        place = (batch * chunks + (chunks - 1 - step if REVERSE else step)) * heads + head
        tl.store(entering + place * size + at, state, mask=mask)
        added = tl.load(gain + place * size + at, mask=mask, other=0.0)
        state = tl.load(passed + place) * state + added
    tl.store(last + (batch * heads + head) * size + at, state, mask=mask)


@triton.jit
def output_kernel(
    x, delta, A, B, C, order, entering, y,
    x_batch, x_step, x_head, B_batch, B_step, B_group, C_batch, C_step, C_group,
    order_batch, length, heads, groups, width, n,
    HAS_ORDER: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """The output of a chunk, from its own steps and from the state that enters."""
    chunk, head, batch, token, live = _place(order, order_batch, length, heads, HAS_ORDER, STEPS)
    p, i, group = tl.arange(0, WIDTH), tl.arange(0, STATES), head // (heads // groups)
    step, _, total, _ = _exponents(delta, A, batch, head, heads, length, token, live, STEPS)
    xs = _rows(x + batch * x_batch + head * x_head, token, x_step, p, width, live)
    Bs = _rows(B + batch * B_batch + group * B_group, token, B_step, i, n, live)
    Cs = _rows(C + batch * C_batch + group * C_group, token, C_step, i, n, live)
    place = (batch * tl.cdiv(length, STEPS) + chunk) * heads + head
    state = _state(entering + place * width * n, p, i, width, n)
    scores = tl.dot(Cs, tl.trans(Bs), input_precision=PRECISION) * _decays(total, STEPS) * step[None, :]
    out = tl.dot(scores, xs, input_precision=PRECISION)
    out += tl.exp(total)[:, None] * tl.dot(Cs, tl.trans(state), input_precision=PRECISION)
    _put_rows(y + (batch * length * heads + head) * width, out, token, heads * width, p, width, live)


@triton.jit
def gradient_kernel(
    x, delta, A, B, C, order, entering, dy, leaving, dx, ddelta, dA, dB, dC,
    x_batch, x_step, x_head, B_batch, B_step, B_group, C_batch, C_step, C_group,
    order_batch, length, heads, groups, width, n,
    HAS_ORDER: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk and head; those of A, B and C as partial sums.

    ``leaving`` is the gradient with respect to the state that leaves the chunk. An exponent scales what its step reads
    from earlier steps and from the state that enters, and the reverse of it what later steps read from this one. What
    a step reads from itself would cancel and is left out: it is the largest part, and so the largest rounding error.
    """
    chunk, head, batch, token, live = _place(order, order_batch, length, heads, HAS_ORDER, STEPS)
    p, i, group = tl.arange(0, WIDTH), tl.arange(0, STATES), head // (heads // groups)
    step, a, total, whole = _exponents(delta, A, batch, head, heads, length, token, live, STEPS)
    xs = _rows(x + batch * x_batch + head * x_head, token, x_step, p, width, live)
    Bs = _rows(B + batch * B_batch + group * B_group, token, B_step, i, n, live)
    Cs = _rows(C + batch * C_batch + group * C_group, token, C_step, i, n, live)
    ups = _rows(dy + (batch * length * heads + head) * width, token, heads * width, p, width, live)
    place = (batch * tl.cdiv(length, STEPS) + chunk) * heads + head
    state = _state(entering + place * width * n, p, i, width, n)
    g = _state(leaving + place * width * n, p, i, width, n)
    decays, kept, carried = _decays(total, STEPS), tl.exp(whole - total), tl.exp(total)

    products = tl.dot(Cs, tl.trans(Bs), input_precision=PRECISION)
    scores = products * decays
    to_step = tl.dot(tl.trans(scores), ups, input_precision=PRECISION)  # the gradient of step x
    to_step += kept[:, None] * tl.dot(Bs, tl.trans(g), input_precision=PRECISION)
    pairs = tl.dot(ups, tl.trans(xs), input_precision=PRECISION) * decays * step[None, :]
    from_entering = carried[:, None] * tl.dot(ups, state, input_precision=PRECISION)
    to_C = tl.dot(pairs, Bs, input_precision=PRECISION) + from_entering
    from_state = (kept * step)[:, None] * tl.dot(xs, g, input_precision=PRECISION)
    to_B = tl.dot(tl.trans(pairs), Cs, input_precision=PRECISION) + from_state

    k = tl.arange(0, STEPS)
    between = tl.where(k[:, None] > k[None, :], pairs * products, 0.0)
    read, kept_for_later = tl.sum(Cs * from_entering, axis=1), tl.sum(Bs * from_state, axis=1)
    to_total = tl.sum(between, axis=1) - tl.sum(between, axis=0) + read
    before = tl.cumsum(kept_for_later, axis=0) - kept_for_later  # of the steps before each
    to_exponent = tl.cumsum(to_total, axis=0, reverse=True) + before + tl.exp(whole) * tl.sum(g * state)
    rows = (batch * length * heads + head).to(tl.int64)
    _put_rows(dx + rows * width, to_step * step[:, None], token, heads * width, p, width, live)
    _put_rows(dC + rows * n, to_C, token, heads * n, i, n, live)
    _put_rows(dB + rows * n, to_B, token, heads * n, i, n, live)
    tl.store(ddelta + rows + token * heads, to_exponent * a + tl.sum(xs * to_step, axis=1), mask=live)
    tl.store(dA + place, tl.sum(to_exponent * step))
