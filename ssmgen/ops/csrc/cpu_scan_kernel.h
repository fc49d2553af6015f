/* One copy of the scan for one vector width, over the vectors of cpu_vectors.h.
 *
 * Lanes are channels. A task is one image and one tile of TILE channels; it walks over the length in chunks of CHUNK
 * steps. A chunk is copied into a dense block first, row by row: its rows lie a power of two apart, where they would push
 * one another out of the cache. Then come its groups of VL channels one by one, whose states sit in registers meanwhile.
 * Backward walks the chunks in reverse, rebuilds the states of a chunk from the one saved at its start, and adds what the
 * groups contribute to dB and dC as whole vectors: lanes are summed once per chunk, tiles once at the end, always in the
 * same order.
 */
#define GROUPS (TILE / VL)

/* Rows d..d+lanes of a (dim, n) array to n vectors over channels, and back. */
static void NAME(gather)(const float *p, int64_t n, int lanes, float scale, vec *out) {
    for (int64_t i = 0; i < n; i++) {
        vec v = {0};
        for (int lane = 0; lane < lanes; lane++) v[lane] = p[lane * n + i] * scale;
        out[i] = v;
    }
}

static void NAME(scatter)(const vec *in, int64_t n, int lanes, float *p) {
    for (int64_t i = 0; i < n; i++)
        for (int lane = 0; lane < lanes; lane++) p[lane * n + i] = in[i][lane];
}

/* Token of step k of image b, and where its row of each array begins. */
#define TOKEN(k) (a->order ? a->order[b * a->order_batch + (k)] : (k))
#define AT(name, token) (b * a->name##_batch + (token) * a->name##_step)

/* A task's image b, and its channels: groups of VL from d0 on. */
typedef struct {
    int64_t b, d0, groups;
} NAME(place);

static inline NAME(place) NAME(place_of)(const scan_args *a, int64_t task) {
    const int64_t tiles = (a->dim + TILE - 1) / TILE, d0 = task % tiles * TILE;
    return (NAME(place)){task / tiles, d0, (min64(TILE, a->dim - d0) + VL - 1) / VL};
}

static inline int NAME(lanes)(const scan_args *a, NAME(place) at, int64_t g) {
    return (int)min64(VL, a->dim - at.d0 - g * VL);
}

static inline vec NAME(vector)(const float *p, const scan_args *a, NAME(place) at, int64_t g) {
    return p ? NAME(load)(p + at.d0 + g * VL, NAME(lanes)(a, at, g)) : (vec){0};
}

/* Copy a chunk in and out of a dense block: vector g * CHUNK + (k - k0) holds group g of step k. The step sizes are made
 * here, all at once: their long chains of operations overlap one another. */
static void NAME(read_steps)(const scan_args *a, NAME(place) at, int64_t k0, int64_t k1, vec *x, vec *delta, vec *slope) {
    const int64_t b = at.b;
    for (int64_t k = k0; k < k1; k++) {
        const int64_t o = TOKEN(k), u_row = AT(u, o) + at.d0, delta_row = AT(delta, o) + at.d0;
        for (int64_t g = 0; g < at.groups; g++) {
            const int lanes = NAME(lanes)(a, at, g);
            const int64_t to = g * CHUNK + k - k0;
            x[to] = NAME(read)(a->bf16, a->u, u_row + g * VL, lanes);
            const vec step = NAME(read)(a->bf16, a->delta, delta_row + g * VL, lanes) + NAME(vector)(a->delta_bias, a, at, g);
            if (a->softplus) {
                delta[to] = NAME(softplus)(step, &slope[to]);
            } else {
                delta[to] = step;
                slope[to] = (vec){0} + 1.0f;
            }
        }
    }
}

static void NAME(read_block)(const scan_args *a, NAME(place) at, int64_t k0, int64_t k1, const void *from, vec *to) {
    const int64_t b = at.b;
    for (int64_t k = k0; k < k1; k++) {
        const int64_t row = (b * a->length + TOKEN(k)) * a->dim + at.d0;
        for (int64_t g = 0; g < at.groups; g++)
            to[g * CHUNK + k - k0] = NAME(read)(a->bf16, from, row + g * VL, NAME(lanes)(a, at, g));
    }
}

/* The gate's inputs of a chunk; z may be strided. */
static void NAME(read_gate)(const scan_args *a, NAME(place) at, int64_t k0, int64_t k1, vec *to) {
    const int64_t b = at.b;
    for (int64_t k = k0; k < k1; k++) {
        const int64_t row = AT(z, TOKEN(k)) + at.d0;
        for (int64_t g = 0; g < at.groups; g++)
            to[g * CHUNK + k - k0] = NAME(read)(a->bf16, a->z, row + g * VL, NAME(lanes)(a, at, g));
    }
}

static void NAME(write_block)(const scan_args *a, NAME(place) at, int64_t k0, int64_t k1, const vec *from, void *to) {
    const int64_t b = at.b;
    for (int64_t k = k0; k < k1; k++) {
        const int64_t row = (b * a->length + TOKEN(k)) * a->dim + at.d0;
        for (int64_t g = 0; g < at.groups; g++)
            NAME(write)(a->bf16, to, row + g * VL, from[g * CHUNK + k - k0], NAME(lanes)(a, at, g));
    }
}

/* Forward over the steps of a chunk for one group, its states in h. The output takes the place of the input. N is a
 * constant in the common case, so that r is registers. */
#define FORWARD_BODY(N)                                                                                                \
    vec r[N];                                                                                                          \
    UNROLL for (int64_t i = 0; i < (N); i++) r[i] = h[i];                                                              \
    for (int64_t k = k0; k < k1; k++, x++, delta++) {                                                                  \
        const int64_t o = TOKEN(k);                                                                                    \
        const vec step = *delta, input = step * *x;                                                                    \
        vec total = skip * *x, other = {0};                                                                            \
        const float *Bk = a->B + AT(B, o), *Ck = a->C + AT(C, o);                                                      \
        UNROLL for (int64_t i = 0; i < (N); i++) {                                                                     \
            r[i] = NAME(exp2)(step, A[i]) * r[i] + input * Bk[i];                                                      \
            if (i & 1) other += r[i] * Ck[i];                                                                          \
            else total += r[i] * Ck[i];                                                                                \
        }                                                                                                              \
        *x = total + other;                                                                                            \
    }                                                                                                                  \
    UNROLL for (int64_t i = 0; i < (N); i++) h[i] = r[i];

#define FORWARD_ARGS                                                                                                   \
    const scan_args *a, int64_t b, int64_t k0, int64_t k1, const vec *A, vec skip, vec *x, const vec *delta, vec *h
#define UNROLL _Pragma("GCC unroll 16")
static void NAME(forward_16)(FORWARD_ARGS) { FORWARD_BODY(16) }
#undef UNROLL
#define UNROLL
static void NAME(forward_any)(FORWARD_ARGS) {
    const int64_t n = a->n;
    FORWARD_BODY(n)
}
#undef UNROLL

static void NAME(scan_forward)(const void *args, int64_t task, void *scratch) {
    const scan_args *a = args;
    const NAME(place) at = NAME(place_of)(a, task);
    const int64_t n = a->n, chunks = (a->length + CHUNK - 1) / CHUNK, all_groups = (a->dim + VL - 1) / VL;
    vec *A = scratch, *state = A + GROUPS * n, *x = state + GROUPS * n, *delta = x + GROUPS * CHUNK;
    vec *slope = delta + GROUPS * CHUNK, unused;
    for (int64_t g = 0; g < at.groups; g++) {
        const int64_t d = at.d0 + g * VL;
        const int lanes = NAME(lanes)(a, at, g);
        NAME(gather)(a->A + d * n, n, lanes, LOG2E, A + g * n);
        if (a->initial_state) NAME(gather)(a->initial_state + (at.b * a->dim + d) * n, n, lanes, 1.0f, state + g * n);
        else memset(state + g * n, 0, sizeof(vec) * (size_t)n);
    }
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t k0 = c * CHUNK, k1 = min64(k0 + CHUNK, a->length);
        NAME(read_steps)(a, at, k0, k1, x, delta, slope);
        if (a->saved)
            memcpy(a->saved + ((at.b * chunks + c) * all_groups + at.d0 / VL) * n * VL, state,
                   sizeof(vec) * (size_t)(at.groups * n));
        for (int64_t g = 0; g < at.groups; g++)
            (n == 16 ? NAME(forward_16) : NAME(forward_any))(a, at.b, k0, k1, A + g * n, NAME(vector)(a->D, a, at, g),
                                                             x + g * CHUNK, delta + g * CHUNK, state + g * n);
        if (a->z) { /* the slopes have been used, so that z may lie in their place */
            NAME(read_gate)(a, at, k0, k1, slope);
            for (int64_t i = 0; i < at.groups * CHUNK; i++)
                if (i % CHUNK < k1 - k0) x[i] *= NAME(silu)(slope[i], &unused);
        }
        NAME(write_block)(a, at, k0, k1, x, a->y);
    }
    for (int64_t g = 0; g < at.groups; g++)
        NAME(scatter)(state + g * n, n, NAME(lanes)(a, at, g), a->last + (at.b * a->dim + at.d0 + g * VL) * n);
}

/* What backward adds to, and its scratch: states and decays of the chunk. g holds the gradient of the state after the
 * chunk's last step. */
typedef struct {
    vec *g, *dA, *dB, *dC, *sums, *states, *decays;
} NAME(gradients);

/* Backward over the steps of a chunk for one group, from the states saved at its start. The gradient of u takes the place
 * of x, that of delta the place of dy, and that of z, where there is a gate, the place of z. */
#define BACKWARD_BODY(N)                                                                                               \
    const int64_t steps = k1 - k0;                                                                                     \
    vec r[N], skipped = {0}, biased = {0};                                                                             \
    UNROLL for (int64_t i = 0; i < (N); i++) r[i] = to.states[i];                                                      \
    for (int64_t k = 0; k < steps; k++) {                                                                              \
        const vec step = delta[k], input = step * x[k];                                                                \
        const float *Bk = a->B + AT(B, TOKEN(k0 + k));                                                                 \
        vec *states = to.states + k * (N), *decays = to.decays + k * (N);                                              \
        UNROLL for (int64_t i = 0; i < (N); i++) {                                                                     \
            const vec w = NAME(exp2)(step, A[i]);                                                                      \
            decays[i] = w;                                                                                             \
            r[i] = w * r[i] + input * Bk[i];                                                                           \
            states[i + (N)] = r[i];                                                                                    \
        }                                                                                                              \
    }                                                                                                                  \
    for (int64_t k = 0; z && k < steps; k++) {                                                                         \
        vec total = skip * x[k], other = {0}, rise;                                                                    \
        const float *Ck = a->C + AT(C, TOKEN(k0 + k));                                                                 \
        const vec *states = to.states + (k + 1) * (N);                                                                 \
        UNROLL for (int64_t i = 0; i < (N); i++) {                                                                     \
            if (i & 1) other += states[i] * Ck[i];                                                                     \
            else total += states[i] * Ck[i];                                                                           \
        }                                                                                                              \
        const vec gate = NAME(silu)(z[k], &rise);                                                                      \
        z[k] = dy[k] * (total + other) * rise;                                                                         \
        dy[k] *= gate;                                                                                                 \
    }                                                                                                                  \
    UNROLL for (int64_t i = 0; i < (N); i++) r[i] = to.g[i];                                                           \
    for (int64_t k = steps - 1; k >= 0; k--) {                                                                         \
        const int64_t o = TOKEN(k0 + k);                                                                               \
        const vec up = dy[k], step = delta[k], input = step * x[k];                                                    \
        const float *Bk = a->B + AT(B, o), *Ck = a->C + AT(C, o);                                                      \
        const vec *states = to.states + k * (N), *decays = to.decays + k * (N);                                        \
        vec *dB = to.dB + k * (N), *dC = to.dC + k * (N), to_input = {0}, to_delta = {0};                              \
        UNROLL for (int64_t i = 0; i < (N); i++) {                                                                     \
            r[i] += up * Ck[i];                                                                                        \
            dC[i] += up * states[i + (N)];                                                                             \
            dB[i] += r[i] * input;                                                                                     \
            to_input += r[i] * Bk[i];                                                                                  \
            r[i] *= decays[i];                                                                                         \
            const vec exponent = r[i] * states[i];                                                                     \
            to_delta += exponent * A[i];                                                                               \
            to.dA[i] += exponent * step;                                                                               \
        }                                                                                                              \
        /* A is scaled by log2(e) for exp2; its gradient is not. */                                                    \
        const vec d_delta = (to_delta * LN2 + to_input * x[k]) * slope[k];                                             \
        skipped += up * x[k];                                                                                          \
        biased += d_delta;                                                                                             \
        x[k] = to_input * step + skip * up;                                                                            \
        dy[k] = d_delta;                                                                                               \
    }                                                                                                                  \
    UNROLL for (int64_t i = 0; i < (N); i++) to.g[i] = r[i];                                                           \
    to.sums[0] += skipped;                                                                                             \
    to.sums[1] += biased;

#define BACKWARD_ARGS                                                                                                  \
    const scan_args *a, int64_t b, int64_t k0, int64_t k1, const vec *A, vec skip, vec *x, const vec *delta,           \
        const vec *slope, vec *dy, vec *z, NAME(gradients) to
#define UNROLL _Pragma("GCC unroll 16")
static void NAME(backward_16)(BACKWARD_ARGS) { BACKWARD_BODY(16) }
#undef UNROLL
#define UNROLL
static void NAME(backward_any)(BACKWARD_ARGS) {
    const int64_t n = a->n;
    BACKWARD_BODY(n)
}
#undef UNROLL

static void NAME(scan_backward)(const void *args, int64_t task, void *scratch) {
    const scan_args *a = args;
    const NAME(place) at = NAME(place_of)(a, task);
    const int64_t b = at.b, n = a->n, chunks = (a->length + CHUNK - 1) / CHUNK, all_groups = (a->dim + VL - 1) / VL;
    const size_t block = GROUPS * CHUNK;
    vec *A = scratch, *g = A + GROUPS * n, *dA = g + GROUPS * n, *dB = dA + GROUPS * n, *dC = dB + CHUNK * n;
    vec *decays = dC + CHUNK * n, *states = decays + CHUNK * n, *sums = states + (CHUNK + 1) * n;
    vec *x = sums + 2 * GROUPS, *delta = x + block, *slope = delta + block, *dy = slope + block, *z = dy + block;
    memset(dA, 0, sizeof(vec) * (size_t)(GROUPS * n));
    memset(sums, 0, sizeof(vec) * 2 * GROUPS);
    for (int64_t i = 0; i < at.groups; i++) {
        const int64_t d = at.d0 + i * VL;
        const int lanes = NAME(lanes)(a, at, i);
        NAME(gather)(a->A + d * n, n, lanes, LOG2E, A + i * n);
        NAME(gather)(a->dlast + (at.b * a->dim + d) * n, n, lanes, 1.0f, g + i * n);
    }
    for (int64_t c = chunks - 1; c >= 0; c--) {
        const int64_t k0 = c * CHUNK, k1 = min64(k0 + CHUNK, a->length);
        const float *saved = a->saved + ((at.b * chunks + c) * all_groups + at.d0 / VL) * n * VL;
        NAME(read_steps)(a, at, k0, k1, x, delta, slope);
        NAME(read_block)(a, at, k0, k1, a->dy, dy);
        if (a->z) NAME(read_gate)(a, at, k0, k1, z);
        memset(dB, 0, sizeof(vec) * (size_t)(2 * CHUNK * n)); /* dC lies behind dB */
        for (int64_t i = 0; i < at.groups; i++) {
            memcpy(states, saved + i * n * VL, sizeof(vec) * (size_t)n);
            const int64_t first = i * CHUNK;
            const NAME(gradients) to = {g + i * n, dA + i * n, dB, dC, sums + 2 * i, states, decays};
            (n == 16 ? NAME(backward_16) : NAME(backward_any))(a, at.b, k0, k1, A + i * n, NAME(vector)(a->D, a, at, i),
                                                               x + first, delta + first, slope + first, dy + first,
                                                               a->z ? z + first : 0, to);
        }
        NAME(write_block)(a, at, k0, k1, x, a->du);
        NAME(write_block)(a, at, k0, k1, dy, a->ddelta);
        if (a->z) NAME(write_block)(a, at, k0, k1, z, a->dz);
        for (int64_t k = k0; k < k1; k++) {
            const int64_t row = (task * a->length + TOKEN(k)) * n;
            for (int64_t i = 0; i < n; i++) {
                a->dB[row + i] = NAME(sum)(dB[(k - k0) * n + i]);
                a->dC[row + i] = NAME(sum)(dC[(k - k0) * n + i]);
            }
        }
    }
    for (int64_t i = 0; i < at.groups; i++) {
        const int64_t row = at.b * a->dim + at.d0 + i * VL;
        const int lanes = NAME(lanes)(a, at, i);
        NAME(scatter)(dA + i * n, n, lanes, a->dA + row * n);
        NAME(scatter)(g + i * n, n, lanes, a->dinitial + row * n);
        NAME(store)(a->dD + row, sums[2 * i], lanes);
        NAME(store)(a->dbias + row, sums[2 * i + 1], lanes);
    }
}

static size_t NAME(scan_scratch)(const void *args) {
    const int64_t n = ((const scan_args *)args)->n;
    return sizeof(vec) * (size_t)(3 * GROUPS * n + (4 * CHUNK + 1) * n + 2 * GROUPS + 5 * GROUPS * CHUNK);
}

#undef GROUPS
#undef TOKEN
#undef AT
#undef FORWARD_BODY
#undef FORWARD_ARGS
#undef BACKWARD_BODY
#undef BACKWARD_ARGS
