/* Selective scan on a CPU, forward and backward (ssmgen.ops.cpu).
 *
 * Plain C with vector extensions, compiled for several instruction sets in one file and chosen among at run time. It
 * needs no headers of Python or torch; ssmgen/ops/cpu.py calls it through ctypes with raw pointers.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LOG2E 1.44269504088896340736f
#define LN2 0.69314718055994530942f
#define TILE 128 /* channels of one task; fixes the order of sums, so results do not depend on the threads */
#define CHUNK 8  /* steps whose states and decays are kept at once: they fit the first-level cache */

/* Layout must agree with _Args in ssmgen/ops/cpu.py. u, delta, B, C may be strided in batch and length (in elements).
 * With bf16 set, u, delta, y, dy, du and ddelta are bfloat16. order, where given, is the token of each step. */
typedef struct {
    int64_t batch, length, dim, n, softplus, bf16;
    int64_t u_batch, u_step, delta_batch, delta_step, B_batch, B_step, C_batch, C_step;
    const int64_t *order;
    const void *u, *delta;
    const float *A, *B, *C, *D, *bias, *initial;
    void *y;
    float *last, *saved;
    const void *dy;
    const float *dlast;
    void *du, *ddelta;
    float *dA, *dB, *dC, *dD, *dbias, *dinitial;
} scan_args;

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
#include "cpu_scan_kernel.h"
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
#include "cpu_scan_kernel.h"
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
#include "cpu_scan_kernel.h"
#undef VL
#undef NAME

typedef struct {
    const char *name;
    int64_t lanes;
    void (*forward)(const scan_args *, int64_t, void *);
    void (*backward)(const scan_args *, int64_t, void *);
    size_t (*scratch_bytes)(int64_t);
} variant;

static const variant variants[] = {
#if defined(__x86_64__)
    {"avx512", 16, forward_task_avx512, backward_task_avx512, scratch_bytes_avx512},
    {"avx2", 8, forward_task_avx2, backward_task_avx2, scratch_bytes_avx2},
#endif
    {"generic", 4, forward_task_generic, backward_task_generic, scratch_bytes_generic},
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

/* Take the widest instruction set this machine has, or the one named. Returns its vector width, 0 if it has none such. */
int64_t ssmgen_scan_choose(const char *name) {
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

const char *ssmgen_scan_chosen(void) { return chosen->name; }

typedef struct {
    const scan_args *args;
    void (*run)(const scan_args *, int64_t, void *);
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

int64_t ssmgen_scan_run(const scan_args *args, int64_t backward, int64_t threads, gomp_parallel team) {
    work w = {args, backward ? chosen->backward : chosen->forward, 0, chosen->scratch_bytes(args->n), 0, 0};
    w.tasks = args->batch * ((args->dim + TILE - 1) / TILE);
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
