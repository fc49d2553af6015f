/* Vectors of VL floats: reading and writing them as float32 or bfloat16, and the functions the kernels need. Included
 * several times by cpu_kernels.c with VL and NAME(x) (a suffix for its functions) defined.
 */
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

static inline vec NAME(read)(int64_t bf16, const void *p, int64_t at, int lanes) {
    return bf16 ? NAME(load_bf16)((const uint16_t *)p + at, lanes) : NAME(load)((const float *)p + at, lanes);
}

static inline void NAME(write)(int64_t bf16, void *p, int64_t at, vec v, int lanes) {
    if (bf16) NAME(store_bf16)((uint16_t *)p + at, v, lanes);
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

/* 1 / (1 + exp(-x)). */
static inline vec NAME(sigmoid)(vec x) {
    const vec zero = {0};
    return 1.0f / (NAME(exp2)(x, zero - LOG2E) + 1.0f);
}

/* x sigmoid(x), and its derivative. */
static inline vec NAME(silu)(vec x, vec *slope) {
    const vec gate = NAME(sigmoid)(x);
    *slope = gate * (1.0f + x * (1.0f - gate));
    return x * gate;
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
