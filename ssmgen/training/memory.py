"""Memory reuse in a training on a CPU."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGEST = 32 * 2**20  # glibc takes no larger threshold for mmap on 64 bits


def keep_freed_memory() -> bool:
    """Let the process keep freed memory for the next tensors, if the C library is glibc.

    Every training step frees and allocates the same tensors. By default, glibc returns much of that memory to the
    system and requests it again, and the system clears every page it hands out: a sixth of the time of a training step,
    measured on two cores. The process then stays as large as its largest step until it ends.

    Returns:
        Whether it was done; other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
