/* Runs one kernel on what stdin holds and writes its buffers to stdout, for tests/test_ops_aarch64.py: which kernel, its
 * arguments and their size, then each buffer after the place of its pointer in the arguments and its size. */
#include "cpu_kernels.c"

#include <stdio.h>

static void get(void *to, size_t size) {
    if (fread(to, 1, size, stdin) != size) exit(2);
}

static int64_t number(void) {
    int64_t value;
    get(&value, sizeof value);
    return value;
}

int main(void) {
    const int64_t which = number(), size = number(), count = number();
    char *args = malloc((size_t)size), *buffers[64];
    int64_t sizes[64];
    if (count > 64) return 2;
    get(args, (size_t)size);
    for (int64_t i = 0; i < count; i++) {
        const int64_t place = number();
        sizes[i] = number();
        buffers[i] = malloc((size_t)sizes[i]);
        get(buffers[i], (size_t)sizes[i]);
        memcpy(args + place, &buffers[i], sizeof(char *));
    }
    if (!ssmgen_cpu_choose(0) || ssmgen_cpu_run(which, args, 2, 0)) return 3;
    for (int64_t i = 0; i < count; i++) fwrite(buffers[i], 1, (size_t)sizes[i], stdout);
    return 0;
}
