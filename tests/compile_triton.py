"""Compile the Triton kernels for GPUs that need not be here: ``python tests/compile_triton.py [CAPABILITY]``.

The capability is 90 (H100), and 80 (A100) for the 16-bit kernels of `ssd`, unless one is given for all.
"""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssmgen.ops.launch import OPTIONS
from ssmgen.ops.scan import triton as triton_scan
from ssmgen.ops.scan import triton_kernels
from ssmgen.ops.ssd import triton as triton_ssd
from ssmgen.ops.ssd import triton_kernels as ssd_kernels

ONLY = int(sys.argv[1]) if len(sys.argv) > 1 else None
SEQUENCES = {"u", "delta", "B", "C", "y", "dy", "du", "ddelta"}
FLOATS = {*("A", "D", "bias", "start", "end", "total", "saved", "first", "last")} | {
    *("dA", "dB", "dC", "dD", "dbias", "dinitial")
}
#: Those of `ssd`, whose step sizes are float32.
SSD_SEQUENCES = {"x", "B", "C", "y", "dy", "dx"}
SSD_FLOATS = {*("delta", "A", "gain", "passed", "entering", "leaving", "first", "last", "ddelta", "dA", "dB", "dC")}
FLAGS: dict[str, Any] = {"SOFTPLUS": True, "HAS_BIAS": True, "HAS_ORDER": True, "STATES": 16}


def kind(name: str, dtype: str, sequences: set[str], floats: set[str]) -> str:
    """Triton's type of an argument."""
    if name == "order":
        return "*i64"
    return f"*{dtype}" if name in sequences else "*fp32" if name in floats else "i32"


def compile_kernel(kernel: Any, dtype: str, warps: int, capability: int = 90, **flags: Any) -> None:
    """Compile one kernel and say how large it is."""
    ssd = kernel.__module__ == ssd_kernels.__name__
    sets = (SSD_SEQUENCES, SSD_FLOATS) if ssd else (SEQUENCES, FLOATS)
    constants = {name: flags[name] for name in kernel.arg_names if name in flags}
    signature = {name: "constexpr" if name in constants else kind(name, dtype, *sets) for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=places)
    target = GPUTarget("cuda", ONLY or capability, 32)
    made = triton.compile(source, target=target, options=OPTIONS | {"num_warps": warps})
    size, shared = len(made.asm["cubin"]), made.metadata.shared
    print(f"{kernel.__name__} {dtype}: {size} bytes of machine code, {shared} of shared memory")


def compile_ssd(dtype: str, width: int, states: int, capability: int, **flags: Any) -> None:
    """Compile the kernels of `ssd` for one size of a head."""
    flags |= {"capability": capability, "PRECISION": "ieee" if dtype == "fp32" else "tf32", "STEPS": triton_ssd._STEPS}
    flags |= {"WIDTH": width, "STATES": states}
    for backward in (False, True):
        compile_kernel(ssd_kernels.gain_kernel, dtype, triton_ssd._WARPS, **flags, BACKWARD=backward)
    compile_kernel(ssd_kernels.output_kernel, dtype, triton_ssd._WARPS, **flags)
    compile_kernel(ssd_kernels.gradient_kernel, dtype, triton_ssd._WARPS, **flags)


if __name__ == "__main__":
    for dtype in ("fp32", "bf16"):
        forward = FLAGS | {"CHANNELS": triton_scan._CHANNELS, "STEPS": triton_scan._STEPS}
        backward = forward | {"CHANNELS": triton_scan._BACKWARD_CHANNELS}
        flags = {"HAS_D": True, "HAS_START": True, "OUTPUT": True, "SAVE": True}
        compile_kernel(triton_kernels.forward_kernel, dtype, triton_scan._WARPS, **forward, **flags)
        compile_kernel(triton_kernels.backward_kernel, dtype, triton_scan._BACKWARD_WARPS, **backward, HAS_D=True)
    compile_kernel(triton_kernels.gradient_kernel, "bf16", triton_scan._BACKWARD_WARPS, **backward)
    compile_kernel(triton_kernels.chain_kernel, "fp32", 1, **forward, HAS_FIRST=True, REVERSE=True)
    # Products of float32 make long code: larger heads take minutes to compile.
    compile_ssd("fp32", 32, 32, 90, HAS_ORDER=False, order=None)
    compile_ssd("bf16", 64, 64, 80, HAS_ORDER=True)
    for reverse in (False, True):
        passing = {"REVERSE": reverse, "ELEMENTS": triton_ssd._ELEMENTS}
        compile_kernel(ssd_kernels.pass_kernel, "fp32", triton_ssd._WARPS, **passing)
