"""Compile the Triton kernels for GPUs that need not be here: ``python tests/compile_triton.py [CAPABILITY]``.

The capability is 90 (H100), and 80 (A100) for the 16-bit kernels of `ssd`, unless one is given for all. For the
kernels of the scan it also prints registers, spills and the modelled cycles of a call: see `sass_model`.
"""

import sys
from typing import Any

import triton
from sass_model import Kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssmgen.ops.launch import OPTIONS
from ssmgen.ops.scan import triton as triton_scan
from ssmgen.ops.scan import triton_kernels
from ssmgen.ops.ssd import triton as triton_ssd
from ssmgen.ops.ssd import triton_kernels as ssd_kernels

ONLY = int(sys.argv[1]) if len(sys.argv) > 1 else None
SEQUENCES = {"u", "delta", "B", "C", "z", "y", "dy", "du", "ddelta", "dz", "x", "maps"}
FLOATS = {*("A", "D", "bias", "first_state", "last_state", "end", "total", "saved", "starts", "dlast")} | {
    *("dA", "dB", "dC", "dD", "dbias", "dinitial")
}
# Those of the convolution, in compile_local.py.
SEQUENCES |= {"out", "dout", "dx"}
FLOATS |= {"weight", "sums"}
SIZES = {"chunks", "height", "width", "rows"}  # that need not be multiples of 16
#: Those of `ssd`, whose step sizes are float32.
SSD_SEQUENCES = {"x", "B", "C", "y", "dy", "dx"}
SSD_FLOATS = {*("delta", "A", "gain", "passed", "entering", "leaving", "first", "last", "ddelta", "dA", "dB", "dC")}
SSD_LAUNCH = {"num_warps": triton_ssd._WARPS}
#: The call that is modelled: its strides are those of `sisma-xl`.
BATCH, DIM, LENGTH = 8, 2048, 256
SCAN: dict[str, Any] = {"SOFTPLUS": True, "WHOLE": True, "dim": DIM, "u_step": 2 * DIM, "delta_step": DIM}
SCAN |= {"x_step": DIM, "z_step": 2 * DIM, "SEGMENT": triton_scan._SEGMENT, "ROUND": triton_scan._ROUND}


def kind(name: str, dtype: str, sequences: set[str], floats: set[str]) -> str:
    """Triton's type of an argument."""
    if name == "order":
        return "*i64"
    if name in {"B", "C", "maps"} and dtype == "bf16" and sequences is SEQUENCES:
        return "*i32"
    return f"*{dtype}" if name in sequences else "*fp32" if name in floats else "i32"


def compiled(kernel: Any, dtype: str, launch: dict[str, int], capability: int = 90, **flags: Any) -> Any:
    """Compile one kernel and say how large it is; tensors and sizes of the scan are multiples of 16, as most are."""
    ssd = kernel.__module__ == ssd_kernels.__name__
    sets = (SSD_SEQUENCES, SSD_FLOATS) if ssd else (SEQUENCES, FLOATS)
    constants = {name: flags[name] for name in kernel.arg_names if name in flags}
    signature = {name: "constexpr" if name in constants else kind(name, dtype, *sets) for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    even = [] if ssd else [i for i, (n, type) in enumerate(signature.items()) if type != "constexpr" and n not in SIZES]
    aligned = {(i,): [["tt.divisibility", 16]] for i in even}
    source = ASTSource(kernel, signature=signature, constexprs=places, attrs=aligned)
    target = GPUTarget("cuda", ONLY or capability, 32)
    made = triton.compile(source, target=target, options=OPTIONS | launch)
    size, shared = len(made.asm["cubin"]), made.metadata.shared
    print(f"{kernel.__name__} {dtype}: {size} bytes of machine code, {shared} of shared memory", flush=True)
    return made


def compile_scan(
    dtype: str, n: int, ordered: bool, capability: int = 90, carried: bool = False, gated: bool = False
) -> None:
    """Compile the kernels of the scan for one size of the state, and say what their machine code is like.

    Kernels for a length that is cut into chunks come last, if ``carried``.
    """
    absent: dict[str, Any] = ({} if ordered else {"order": None}) | ({} if gated else {"z": None, "dz": None})
    uncut = absent | {"end": None, "total": None}
    words = 2 if dtype == "bf16" else 1  # numbers in what holds a piece of B or C
    constants = SCAN | {"B_step": n // words, "C_step": 2 * n // words, "maps_step": n // words, "n": n}
    forward, backward = triton_scan._Tile.forward(n, whole=True), triton_scan._Tile.backward(n)
    segments = LENGTH // triton_scan._SEGMENT
    trips = [segments, LENGTH // backward.STEPS - segments, LENGTH // backward.STEPS]
    calls = [
        ("forward_kernel", forward, uncut | {"saved": None, "first_state": None}, [LENGTH // triton_scan._ROUND]),
        ("backward_kernel", backward, uncut, trips),
    ]
    if carried:
        for tile, back in ((forward, False), (backward, True)):
            calls.append(("carry_kernel", tile, absent | {"BACKWARD": back}, [LENGTH // tile.STEPS]))
    for name, tile, flags, trips in calls:
        kernel = getattr(triton_kernels, name)
        launch = {"num_warps": 1} | (triton_scan._FORWARD_LAUNCH if name == "forward_kernel" else {})
        made = compiled(kernel, dtype, launch, capability, **constants, **tile._asdict(), **flags)
        code = Kernel(made.asm["cubin"])
        cycles = code.cycles(-(-DIM // tile.CHANNELS) * BATCH, trips)
        print(
            f"{name}, {dtype}, d_state {n}{', gated' * gated}, sm_{ONLY or capability}: {code.registers} registers, "
            f"{code.spilled} bytes spilled, {cycles} cycles",
            flush=True,
        )


def compile_ssd(dtype: str, width: int, states: int, capability: int, **flags: Any) -> None:
    """Compile the kernels of `ssd` for one size of a head."""
    flags |= {"capability": capability, "PRECISION": "ieee" if dtype == "fp32" else "tf32", "STEPS": triton_ssd._STEPS}
    flags |= {"WIDTH": width, "STATES": states}
    for backward in (False, True):
        compiled(ssd_kernels.gain_kernel, dtype, SSD_LAUNCH, **flags, BACKWARD=backward)
    compiled(ssd_kernels.output_kernel, dtype, SSD_LAUNCH, **flags)
    compiled(ssd_kernels.gradient_kernel, dtype, SSD_LAUNCH, **flags)


if __name__ == "__main__":
    compile_scan("fp32", 16, ordered=False, carried=True)
    compile_scan("bf16", 16, ordered=True)
    compile_scan("bf16", 16, ordered=True, gated=True)
    compile_scan("bf16", 64, ordered=True, carried=True)
    for capability in (80, 100):
        compile_scan("fp32", 16, ordered=False, capability=capability)
    # Products of float32 make long code: larger heads take minutes to compile.
    compile_ssd("fp32", 32, 32, 90, HAS_ORDER=False, order=None)
    compile_ssd("bf16", 64, 64, 80, HAS_ORDER=True)
    for reverse in (False, True):
        passing = {"REVERSE": reverse, "ELEMENTS": triton_ssd._ELEMENTS}
        compiled(ssd_kernels.pass_kernel, "fp32", SSD_LAUNCH, **passing)
