/* The pointwise work around the scan, for one vector width, over the vectors of cpu_vectors.h: the layer norm with what
 * follows it, the depthwise convolution with its SiLU, GELU, and the gradient of the mask's embedding. Lanes are channels.
 */
#define CEIL(n) (((n) + VL - 1) / VL)

/* The first lanes of a vector, and zero. */
static inline vec NAME(keep)(vec v, int64_t lanes) {
    if (lanes >= VL) return v;
    for (int64_t i = lanes; i < VL; i++) v[i] = 0.0f;
    return v;
}

static inline int NAME(width)(int64_t dim, int64_t g) { return (int)min64(VL, dim - g * VL); }

static size_t NAME(no_scratch)(const void *args) {
    (void)args;
    return sizeof(vec);
}

/* Reads a row and takes mean and deviation out of it; returns 1 / deviation. */
static float NAME(standardize)(const norm_args *a, int64_t at, vec *row) {
    const int64_t groups = CEIL(a->dim);
    vec total = {0}, squares = {0};
    for (int64_t g = 0; g < groups; g++) {
        row[g] = NAME(read)(a->bf16, a->x, at + g * VL, NAME(width)(a->dim, g));
        total += row[g];
    }
    const float mean = NAME(sum)(total) / (float)a->dim;
    for (int64_t g = 0; g < groups; g++) {
        row[g] = NAME(keep)(row[g] - mean, a->dim - g * VL);
        squares += row[g] * row[g];
    }
    const float scale = 1.0f / sqrtf(NAME(sum)(squares) / (float)a->dim + (float)a->eps);
    for (int64_t g = 0; g < groups; g++) row[g] *= scale;
    return scale;
}

/* out = (standardized x * weight + bias) * silu(z), the last factor where there is a z. */
static void NAME(norm_forward)(const void *args, int64_t task, void *scratch) {
    const norm_args *a = args;
    const int64_t tiles = (a->length + ROWS - 1) / ROWS, b = task / tiles, first = task % tiles * ROWS;
    const float *weight = a->weight + b * a->weight_batch, *bias = a->bias + b * a->weight_batch;
    vec *row = scratch, slope;
    for (int64_t k = first; k < min64(first + ROWS, a->length); k++) {
        const int64_t z_row = b * a->z_batch + k * a->z_step, out_row = (b * a->length + k) * a->dim;
        NAME(standardize)(a, b * a->x_batch + k * a->x_step, row);
        for (int64_t g = 0; g < CEIL(a->dim); g++) {
            const int lanes = NAME(width)(a->dim, g);
            vec out = row[g] * NAME(load)(weight + g * VL, lanes) + NAME(load)(bias + g * VL, lanes);
            if (a->z) out *= NAME(silu)(NAME(read)(a->bf16, a->z, z_row + g * VL, lanes), &slope);
            NAME(write)(a->bf16, a->out, out_row + g * VL, out, lanes);
        }
    }
}

static void NAME(norm_backward)(const void *args, int64_t task, void *scratch) {
    const norm_args *a = args;
    const int64_t tiles = (a->length + ROWS - 1) / ROWS, b = task / tiles, first = task % tiles * ROWS;
    const int64_t groups = CEIL(a->dim);
    const float *weight = a->weight + b * a->weight_batch, *bias = a->bias + b * a->weight_batch;
    vec *row = scratch, *grad = row + groups, *dweight = grad + groups, *dbias = dweight + groups;
    memset(dweight, 0, sizeof(vec) * 2 * (size_t)groups);
    for (int64_t k = first; k < min64(first + ROWS, a->length); k++) {
        const int64_t z_row = b * a->z_batch + k * a->z_step, out_row = (b * a->length + k) * a->dim;
        const float scale = NAME(standardize)(a, b * a->x_batch + k * a->x_step, row);
        vec along_one = {0}, along_row = {0};
        for (int64_t g = 0; g < groups; g++) {
            const int lanes = NAME(width)(a->dim, g);
            const vec w = NAME(load)(weight + g * VL, lanes);
            vec up = NAME(read)(a->bf16, a->dout, out_row + g * VL, lanes), slope;
            if (a->z) {
                const vec gate = NAME(silu)(NAME(read)(a->bf16, a->z, z_row + g * VL, lanes), &slope);
                const vec normed = row[g] * w + NAME(load)(bias + g * VL, lanes);
                NAME(write)(a->bf16, a->dz, out_row + g * VL, up * normed * slope, lanes);
                up *= gate;
            }
            dweight[g] += up * row[g];
            dbias[g] += up;
            grad[g] = up * w;
            along_one += grad[g];
            along_row += grad[g] * row[g];
        }
        const float mean = NAME(sum)(along_one) / (float)a->dim, slant = NAME(sum)(along_row) / (float)a->dim;
        for (int64_t g = 0; g < groups; g++)
            NAME(write)(a->bf16, a->dx, out_row + g * VL, (grad[g] - mean - row[g] * slant) * scale,
                        NAME(width)(a->dim, g));
    }
    for (int64_t g = 0; g < groups; g++) {
        NAME(store)(a->dweight + task * a->dim + g * VL, dweight[g], NAME(width)(a->dim, g));
        NAME(store)(a->dbias + task * a->dim + g * VL, dbias[g], NAME(width)(a->dim, g));
    }
}

static size_t NAME(norm_scratch)(const void *args) {
    return sizeof(vec) * 4 * (size_t)CEIL(((const norm_args *)args)->dim);
}

/* A channel group's grid with a border of zeros half a kernel wide, so that no tap needs to look where it is. */
static inline int64_t NAME(padded_size)(const conv_args *a) {
    return (a->height + a->k - 1) * (a->width + a->k - 1);
}

/* Tokens of a strip of channels into padded grids, group by group. */
static void NAME(read_grids)(const conv_args *a, const void *from, int64_t batch, int64_t step, int64_t d0, int64_t groups,
                             vec *grids) {
    const int64_t half = a->k / 2, row = a->width + a->k - 1, size = NAME(padded_size)(a);
    memset(grids, 0, sizeof(vec) * (size_t)(groups * size));
    for (int64_t i = 0; i < a->height; i++)
        for (int64_t j = 0; j < a->width; j++)
            for (int64_t g = 0; g < groups; g++)
                grids[g * size + (i + half) * row + j + half] =
                    NAME(read)(a->bf16, from, batch + (i * a->width + j) * step + d0 + g * VL,
                               NAME(width)(a->dim - d0, g));
}

/* out, dense, += the taps over a padded grid. K is a constant in the common case, so that r is registers. */
#define TAPS_BODY(K)                                                                                                   \
    const int64_t row = a->width + (K)-1;                                                                              \
    vec r[(K) * (K)];                                                                                                  \
    UNROLL for (int64_t p = 0; p < (K) * (K); p++) r[p] = w[p];                                                        \
    for (int64_t i = 0; i < a->height; i++)                                                                            \
        for (int64_t j = 0; j < a->width; j++) {                                                                       \
            vec total = out[i * a->width + j];                                                                         \
            UNROLL for (int64_t p = 0; p < (K); p++)                                                                   \
                UNROLL for (int64_t q = 0; q < (K); q++) total += r[p * (K) + q] * grid[(i + p) * row + j + q];        \
            out[i * a->width + j] = total;                                                                             \
        }

/* dw = what each tap saw, times the gradient of what it made, which lies in the middle of a padded grid. */
#define SEEN_BODY(K)                                                                                                   \
    const int64_t row = a->width + (K)-1, middle = (K) / 2 * (row + 1);                                                \
    vec r[(K) * (K)];                                                                                                  \
    UNROLL for (int64_t p = 0; p < (K) * (K); p++) r[p] = (vec){0};                                                    \
    for (int64_t i = 0; i < a->height; i++)                                                                            \
        for (int64_t j = 0; j < a->width; j++) {                                                                       \
            const vec up = grad[middle + i * row + j];                                                                 \
            UNROLL for (int64_t p = 0; p < (K); p++)                                                                   \
                UNROLL for (int64_t q = 0; q < (K); q++) r[p * (K) + q] += up * grid[(i + p) * row + j + q];           \
        }                                                                                                              \
    UNROLL for (int64_t p = 0; p < (K) * (K); p++) dw[p] = r[p];

#define TAPS_ARGS const conv_args *a, const vec *restrict grid, const vec *restrict w, vec *restrict out
#define SEEN_ARGS const conv_args *a, const vec *restrict grid, const vec *restrict grad, vec *restrict dw
#define UNROLL _Pragma("GCC unroll 16")
static void NAME(taps_3)(TAPS_ARGS) { TAPS_BODY(3) }
static void NAME(seen_3)(SEEN_ARGS) { SEEN_BODY(3) }
#undef UNROLL
#define UNROLL
static void NAME(taps_any)(TAPS_ARGS) {
    const int64_t k = a->k;
    TAPS_BODY(k)
}
static void NAME(seen_any)(SEEN_ARGS) {
    const int64_t k = a->k;
    SEEN_BODY(k)
}
#undef UNROLL

/* The convolution of a group, before its SiLU, into out. */
static void NAME(convolve)(const conv_args *a, const vec *grid, int64_t d, vec *weights, vec *out) {
    const int lanes = (int)min64(VL, a->dim - d);
    const vec bias = NAME(load)(a->bias + d, lanes);
    for (int64_t p = 0; p < a->k * a->k; p++) weights[p] = NAME(load)(a->weight + p * a->dim + d, lanes);
    for (int64_t i = 0; i < a->height * a->width; i++) out[i] = bias;
    (a->k == 3 ? NAME(taps_3) : NAME(taps_any))(a, grid, weights, out);
}

static void NAME(conv_forward)(const void *args, int64_t task, void *scratch) {
    const conv_args *a = args;
    const int64_t strips = (a->dim + STRIP - 1) / STRIP, b = task / strips, d0 = task % strips * STRIP;
    const int64_t groups = CEIL(min64(STRIP, a->dim - d0)), size = NAME(padded_size)(a), length = a->height * a->width;
    vec *grids = scratch, *out = grids + groups * size, *weights = out + groups * length, slope;
    NAME(read_grids)(a, a->x, b * a->x_batch, a->x_step, d0, groups, grids);
    for (int64_t g = 0; g < groups; g++) NAME(convolve)(a, grids + g * size, d0 + g * VL, weights, out + g * length);
    for (int64_t i = 0; i < length; i++)
        for (int64_t g = 0; g < groups; g++)
            NAME(write)(a->bf16, a->out, (b * length + i) * a->dim + d0 + g * VL, NAME(silu)(out[g * length + i], &slope),
                        NAME(width)(a->dim - d0, g));
}

static void NAME(conv_backward)(const void *args, int64_t task, void *scratch) {
    const conv_args *a = args;
    const int64_t strips = (a->dim + STRIP - 1) / STRIP, b = task / strips, d0 = task % strips * STRIP, k = a->k;
    const int64_t groups = CEIL(min64(STRIP, a->dim - d0)), size = NAME(padded_size)(a), length = a->height * a->width;
    const int64_t row = a->width + k - 1, middle = k / 2 * (row + 1);
    vec *grids = scratch, *grads = grids + groups * size, *out = grads + groups * size, *weights = out + groups * length;
    vec *flipped = weights + k * k;
    NAME(read_grids)(a, a->x, b * a->x_batch, a->x_step, d0, groups, grids);
    NAME(read_grids)(a, a->dout, b * length * a->dim, a->dim, d0, groups, grads);
    for (int64_t g = 0; g < groups; g++) {
        const int64_t d = d0 + g * VL;
        const int lanes = (int)min64(VL, a->dim - d);
        vec *grid = grids + g * size, *grad = grads + g * size, *made = out + g * length, total = {0};
        NAME(convolve)(a, grid, d, weights, made);
        for (int64_t i = 0; i < a->height; i++)
            for (int64_t j = 0; j < a->width; j++) {
                vec slope, *up = &grad[middle + i * row + j];
                NAME(silu)(made[i * a->width + j], &slope);
                *up *= slope;
                total += *up;
            }
        NAME(store)(a->dbias + b * a->dim + d, total, lanes);
        for (int64_t p = 0; p < k * k; p++) flipped[p] = weights[k * k - 1 - p];
        (k == 3 ? NAME(seen_3) : NAME(seen_any))(a, grid, grad, weights);
        for (int64_t p = 0; p < k * k; p++) NAME(store)(a->dweight + (b * k * k + p) * a->dim + d, weights[p], lanes);
        memset(made, 0, sizeof(vec) * (size_t)length);
        (k == 3 ? NAME(taps_3) : NAME(taps_any))(a, grad, flipped, made);
    }
    for (int64_t i = 0; i < length; i++)
        for (int64_t g = 0; g < groups; g++)
            NAME(write)(a->bf16, a->dx, (b * length + i) * a->dim + d0 + g * VL, out[g * length + i],
                        NAME(width)(a->dim - d0, g));
}

static size_t NAME(conv_scratch)(const void *args) {
    const conv_args *a = args;
    const int64_t groups = CEIL(min64(STRIP, a->dim));
    return sizeof(vec) * (size_t)(groups * (2 * NAME(padded_size)(a) + a->height * a->width) + 2 * a->k * a->k);
}

/* x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), which is GELU with its tanh, and its derivative. */
static inline vec NAME(gelu)(vec x, vec *slope) {
    const vec square = x * x, gate = NAME(sigmoid)(1.5957691216f * x * (1.0f + 0.044715f * square));
    *slope = gate + x * gate * (1.0f - gate) * 1.5957691216f * (1.0f + 3.0f * 0.044715f * square);
    return x * gate;
}

static void NAME(gelu_forward)(const void *args, int64_t task, void *scratch) {
    const gelu_args *a = args;
    vec slope;
    (void)scratch;
    for (int64_t i = task * SPAN; i < min64((task + 1) * SPAN, a->count); i += VL) {
        const int lanes = (int)min64(VL, a->count - i);
        NAME(write)(a->bf16, a->out, i, NAME(gelu)(NAME(read)(a->bf16, a->x, i, lanes), &slope), lanes);
    }
}

static void NAME(gelu_backward)(const void *args, int64_t task, void *scratch) {
    const gelu_args *a = args;
    vec slope;
    (void)scratch;
    for (int64_t i = task * SPAN; i < min64((task + 1) * SPAN, a->count); i += VL) {
        const int lanes = (int)min64(VL, a->count - i);
        NAME(gelu)(NAME(read)(a->bf16, a->x, i, lanes), &slope);
        NAME(write)(a->bf16, a->dx, i, NAME(read)(a->bf16, a->dout, i, lanes) * slope, lanes);
    }
}

/* The rows of some places, and what all tokens add to them. */
static void NAME(embed_backward)(const void *args, int64_t task, void *scratch) {
    const embed_args *a = args;
    const int64_t first = task * PLACES, last = min64(first + PLACES, a->places);
    (void)scratch;
    memset(a->dtable + first * a->classes * a->dim, 0, sizeof(float) * (size_t)((last - first) * a->classes * a->dim));
    for (int64_t i = 0; i < a->tokens; i++)
        for (int64_t p = first; p < last; p++) {
            const int64_t row = a->rows[i * a->places + p];
            if (row < p * a->classes || row >= (p + 1) * a->classes) continue; /* nothing outside is written */
            float *to = a->dtable + row * a->dim;
            for (int64_t d = 0; d < a->dim; d += VL) {
                const int lanes = (int)min64(VL, a->dim - d);
                const vec up = NAME(read)(a->bf16, a->dout, i * a->dim + d, lanes);
                NAME(store)(to + d, NAME(load)(to + d, lanes) + up, lanes);
            }
        }
}

#undef CEIL
#undef TAPS_BODY
#undef TAPS_ARGS
#undef SEEN_BODY
#undef SEEN_ARGS
#undef vec
#undef ivec
