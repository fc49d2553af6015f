"""Compile the Triton convolution for GPUs that need not be here: ``python tests/compile_local.py [CAPABILITY]``.

Prints registers, spills and the modelled cycles of a call, for capabilities 80, 90 and 100 unless one is given.
"""

from typing import Any

from compile_triton import BATCH, DIM, ONLY, compiled
from sass_model import Kernel

from ssmgen.ops.local import triton as triton_local
from ssmgen.ops.local import triton_kernels

SIDE = 16  # of the grid that is modelled


def compile_conv(name: str, dtype: str, k: int, capability: int, dim: int = DIM, **flags: Any) -> None:
    """Compile one kernel and say what its machine code is like; tokens are the first half of wider rows."""
    backward = name == "backward_kernel"
    tile = (triton_local._Tile.backward if backward else triton_local._Tile.forward)(dim, k)
    kernel = getattr(triton_kernels, name)
    flags |= {"x_step": 2 * dim, "dim": dim, "K": k, **tile._asdict()}
    code = Kernel(compiled(kernel, dtype, {"num_warps": 1}, capability, **flags).asm["cubin"])
    programs = -(-dim // tile.CHANNELS) * -(-SIDE // tile.COLUMNS) * BATCH
    programs *= 1 if backward else -(-SIDE // tile.ROWS)
    cycles = code.cycles(programs, [SIDE + 2 * (k // 2)] if backward else [1])
    print(
        f"{name}, {dtype}, {k} x {k}, dim {dim}, sm_{ONLY or capability}: {code.registers} registers, "
        f"{code.spilled} bytes spilled, {cycles} cycles",
        flush=True,
    )


if __name__ == "__main__":
    for name in ("forward_kernel", "backward_kernel"):
        for dtype in ("bf16", "fp32"):
            compile_conv(name, dtype, 3, 90)
        for capability in (80, 100):
            compile_conv(name, "fp32", 3, capability)
    compile_conv("backward_kernel", "fp32", 5, 90)
    for name in ("forward_kernel", "backward_kernel"):  # channels that fill no program, and a grid of one column
        compile_conv(name, "fp32", 1, 80, dim=37, width=1)
