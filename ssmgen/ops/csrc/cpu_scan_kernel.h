/* One copy of the scan for one vector width. Included several times by cpu_scan.c with VL (floats per vector) and
 * NAME(x) (a suffix for its functions) defined.
 *
 * Lanes are channels. A task is one image and one tile of TILE channels; it walks over the length in chunks of CHUNK
 * steps. A chunk is copied into a dense block first, row by row: its rows lie a power of two apart, where they would push
 * one another out of the cache. Then come its groups of VL channels one by one, whose states sit in registers meanwhile.
 * Backward walks the chunks in reverse, rebuilds the states of a chunk from the one saved at its start, and adds what the
 * groups contribute to dB and dC as whole vectors: lanes are summed once per chunk, tiles once at the end, always in the
 * same order.
 */
#define GROUPS (TILE / VL)

typedef float NAME(vec) __attribute__((vector_size(4 * VL)));
typedef int32_t NAME(ivec) __attribute__((vector_size(4 * VL)));
typedef float NAME(loose) __attribute__((vector_size(4 * VL), aligned(4), may_alias));
#define vec NAME(vec)
#define ivec NAME(ivec)

/* The first lanes of a vector, for the end of a row: by mask, or lane by lane (a call to memcpy would push the states out
 * of their registers). bfloat16 is the upper half of a float; to it we round to the nearest, ties to even. */
typedef uint16_t NAME(halves) __attribute__((vector_size(2 * VL)));
typedef uint16_t NAME(loose_halves) __attribute__((vector_size(2 * VL), aligned(2), may_alias));

static inline NAME(halves) NAME(to_bf16)(vec v) {
    const ivec bits = (ivec)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
    const ivec number = v == v;
    return __builtin_convertvector((rounded & number) | (quiet & ~number), NAME(halves));
}

#if VL == 16
#define MASK(lanes) ((__mmask16)((1u << (lanes)) - 1))
static inline vec NAME(load)(const float *p, int lanes) { return (vec)_mm512_maskz_loadu_ps(MASK(lanes), p); }
static inline void NAME(store)(float *p, vec v, int lanes) { _mm512_mask_storeu_ps(p, MASK(lanes), (__m512)v); }
static inline vec NAME(load_bf16)(const uint16_t *p, int lanes) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(MASK(lanes), p)), 16);
}
static inline void NAME(store_bf16)(uint16_t *p, vec v, int lanes) {
    _mm256_mask_storeu_epi16(p, MASK(lanes), (__m256i)NAME(to_bf16)(v));
}
#undef MASK
#else
static inline vec NAME(load)(const float *p, int lanes) {
    if (lanes >= VL) return *(const NAME(loose) *)p;
    vec v = {0};
    for (int i = 0; i < VL; i++) v[i] = i < lanes ? p[i] : 0.0f;
    return v;
}
static inline void NAME(store)(float *p, vec v, int lanes) {
    if (lanes >= VL) *(NAME(loose) *)p = v;
    else for (int i = 0; i < VL; i++)
        if (i < lanes) p[i] = v[i];
}
static inline vec NAME(load_bf16)(const uint16_t *p, int lanes) {
    NAME(halves) half = {0};
    if (lanes >= VL) half = *(const NAME(loose_halves) *)p;
    else for (int i = 0; i < VL; i++) half[i] = i < lanes ? p[i] : 0;
    return (vec)(__builtin_convertvector(half, ivec) << 16);
}
static inline void NAME(store_bf16)(uint16_t *p, vec v, int lanes) {
    const NAME(halves) half = NAME(to_bf16)(v);
    if (lanes >= VL) *(NAME(loose_halves) *)p = half;
    else for (int i = 0; i < VL; i++)
        if (i < lanes) p[i] = half[i];
}
#endif

static inline vec NAME(read)(const scan_args *a, const void *p, int64_t at, int lanes) {
    return a->bf16 ? NAME(load_bf16)((const uint16_t *)p + at, lanes) : NAME(load)((const float *)p + at, lanes);
}

static inline void NAME(write)(const scan_args *a, void *p, int64_t at, vec v, int lanes) {
    if (a->bf16) NAME(store_bf16)((uint16_t *)p + at, v, lanes);
    else NAME(store)((float *)p + at, v, lanes);
}

static inline vec NAME(select)(ivec mask, vec yes, vec no) {
    return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask));
}

/* 2^(x * y), relative error under 2e-7. The exponent is split into its nearest integer and a rest in [-1/2, 1/2], whose
 * polynomial is 1 at 0 exactly: a decay near 1 is applied at every step, and a bias would grow with the length. */
static inline vec NAME(polynomial)(vec f) {
    const vec zero = {0};
    vec p = zero + 1.326471878e-3f;
    p = p * f + 9.671513313e-3f;
    p = p * f + 5.550733771e-2f;
    p = p * f + 2.402224207e-1f;
    p = p * f + 6.931469776e-1f;
    return p * f + 1.0f;
}

static inline vec NAME(exp2)(vec x, vec y) {
    x = x * y;
#if VL == 16
    /* Both instructions take any exponent, so nothing needs to be clamped. */
    const vec f = (vec)_mm512_reduce_ps((__m512)x, 0);
    return (vec)_mm512_scalef_ps((__m512)NAME(polynomial)(f), (__m512)(x - f));
#else
#if VL == 8
    x = (vec)_mm256_min_ps(_mm256_max_ps((__m256)x, _mm256_set1_ps(-126.0f)), _mm256_set1_ps(126.0f));
#else
    const vec zero = {0};
    x = NAME(select)(x < zero - 126.0f, zero - 126.0f, x);
    x = NAME(select)(x > zero + 126.0f, zero + 126.0f, x);
#endif
    /* Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, from where it is shifted into the exponent. */
    const vec shifted = x + 12582912.0f;
    return (vec)((ivec)NAME(polynomial)(x - (shifted - 12582912.0f)) + ((ivec)shifted << 23));
#endif
}

/* softplus(x) = max(x, 0) + log(1 + e) with e = exp(-|x|), and its derivative. log(1 + e) = 2 atanh(s), s = e / (2 + e)
 * <= 1/3, by its series: exact for tiny e, where softplus is a small step that must not be rounded away. */
static inline vec NAME(softplus)(vec x, vec *slope) {
    const vec zero = {0};
    vec magnitude = NAME(select)(x < zero, -x, x);
    vec e = NAME(exp2)(magnitude, zero - LOG2E);
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
#if VL == 16
    return _mm512_reduce_add_ps((__m512)v);
#elif VL == 8
    __m128 q = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

/* Token of step k, and where its row of each array begins. */
#define TOKEN(k) (a->order ? a->order[k] : (k))
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
            x[to] = NAME(read)(a, a->u, u_row + g * VL, lanes);
            const vec step = NAME(read)(a, a->delta, delta_row + g * VL, lanes) + NAME(vector)(a->bias, a, at, g);
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
    for (int64_t k = k0; k < k1; k++) {
        const int64_t row = (at.b * a->length + TOKEN(k)) * a->dim + at.d0;
        for (int64_t g = 0; g < at.groups; g++)
            to[g * CHUNK + k - k0] = NAME(read)(a, from, row + g * VL, NAME(lanes)(a, at, g));
    }
}

static void NAME(write_block)(const scan_args *a, NAME(place) at, int64_t k0, int64_t k1, const vec *from, void *to) {
    for (int64_t k = k0; k < k1; k++) {
        const int64_t row = (at.b * a->length + TOKEN(k)) * a->dim + at.d0;
        for (int64_t g = 0; g < at.groups; g++)
            NAME(write)(a, to, row + g * VL, from[g * CHUNK + k - k0], NAME(lanes)(a, at, g));
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

static void NAME(forward_task)(const scan_args *a, int64_t task, void *scratch) {
    const NAME(place) at = NAME(place_of)(a, task);
    const int64_t n = a->n, chunks = (a->length + CHUNK - 1) / CHUNK, all_groups = (a->dim + VL - 1) / VL;
    vec *A = scratch, *state = A + GROUPS * n, *x = state + GROUPS * n, *delta = x + GROUPS * CHUNK;
    vec *slope = delta + GROUPS * CHUNK;
    for (int64_t g = 0; g < at.groups; g++) {
        const int64_t d = at.d0 + g * VL;
        const int lanes = NAME(lanes)(a, at, g);
        NAME(gather)(a->A + d * n, n, lanes, LOG2E, A + g * n);
        if (a->initial) NAME(gather)(a->initial + (at.b * a->dim + d) * n, n, lanes, 1.0f, state + g * n);
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
 * of x, and that of delta the place of dy. */
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
        const vec *slope, vec *dy, NAME(gradients) to
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
    const NAME(place) at = NAME(place_of)(a, task);
    const int64_t n = a->n, chunks = (a->length + CHUNK - 1) / CHUNK, all_groups = (a->dim + VL - 1) / VL;
    const size_t block = GROUPS * CHUNK;
    vec *A = scratch, *g = A + GROUPS * n, *dA = g + GROUPS * n, *dB = dA + GROUPS * n, *dC = dB + CHUNK * n;
    vec *decays = dC + CHUNK * n, *states = decays + CHUNK * n, *sums = states + (CHUNK + 1) * n;
    vec *x = sums + 2 * GROUPS, *delta = x + block, *slope = delta + block, *dy = slope + block;
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
        memset(dB, 0, sizeof(vec) * (size_t)(2 * CHUNK * n)); /* dC lies behind dB */
        for (int64_t i = 0; i < at.groups; i++) {
            memcpy(states, saved + i * n * VL, sizeof(vec) * (size_t)n);
            const int64_t first = i * CHUNK;
            const NAME(gradients) to = {g + i * n, dA + i * n, dB, dC, sums + 2 * i, states, decays};
            (n == 16 ? NAME(backward_16) : NAME(backward_any))(a, at.b, k0, k1, A + i * n, NAME(vector)(a->D, a, at, i),
                                                               x + first, delta + first, slope + first, dy + first, to);
        }
        NAME(write_block)(a, at, k0, k1, x, a->du);
        NAME(write_block)(a, at, k0, k1, dy, a->ddelta);
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

static size_t NAME(scratch_bytes)(int64_t n) {
    return sizeof(vec) * (size_t)(3 * GROUPS * n + (4 * CHUNK + 1) * n + 2 * GROUPS + 4 * GROUPS * CHUNK);
}

#undef vec
#undef ivec
#undef GROUPS
#undef TOKEN
#undef AT
#undef FORWARD_BODY
#undef FORWARD_ARGS
#undef BACKWARD_BODY
#undef BACKWARD_ARGS
