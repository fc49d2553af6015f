"""The kernels of `ssmgen.ops.local.triton`, imported when first used: importing Triton takes a while.

Triton compiles these functions to machine code: a subset of Python, with its own arrays and loops. A program is one
warp and owns a few channels of one image, of which each lane holds two or more side by side. A token is a vector of
these channels; rows of tokens are tuples, so that which tokens meet is known when the kernel is compiled. K is the
side of the convolution's kernel.
"""

import triton
import triton.language as tl

from ssmgen.ops.scan.triton_tiles import LOG2_E, both
from ssmgen.ops.triton_place import program_place


@triton.jit
def channels_of(block, dim: tl.constexpr, CHANNELS: tl.constexpr):
    """Channels of a program, and which of them exist."""
    d = block * CHANNELS + tl.arange(0, CHANNELS)
    return d, d < dim if dim % CHANNELS else tl.arange(0, CHANNELS) >= 0


@triton.jit
def inside(row, column, height, width):
    """Whether a token lies on the grid."""
    return (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def load_tokens(at, row, left, height, width, in_d, step: tl.constexpr, COUNT: tl.constexpr):
    """Tokens of a row of the grid from column ``left`` on, as they are stored; zero beyond the grid."""
    tokens = ()
    at += ((tl.full([], 0, tl.int64) + row) * width + left) * step
    for j in tl.static_range(COUNT):
        mask = both(in_d, inside(row, left + j, height, width))
        tokens += (tl.load(at + j * step, mask=mask, other=0.0),)
    return tokens


@triton.jit
def as_float32(tokens, COUNT: tl.constexpr):
    """The same tokens in float32."""
    wide = ()
    for j in tl.static_range(COUNT):
        wide += (tokens[j].to(tl.float32),)
    return wide


@triton.jit
def load_weights(weight, bias, d, in_d, K: tl.constexpr):
    """The K x K weights of each channel, row by row, and its bias, in float32."""
    taps = ()
    for t in tl.static_range(K * K):
        taps += (tl.load(weight + d * (K * K) + t, mask=in_d, other=0.0).to(tl.float32),)
    return taps, tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)


@triton.jit
def convolve(rows, top: tl.constexpr, left: tl.constexpr, taps, shift, K: tl.constexpr):
    """The convolution at one token, whose neighbours are the K x K tokens of ``rows`` from ``(top, left)`` on."""
    total = shift
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            total += rows[top + i][left + j].to(tl.float32) * taps[i * K + j]
    return total


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp2(x * -LOG2_E))


@triton.jit
def appended(rows, row, K: tl.constexpr):
    """The last K rows, of ``rows`` and one more."""
    kept = ()
    for i in tl.static_range(K - 1):
        kept += (rows[i + 1],)
    return kept + (row,)


@triton.jit
def zeros(CHANNELS: tl.constexpr, COUNT: tl.constexpr):
    """As many tokens of zeros."""
    tokens = ()
    for _ in tl.static_range(COUNT):
        tokens += (tl.zeros([CHANNELS], tl.float32),)
    return tokens


@triton.jit
def slopes(xs, ups, taps, shift, K: tl.constexpr, COUNT: tl.constexpr):
    """The gradient of the convolution at a row of tokens, from its K rows of input and the gradient of its output."""
    row = ()
    for j in tl.static_range(COUNT):
        total = convolve(xs, 0, j, taps, shift, K)
        s = sigmoid(total)
        row += (ups[j].to(tl.float32) * (s + s * total * (1 - s)),)
    return row


@triton.jit
def add_products(sums, g, xs, left: tl.constexpr, K: tl.constexpr):
    """The sums for the K x K weights with one more token, whose convolution has the gradient ``g``."""
    more = ()
    for t in tl.static_range(K * K):
        more += (sums[t] + g * xs[t // K][left + t % K],)
    return more


@triton.jit
def spread(gs, right: tl.constexpr, taps, K: tl.constexpr):
    """The gradient of a token, from the K x K gradients ``gs`` of the convolutions that it entered."""
    total = gs[K - 1][right] * taps[0]
    for t in tl.static_range(1, K * K):
        total += gs[K - 1 - t // K][right - t % K] * taps[t]
    return total


@triton.jit
def forward_kernel(
    x, weight, bias, out, x_batch, height, width,
    x_step: tl.constexpr, dim: tl.constexpr, K: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Convolution and SiLU of ROWS x COLUMNS tokens. Nothing waits for anything but the loads, which come first."""
    across = tl.cdiv(width, COLUMNS)
    block, tile, batch = program_place(tl.cdiv(dim, CHANNELS), across * tl.cdiv(height, ROWS))
    top, left = tile // across * ROWS, tile % across * COLUMNS
    d, in_d = channels_of(block, dim, CHANNELS)
    x += batch * x_batch + d
    rows = ()
    for i in tl.static_range(ROWS + K - 1):
        first = left - K // 2
        rows += (load_tokens(x, top + i - K // 2, first, height, width, in_d, x_step, COLUMNS + K - 1),)
    taps, shift = load_weights(weight, bias, d, in_d, K)
    out += (batch * height * width + top * width + left) * dim + d
    for i in tl.static_range(ROWS):
        for j in tl.static_range(COLUMNS):
            total = convolve(rows, i, j, taps, shift, K)
            mask = both(in_d, inside(top + i, left + j, height, width))
            tl.store(out + (i * width + j) * dim, total / (1 + tl.exp2(total * -LOG2_E)), mask=mask)


@triton.jit
def backward_kernel(
    x, weight, bias, dout, dx, sums, x_batch, height, width, rows,
    x_step: tl.constexpr, dim: tl.constexpr, K: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of a strip of COLUMNS columns over some rows of the grid; those of bias and weights as partial sums.

    It walks down the rows. At each it computes the convolution again, from the last K rows of ``x``, and its gradient
    ``g``; from the last K rows of ``g`` follows the row of ``dx`` in their middle. The next row of ``x`` and ``dout``
    is loaded before the work on this one.
    """
    SIDE: tl.constexpr = K // 2
    WIDE: tl.constexpr = COLUMNS + 4 * (K // 2)
    MIDDLE: tl.constexpr = COLUMNS + 2 * (K // 2)
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, rows)
    block, piece, batch = program_place(tl.cdiv(dim, CHANNELS), across * down)
    left, first = piece % across * COLUMNS, piece // across * rows
    last = tl.minimum(first + rows, height)
    d, in_d = channels_of(block, dim, CHANNELS)
    taps, shift = load_weights(weight, bias, d, in_d, K)
    x += batch * x_batch + d
    dout, dx = dout + batch * height * width * dim + d, dx + batch * height * width * dim + d
    xs, gs = (), ()
    for i in tl.static_range(K):  # the first of them is dropped before any use
        row = load_tokens(x, first - K + i, left - 2 * SIDE, height, width, in_d, x_step, WIDE)
        xs += (as_float32(row, WIDE),)
        gs += (zeros(CHANNELS, MIDDLE),)
    dtaps, dshift = zeros(CHANNELS, K * K), tl.zeros([CHANNELS], tl.float32)
    row = load_tokens(x, first, left - 2 * SIDE, height, width, in_d, x_step, WIDE)
    ups = load_tokens(dout, first - SIDE, left - SIDE, height, width, in_d, dim, MIDDLE)
    for y in range(first - SIDE, last + SIDE):
        xs = appended(xs, as_float32(row, WIDE), K)
        row = load_tokens(x, y + 1 + SIDE, left - 2 * SIDE, height, width, in_d, x_step, WIDE)
        ahead = load_tokens(dout, y + 1, left - SIDE, height, width, in_d, dim, MIDDLE)
        gs = appended(gs, slopes(xs, ups, taps, shift, K, MIDDLE), K)
        ups = ahead
        own = both(in_d, (y >= first) & (y < last))
        target = y - SIDE
        at = dx + ((tl.full([], 0, tl.int64) + target) * width + left) * dim
        for j in tl.static_range(COLUMNS):
            g = tl.where(own, gs[K - 1][SIDE + j], 0.0)
            dshift += g
            dtaps = add_products(dtaps, g, xs, SIDE + j, K)
            mask = both(in_d, (target >= first) & (target < last) & (left + j < width))
            tl.store(at + j * dim, spread(gs, 2 * SIDE + j, taps, K), mask=mask)
    sums += (batch * across * down + piece) * (K * K + 1) * dim + d
    tl.store(sums, dshift, mask=in_d)
    for t in tl.static_range(K * K):
        tl.store(sums + (t + 1) * dim, dtaps[t], mask=in_d)
