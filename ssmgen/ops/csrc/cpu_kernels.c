/* Kernels for a CPU, forward and backward: the selective scan and the pointwise work around it.
 *
 * Plain C with vector extensions, compiled for several instruction sets in one file and chosen among at run time. It
 * needs no headers of Python or torch; ssmgen/ops/cpu_library.py calls it through ctypes with raw pointers.
 *
 * A kernel is cut into tasks in a way that does not depend on the threads, and sums have a fixed order: results repeat to
 * the bit for any number of threads.
 */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define VERSION 1 /* must be that of ssmgen/ops/cpu_library.py: raise both where a kernel or its arguments change */
#define LOG2E 1.44269504088896340736f
#define LN2 0.69314718055994530942f
#define TILE 128 /* channels of a task of the scan */
#define CHUNK 8  /* steps whose states and decays are kept at once: they fit the first-level cache */
#define ROWS 32  /* tokens of a task of the norm */
#define STRIP 16 /* channels of a task of the convolution */
#define PLACES 8 /* places of a task of the embedding */
#define SPAN 8192 /* values of a task of an elementwise function */

/* The layout of the arguments must agree with the structures of ssmgen/ops/scan/cpu.py and ssmgen/ops/local/cpu.py.
 * Strides count elements. With bf16 set, what is declared void is bfloat16, else float32. */

/* u, delta, B, C, z may be strided in batch and length. order, where given, is the token of each step; an order_batch of
 * 0 serves all images with one order. */
typedef struct {
    int64_t batch, length, dim, n, softplus, bf16;
    int64_t u_batch, u_step, delta_batch, delta_step, B_batch, B_step, C_batch, C_step, z_batch, z_step, order_batch;
    const void *u, *delta;
    const float *A, *B, *C, *D;
    const void *z;
    const float *delta_bias, *initial_state;
    const int64_t *order;
    void *y;
    float *last, *saved;
    const void *dy;
    const float *dlast;
    void *du, *ddelta;
    float *dA, *dB, *dC, *dD;
    void *dz;
    float *dbias, *dinitial;
} scan_args;

/* Weight and bias of the norm are those of an image, or of all with a stride of 0. Their gradients are partial sums, one
 * for each image and ROWS tokens. */
typedef struct {
    int64_t batch, length, dim, bf16, x_batch, x_step, z_batch, z_step, weight_batch;
    double eps;
    const void *x, *z;
    const float *weight, *bias;
    void *out;
    const void *dout;
    void *dx, *dz;
    float *dweight, *dbias;
} norm_args;

/* Weights lie as (k * k, dim); their gradients and the bias's are partial sums, one for each image. */
typedef struct {
    int64_t batch, height, width, dim, k, bf16, x_batch, x_step;
    const void *x;
    const float *weight, *bias;
    void *out;
    const void *dout;
    void *dx;
    float *dweight, *dbias;
} conv_args;

typedef struct {
    int64_t count, bf16;
    const void *x;
    void *out;
    const void *dout;
    void *dx;
} gelu_args;

/* Token i is the sum of the table's rows rows[i, 0..places), of which place p takes one of p * classes .. (p + 1) * classes. */
typedef struct {
    int64_t tokens, places, classes, dim, bf16;
    const int64_t *rows;
    const void *dout;
    float *dtable;
} embed_args;

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,prefer-vector-width=512")
#endif
#define VL 16
#define NAME(x) PASTE(x, _avx512)
#include "cpu_vectors.h"
#include "cpu_scan_kernel.h"
#include "cpu_layers_kernel.h"
#undef VL
#undef NAME
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define VL 8
#define NAME(x) PASTE(x, _avx2)
#include "cpu_vectors.h"
#include "cpu_scan_kernel.h"
#include "cpu_layers_kernel.h"
#undef VL
#undef NAME
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

/* Four lanes: NEON on arm, SSE2 on old x86, plain code elsewhere. */
#define VL 4
#define NAME(x) PASTE(x, _generic)
#include "cpu_vectors.h"
#include "cpu_scan_kernel.h"
#include "cpu_layers_kernel.h"
#undef VL
#undef NAME

static int64_t tiles(int64_t count, int64_t size) { return (count + size - 1) / size; }

static int64_t scan_tasks(const void *args) {
    const scan_args *a = args;
    return a->batch * tiles(a->dim, TILE);
}

static int64_t norm_tasks(const void *args) {
    const norm_args *a = args;
    return a->batch * tiles(a->length, ROWS);
}

static int64_t conv_tasks(const void *args) {
    const conv_args *a = args;
    return a->batch * tiles(a->dim, STRIP);
}

static int64_t gelu_tasks(const void *args) { return tiles(((const gelu_args *)args)->count, SPAN); }
static int64_t embed_tasks(const void *args) { return tiles(((const embed_args *)args)->places, PLACES); }

/* A kernel: how many tasks its arguments make, what each needs to work in, and a task for each instruction set. */
typedef void (*task_of)(const void *, int64_t, void *);
typedef struct {
    int64_t (*tasks)(const void *);
    size_t (*scratch[3])(const void *);
    task_of run[3];
} kernel;

#if defined(__x86_64__)
#define EACH(x) {x##_avx512, x##_avx2, x##_generic}
#else
#define EACH(x) {x##_generic, x##_generic, x##_generic}
#endif
/* In the order of KERNELS in ssmgen/ops/cpu_library.py. */
static const kernel kernels[] = {
    {scan_tasks, EACH(scan_scratch), EACH(scan_forward)},   {scan_tasks, EACH(scan_scratch), EACH(scan_backward)},
    {norm_tasks, EACH(norm_scratch), EACH(norm_forward)},   {norm_tasks, EACH(norm_scratch), EACH(norm_backward)},
    {conv_tasks, EACH(conv_scratch), EACH(conv_forward)},   {conv_tasks, EACH(conv_scratch), EACH(conv_backward)},
    {gelu_tasks, EACH(no_scratch), EACH(gelu_forward)},     {gelu_tasks, EACH(no_scratch), EACH(gelu_backward)},
    {embed_tasks, EACH(no_scratch), EACH(embed_backward)},
};

typedef struct {
    const char *name;
    int64_t lanes, column; /* column of the arrays of a kernel */
} variant;

static const variant variants[] = {
#if defined(__x86_64__)
    {"avx512", 16, 0},
    {"avx2", 8, 1},
#endif
    {"generic", 4, 2},
};
static const variant *chosen;

static int supported(const variant *v) {
#if defined(__x86_64__)
    if (v->lanes == 16)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
    if (v->lanes == 8) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return 1;
}

int64_t ssmgen_cpu_version(void) { return VERSION; }

/* Take the widest instruction set this machine has, or the one named. Returns its vector width, 0 if it has none such. */
int64_t ssmgen_cpu_choose(const char *name) {
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++)
        if (supported(&variants[i]) && (!name || !strcmp(name, variants[i].name))) {
            chosen = &variants[i];
            return chosen->lanes;
        }
    return 0;
}

/* Whether each of 0..length-1 occurs once: what is no permutation would read and write outside the tensors. */
int64_t ssmgen_is_permutation(const int64_t *order, int64_t length) {
    unsigned char *seen = calloc((size_t)length, 1);
    int64_t good = seen != 0;
    for (int64_t k = 0; good && k < length; k++)
        good = order[k] >= 0 && order[k] < length && !seen[order[k]]++;
    free(seen);
    return good;
}

const char *ssmgen_cpu_chosen(void) { return chosen->name; }

typedef struct {
    const void *args;
    task_of run;
    int64_t tasks;
    size_t scratch;
    atomic_int_fast64_t next;
    atomic_int failed;
} work;

/* States that decay away pass through numbers below 1e-38, on which processors are a hundred times slower: take them for
 * zero while a task runs. Returns what to restore. */
static inline uint64_t flush_tiny(void) {
    uint64_t before = 0;
#if defined(__x86_64__)
    before = _mm_getcsr();
    _mm_setcsr((unsigned)before | 0x8040u);
#elif defined(__aarch64__)
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | (1u << 24)));
#endif
    return before;
}

static inline void restore_tiny(uint64_t before) {
#if defined(__x86_64__)
    _mm_setcsr((unsigned)before);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(before));
#else
    (void)before;
#endif
}

static void worker(void *data) {
    work *w = data;
    void *scratch = 0;
    if (posix_memalign(&scratch, 64, w->scratch)) {
        atomic_store(&w->failed, 1);
        return;
    }
    const uint64_t before = flush_tiny();
    for (int64_t task; (task = atomic_fetch_add(&w->next, 1)) < w->tasks;) w->run(w->args, task, scratch);
    restore_tiny(before);
    free(scratch);
}

static void *thread_main(void *data) {
    worker(data);
    return 0;
}

/* team is GOMP_parallel of the OpenMP runtime torch has loaded, so that our tasks run on its threads; without it, threads
 * of our own are started for the call. */
typedef void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);

int64_t ssmgen_cpu_run(int64_t which, const void *args, int64_t threads, gomp_parallel team) {
    const kernel *k = &kernels[which];
    work w = {args, k->run[chosen->column], k->tasks(args), k->scratch[chosen->column](args), 0, 0};
    threads = min64(threads, min64(w.tasks, 256));
    if (threads > 1 && team) {
        team(worker, &w, (unsigned)threads, 0);
    } else {
        pthread_t extra[256];
        int64_t started = 0;
        while (started < threads - 1 && !pthread_create(&extra[started], 0, thread_main, &w)) started++;
        worker(&w);
        for (int64_t i = 0; i < started; i++) pthread_join(extra[i], 0);
    }
    return atomic_load(&w.failed) && atomic_load(&w.next) < w.tasks;
}
