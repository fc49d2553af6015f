"""Compile the Triton kernels for compute capability 9.0, with or without a GPU: ``python tests/compile_triton.py``."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssmgen.ops.scan import triton as triton_scan
from ssmgen.ops.scan import triton_kernels

SEQUENCES = {"u", "delta", "B", "C", "y", "dy", "du", "ddelta"}
FLOATS = {*("A", "D", "bias", "start", "end", "total", "saved", "first", "last")} | {
    *("dA", "dB", "dC", "dD", "dbias", "dinitial")
}
FLAGS: dict[str, Any] = {"SOFTPLUS": True, "HAS_BIAS": True, "HAS_ORDER": True, "STATES": 16}


def kind(name: str, dtype: str) -> str:
    """Triton's type of an argument."""
    if name == "order":
        return "*i64"
    return f"*{dtype}" if name in SEQUENCES else "*fp32" if name in FLOATS else "i32"


def compile_kernel(kernel: Any, dtype: str, warps: int, **flags: Any) -> None:
    """Compile one kernel and say how large it is."""
    constants = {name: flags[name] for name in kernel.arg_names if name in flags}
    signature = {name: "constexpr" if name in constants else kind(name, dtype) for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    print(f"{kernel.__name__} {dtype}: {len(made.asm['cubin'])} bytes of machine code")


if __name__ == "__main__":
    for dtype in ("fp32", "bf16"):
        forward = FLAGS | {"CHANNELS": triton_scan._CHANNELS, "STEPS": triton_scan._STEPS}
        backward = forward | {"CHANNELS": triton_scan._BACKWARD_CHANNELS}
        flags = {"HAS_D": True, "HAS_START": True, "OUTPUT": True, "SAVE": True}
        compile_kernel(triton_kernels.forward_kernel, dtype, triton_scan._WARPS, **forward, **flags)
        compile_kernel(triton_kernels.backward_kernel, dtype, triton_scan._BACKWARD_WARPS, **backward, HAS_D=True)
    compile_kernel(triton_kernels.gradient_kernel, "bf16", triton_scan._BACKWARD_WARPS, **backward)
    compile_kernel(triton_kernels.chain_kernel, "fp32", 1, **forward, HAS_FIRST=True, REVERSE=True)
