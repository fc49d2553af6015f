"""Where a program of `ssmgen.ops.launch` lies; for kernels, which import it when they are first used."""

import triton
import triton.language as tl


@triton.jit
def program_place(first, second):
    """This program's place along three axes, of which the first two have ``first`` and ``second`` programs.

    The third is int64, as it is mostly the image, at which offsets start.
    """
    program = tl.program_id(0)
    rest = program // first
    return program % first, rest % second, (rest // second).to(tl.int64)
