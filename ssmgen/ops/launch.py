"""How every Triton kernel is launched: on the device of its tensors, over one axis, with the options all share."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Options of every kernel. Triton 3.9 and later warn, and later compile without fused multiply-adds, unless asked.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
_MOST_PROGRAMS = 2**31 - 1


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the device of its first tensor, whichever device is current.

    All programs lie on the first axis: CUDA takes only 65,535 on each of the other two, and a batch may be larger. The
    kernel finds its place in ``grid``, whose first number varies fastest, with `ssmgen.ops.triton_place.program_place`.

    Args:
        kernel: a Triton kernel.
        grid: the number of programs along each of one to three axes.
        arguments: of the kernel, at least one of which is a tensor.
        options: constants of the kernel, and ``num_warps``.

    Raises:
        ValueError: more programs than CUDA launches.
    """
    programs = math.prod(grid)
    if programs > _MOST_PROGRAMS:
        raise ValueError(
            f"a grid of {tuple(grid)} has {programs} programs, and CUDA launches at most {_MOST_PROGRAMS}: split the "
            "batch"
        )
    tensor = next(x for x in arguments if isinstance(x, Tensor))
    with torch.cuda.device_of(tensor):  # does nothing for a CPU tensor, whose kernels are interpreted
        kernel[(programs,)](*arguments, **OPTIONS, **options)
