/* How many multiply-adds of whole vectors this machine does a second: the yardstick of the scan's arithmetic floor. Sixteen
 * independent chains keep both units busy. Compiled by floor.py with -march=native, for this measurement alone. */
#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));

int64_t lanes(void) { return LANES; }

/* rounds * 16 multiply-adds; the sum is returned so that none is left out. */
float run(int64_t rounds, float factor) {
    vec a[16], f = {0}, b = {0};
    f += factor;
    b += 1e-9f;
    for (int i = 0; i < 16; i++) a[i] = f + (float)i;
    for (int64_t k = 0; k < rounds; k++)
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) a[i] = a[i] * f + b;
    vec sum = {0};
    for (int i = 0; i < 16; i++) sum += a[i];
    float total = 0;
    for (int i = 0; i < LANES; i++) total += sum[i];
    return total;
}
