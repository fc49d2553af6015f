"""The tests of the operators under every instruction set that this processor has: ``python tests/instruction_sets.py``.

Three libraries choose theirs when they are loaded, each told by its own variable: the fused scan, torch and oneDNN.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = [
    *(f"tests/test_{name}.py" for name in ("ops", "ops_cpu", "ops_layers", "ops_orders", "nn")),
    "tests/test_training.py::test_resuming_is_exact_to_the_bit",
    "tests/test_evaluation_settings.py::test_with_a_micro_batch_the_batch_size_changes_no_bit",
]
#: As SSMGEN_CPU_ISA, ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA name them.
SETS = (("generic", "default", "SSE41"), ("avx2", "avx2", "AVX2"), ("avx512", "avx512", "DEFAULT"))

_FLAGS = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").is_file() else set()
HAS = {"generic": True, "avx2": {"avx2", "fma"} <= _FLAGS, "avx512": {"avx512f", "avx512bw", "avx512vl"} <= _FLAGS}


def environment(scan: str, torch: str, onednn: str) -> dict[str, str]:
    chosen = {"SSMGEN_CPU_ISA": scan, "ATEN_CPU_CAPABILITY": torch, "ONEDNN_MAX_CPU_ISA": onednn}
    return os.environ | chosen | {"PYTHONPATH": str(ROOT)}


def what_runs(chosen: dict[str, str]) -> str:
    """What the kernels and torch take under these variables."""
    code = (
        "import torch; from ssmgen.ops.scan import cpu\n"
        "print(cpu.unavailable() or cpu.describe(), '/ torch', torch.backends.cpu.get_cpu_capability())"
    )
    return subprocess.run(
        [sys.executable, "-c", code], env=chosen, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def main() -> int:
    failed = []
    for names in SETS:
        if not HAS[names[0]]:
            print(f"== {names[0]}: this processor lacks it")
            continue
        chosen = environment(*names)
        found = what_runs(chosen)
        print(f"== {names[0]}: {found}", end="", flush=True)
        if f"C kernel, {names[0]}," not in found or f"/ torch {names[1].upper()}" not in found:
            print(f"{names[0]} was asked for: is the package compiled?")
            failed.append(names[0])
            continue
        # Processes of one thread each: threads that wait for one another make a busy machine many times slower.
        command = [sys.executable, "-m", "pytest", "--numprocesses", "2", "--dist", "loadfile", *TESTS]
        if subprocess.run(command, cwd=ROOT, env=chosen).returncode:
            failed.append(names[0])
    if failed:
        print(f"failed under {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
