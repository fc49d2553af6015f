/* One copy of the scan for one vector width. Included several times by cpu_scan.c with VL (floats per vector) and
 * NAME(x) (a suffix for its functions) defined.
 *
 * Lanes are channels. A task is one image and one tile of TILE channels; it walks over the length in chunks of CHUNK
 * steps and, within a chunk, over its groups of VL channels, whose states sit in registers meanwhile. Backward walks the
 * chunks in reverse, rebuilds the states of a chunk from the one saved at its start, and adds what the groups contribute
 * to dB and dC as whole vectors: lanes are summed once per chunk, tiles once at the end, always in the same order.
 */
#define GROUPS (TILE / VL)

typedef float NAME(vec) __attribute__((vector_size(4 * VL)));
typedef int32_t NAME(ivec) __attribute__((vector_size(4 * VL)));
typedef float NAME(loose) __attribute__((vector_size(4 * VL), aligned(4), may_alias));
#define vec NAME(vec)
#define ivec NAME(ivec)

static inline vec NAME(load)(const float *p, int lanes) {
    if (lanes >= VL) return *(const NAME(loose) *)p;
    vec v = {0};
    memcpy(&v, p, sizeof(float) * (size_t)lanes);
    return v;
}

static inline void NAME(store)(float *p, vec v, int lanes) {
    if (lanes >= VL) *(NAME(loose) *)p = v;
    else memcpy(p, &v, sizeof(float) * (size_t)lanes);
}

static inline vec NAME(select)(ivec mask, vec yes, vec no) {
    return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask));
}

static inline vec NAME(clamp)(vec x, float low, float high) {
    const vec zero = {0};
    x = NAME(select)(x < zero + low, zero + low, x);
    return NAME(select)(x > zero + high, zero + high, x);
}

/* 2^x for x in [-126, 126]; relative error under 2e-7. The polynomial is 1 at 0 exactly: a decay near 1 is applied at
 * every step, and a bias would grow with the length. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits,
 * from where it is shifted into the exponent. */
static inline vec NAME(exp2)(vec x) {
    const vec zero = {0};
    x = NAME(clamp)(x, -126.0f, 126.0f);
    vec shifted = x + 12582912.0f;
    vec f = x - (shifted - 12582912.0f);
    vec p = zero + 1.326471878e-3f;
    p = p * f + 9.671513313e-3f;
    p = p * f + 5.550733771e-2f;
    p = p * f + 2.402224207e-1f;
    p = p * f + 6.931469776e-1f;
    p = p * f + 1.0f;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

/* softplus(x) = max(x, 0) + log(1 + e) with e = exp(-|x|), and its derivative. log(1 + e) = 2 atanh(s), s = e / (2 + e)
 * <= 1/3, by its series: exact for tiny e, where softplus is a small step that must not be rounded away. */
static inline vec NAME(softplus)(vec x, vec *slope) {
    const vec zero = {0};
    vec magnitude = NAME(select)(x < zero, -x, x);
    vec e = NAME(exp2)(magnitude * -LOG2E);
    vec s = e / (e + 2.0f), q = s * s;
    vec series = zero + 1.0f / 13.0f;
    series = series * q + 1.0f / 11.0f;
    series = series * q + 1.0f / 9.0f;
    series = series * q + 1.0f / 7.0f;
    series = series * q + 1.0f / 5.0f;
    series = series * q + 1.0f / 3.0f;
    series = series * q + 1.0f;
    vec inverse = 1.0f / (e + 1.0f);
    *slope = NAME(select)(x < zero, e * inverse, inverse);
    return NAME(select)(x > zero, x, zero) + 2.0f * s * series;
}

static inline vec NAME(step_size)(const scan_args *a, const float *p, const float *bias, int lanes, vec *slope) {
    vec x = NAME(load)(p, lanes);
    if (bias) x += NAME(load)(bias, lanes);
    *slope = (vec){0} + 1.0f;
    return a->softplus ? NAME(softplus)(x, slope) : x;
}

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

static inline float NAME(sum)(vec v) {
    float half[VL];
    memcpy(half, &v, sizeof half);
    for (int width = VL / 2; width; width /= 2)
        for (int i = 0; i < width; i++) half[i] += half[i + width];
    return half[0];
}

/* Forward over steps k0..k1 of one group, its states in h. N is a constant in the common case, so that h is registers. */
#define FORWARD_BODY(N)                                                                                                \
    vec r[N];                                                                                                          \
    for (int64_t i = 0; i < (N); i++) r[i] = h[i];                                                                     \
    for (int64_t k = k0; k < k1; k++) {                                                                                \
        vec slope, x = NAME(load)(u + k * a->u_step, lanes);                                                           \
        vec delta = NAME(step_size)(a, dt + k * a->delta_step, bias, lanes, &slope);                                   \
        vec input = delta * x, total = skip * x, other = {0};                                                          \
        const float *Bk = B + k * a->B_step, *Ck = C + k * a->C_step;                                                  \
        UNROLL for (int64_t i = 0; i < (N); i++) {                                                                     \
            r[i] = NAME(exp2)(delta * A[i]) * r[i] + input * Bk[i];                                                    \
            if (i & 1) other += r[i] * Ck[i];                                                                          \
            else total += r[i] * Ck[i];                                                                                \
        }                                                                                                              \
        NAME(store)(y + k * a->dim, total + other, lanes);                                                             \
    }                                                                                                                  \
    for (int64_t i = 0; i < (N); i++) h[i] = r[i];

#define UNROLL _Pragma("GCC unroll 16")
static void NAME(forward_16)(const scan_args *a, const float *u, const float *dt, const float *bias, const vec *A,
                             const float *B, const float *C, vec skip, vec *h, float *y, int64_t k0, int64_t k1,
                             int lanes) {
    FORWARD_BODY(16)
}
#undef UNROLL
#define UNROLL
static void NAME(forward_any)(const scan_args *a, const float *u, const float *dt, const float *bias, const vec *A,
                              const float *B, const float *C, vec skip, vec *h, float *y, int64_t k0, int64_t k1,
                              int lanes) {
    const int64_t n = a->n;
    FORWARD_BODY(n)
}
#undef UNROLL

static void NAME(forward_task)(const scan_args *a, int64_t task, void *scratch) {
    const int64_t n = a->n, tiles = (a->dim + TILE - 1) / TILE, b = task / tiles, d0 = task % tiles * TILE;
    const int64_t groups = (min64(TILE, a->dim - d0) + VL - 1) / VL, all_groups = (a->dim + VL - 1) / VL;
    const int64_t chunks = (a->length + CHUNK - 1) / CHUNK;
    vec *A = scratch, *state = A + GROUPS * n;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t d = d0 + g * VL;
        const int lanes = (int)min64(VL, a->dim - d);
        NAME(gather)(a->A + d * n, n, lanes, LOG2E, A + g * n);
        if (a->initial) NAME(gather)(a->initial + (b * a->dim + d) * n, n, lanes, 1.0f, state + g * n);
        else memset(state + g * n, 0, sizeof(vec) * (size_t)n);
    }
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t k0 = c * CHUNK, k1 = min64(k0 + CHUNK, a->length);
        for (int64_t g = 0; g < groups; g++) {
            const int64_t d = d0 + g * VL;
            const int lanes = (int)min64(VL, a->dim - d);
            if (a->saved)
                memcpy(a->saved + ((b * chunks + c) * all_groups + d / VL) * n * VL, state + g * n,
                       sizeof(vec) * (size_t)n);
            (n == 16 ? NAME(forward_16) : NAME(forward_any))(
                a, a->u + b * a->u_batch + d, a->delta + b * a->delta_batch + d, a->bias ? a->bias + d : 0, A + g * n,
                a->B + b * a->B_batch, a->C + b * a->C_batch, a->D ? NAME(load)(a->D + d, lanes) : (vec){0},
                state + g * n, a->y + b * a->length * a->dim + d, k0, k1, lanes);
        }
    }
    for (int64_t g = 0; g < groups; g++) {
        const int64_t d = d0 + g * VL;
        NAME(scatter)(state + g * n, n, (int)min64(VL, a->dim - d), a->last + (b * a->dim + d) * n);
    }
}

/* Backward over steps k1..k0 of one group. g holds the gradient of the state after step k1 - 1. */
#define BACKWARD_BODY(N)                                                                                               \
    const int64_t steps = k1 - k0;                                                                                     \
    vec r[N], x[CHUNK], delta[CHUNK], slope[CHUNK];                                                                    \
    for (int64_t i = 0; i < (N); i++) r[i] = saved[i];                                                                 \
    for (int64_t k = 0; k < steps; k++) {                                                                              \
        x[k] = NAME(load)(u + (k0 + k) * a->u_step, lanes);                                                            \
        delta[k] = NAME(step_size)(a, dt + (k0 + k) * a->delta_step, bias, lanes, &slope[k]);                          \
        const vec input = delta[k] * x[k];                                                                             \
        const float *Bk = B + (k0 + k) * a->B_step;                                                                    \
        UNROLL for (int64_t i = 0; i < (N); i++) {                                                                     \
            const vec w = NAME(exp2)(delta[k] * A[i]);                                                                 \
            states[k * (N) + i] = r[i];                                                                                \
            decays[k * (N) + i] = w;                                                                                   \
            r[i] = w * r[i] + input * Bk[i];                                                                           \
        }                                                                                                              \
    }                                                                                                                  \
    for (int64_t i = 0; i < (N); i++) states[steps * (N) + i] = r[i];                                                  \
    for (int64_t i = 0; i < (N); i++) r[i] = g[i];                                                                     \
    for (int64_t k = steps - 1; k >= 0; k--) {                                                                         \
        const vec up = NAME(load)(dy + (k0 + k) * a->dim, lanes), input = delta[k] * x[k];                             \
        const float *Bk = B + (k0 + k) * a->B_step, *Ck = C + (k0 + k) * a->C_step;                                    \
        vec to_input = {0}, to_delta = {0};                                                                            \
        UNROLL for (int64_t i = 0; i < (N); i++) {                                                                     \
            const int64_t at = k * (N) + i;                                                                            \
            r[i] += up * Ck[i];                                                                                        \
            dC[at] += up * states[at + (N)];                                                                           \
            dB[at] += r[i] * input;                                                                                    \
            to_input += r[i] * Bk[i];                                                                                  \
            r[i] *= decays[at];                                                                                        \
            const vec exponent = r[i] * states[at];                                                                    \
            to_delta += exponent * A[i];                                                                               \
            dA[i] += exponent * delta[k];                                                                              \
        }                                                                                                              \
        /* A is scaled by log2(e) for exp2; its gradient is not. */                                                    \
        const vec d_delta = (to_delta * LN2 + to_input * x[k]) * slope[k];                                             \
        NAME(store)(du + (k0 + k) * a->dim, to_input * delta[k] + skip * up, lanes);                                   \
        NAME(store)(ddelta + (k0 + k) * a->dim, d_delta, lanes);                                                       \
        sums[0] += up * x[k];                                                                                          \
        sums[1] += d_delta;                                                                                            \
    }                                                                                                                  \
    for (int64_t i = 0; i < (N); i++) g[i] = r[i];

#define BACKWARD_ARGS                                                                                                  \
    const scan_args *a, const float *u, const float *dt, const float *bias, const vec *A, const float *B,              \
        const float *C, vec skip, const float *dy, const vec *saved, vec *g, vec *dA, vec *dB, vec *dC, vec *sums,     \
        float *du, float *ddelta, vec *states, vec *decays, int64_t k0, int64_t k1, int lanes
#define UNROLL _Pragma("GCC unroll 16")
static void NAME(backward_16)(BACKWARD_ARGS) { BACKWARD_BODY(16) }
#undef UNROLL
#define UNROLL
static void NAME(backward_any)(BACKWARD_ARGS) {
    const int64_t n = a->n;
    BACKWARD_BODY(n)
}
#undef UNROLL

static void NAME(backward_task)(const scan_args *a, int64_t task, void *scratch) {
    const int64_t n = a->n, tiles = (a->dim + TILE - 1) / TILE, b = task / tiles, d0 = task % tiles * TILE;
    const int64_t groups = (min64(TILE, a->dim - d0) + VL - 1) / VL, all_groups = (a->dim + VL - 1) / VL;
    const int64_t chunks = (a->length + CHUNK - 1) / CHUNK;
    vec *A = scratch, *g = A + GROUPS * n, *dA = g + GROUPS * n, *dB = dA + GROUPS * n, *dC = dB + CHUNK * n;
    vec *decays = dC + CHUNK * n, *states = decays + CHUNK * n, *sums = states + (CHUNK + 1) * n;
    memset(dA, 0, sizeof(vec) * (size_t)(GROUPS * n));
    memset(sums, 0, sizeof(vec) * 2 * GROUPS);
    for (int64_t i = 0; i < groups; i++) {
        const int64_t d = d0 + i * VL;
        const int lanes = (int)min64(VL, a->dim - d);
        NAME(gather)(a->A + d * n, n, lanes, LOG2E, A + i * n);
        NAME(gather)(a->dlast + (b * a->dim + d) * n, n, lanes, 1.0f, g + i * n);
    }
    for (int64_t c = chunks - 1; c >= 0; c--) {
        const int64_t k0 = c * CHUNK, k1 = min64(k0 + CHUNK, a->length);
        memset(dB, 0, sizeof(vec) * (size_t)(2 * CHUNK * n)); /* dC lies behind dB */
        for (int64_t i = 0; i < groups; i++) {
            const int64_t d = d0 + i * VL;
            const int lanes = (int)min64(VL, a->dim - d);
            vec first[16], *saved = n <= 16 ? first : states; /* states[0..n) is where they go next anyway */
            memcpy(saved, a->saved + ((b * chunks + c) * all_groups + d / VL) * n * VL, sizeof(vec) * (size_t)n);
            (n == 16 ? NAME(backward_16) : NAME(backward_any))(
                a, a->u + b * a->u_batch + d, a->delta + b * a->delta_batch + d, a->bias ? a->bias + d : 0, A + i * n,
                a->B + b * a->B_batch, a->C + b * a->C_batch, a->D ? NAME(load)(a->D + d, lanes) : (vec){0},
                a->dy + b * a->length * a->dim + d, saved, g + i * n, dA + i * n, dB, dC, sums + 2 * i,
                a->du + b * a->length * a->dim + d, a->ddelta + b * a->length * a->dim + d, states, decays, k0, k1,
                lanes);
        }
        float *to_B = a->dB + (task * a->length + k0) * n, *to_C = a->dC + (task * a->length + k0) * n;
        for (int64_t i = 0; i < (k1 - k0) * n; i++) {
            to_B[i] = NAME(sum)(dB[i]);
            to_C[i] = NAME(sum)(dC[i]);
        }
    }
    for (int64_t i = 0; i < groups; i++) {
        const int64_t d = d0 + i * VL, row = b * a->dim + d;
        const int lanes = (int)min64(VL, a->dim - d);
        NAME(scatter)(dA + i * n, n, lanes, a->dA + row * n);
        NAME(scatter)(g + i * n, n, lanes, a->dinitial + row * n);
        NAME(store)(a->dD + row, sums[2 * i], lanes);
        NAME(store)(a->dbias + row, sums[2 * i + 1], lanes);
    }
}

static size_t NAME(scratch_bytes)(int64_t n) {
    return sizeof(vec) * (size_t)(3 * GROUPS * n + (4 * CHUNK + 1) * n + 2 * GROUPS);
}

#undef vec
#undef ivec
#undef GROUPS
#undef FORWARD_BODY
#undef BACKWARD_BODY
#undef BACKWARD_ARGS
