"""Memory of a training on a CPU."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGEST = 32 * 2**20  # glibc takes no larger threshold for mmap on 64 bits


def keep_freed_memory() -> bool:
    """Let the process keep the memory it frees, for the next tensors, where the C library is glibc.

    Every training step frees and allocates the same tensors. By itself, glibc gives much of that back to the system and
    takes it again, and the system clears every page it hands out, which on two cores was a sixth of the time of a step
    of the preset `quick`. The process then stays as large as its largest step until it ends.

    Returns:
        Whether it could be done; another C library is left as it is.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
