"""A model of how a GPU runs the loops of a kernel, from its machine code (SASS): registers, spills and cycles.

One quarter of a Hopper multiprocessor issues one instruction a cycle, each warp in its program's order, to pipes that
take it every so many cycles; an operand is ready a fixed time after it was issued, one loaded from memory after
`LOAD`. Caches, bandwidth and clock changes are not modelled. It compares variants of a kernel; it predicts no time.
"""

import math
import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
LOAD = 300
QUARTERS, REGISTERS = 4 * 132, 65536 // 4  # of an H100, and in each of them
#: Cycles between two instructions of a pipe, then the pipe of each instruction. Those left out only need an issue slot.
PIPES = {"fma": 1, "multiply": 2, "alu": 2, "special": 8, "memory": 4}
PIPE_OF = {
    **dict.fromkeys(("FFMA", "FMUL", "FADD"), "fma"),
    **dict.fromkeys(("IMAD", "UIMAD"), "multiply"),
    **dict.fromkeys(("IADD3", "LEA", "SHF", "LOP3", "ISETP", "FSETP", "FSEL", "SEL", "PRMT", "MOV", "FMNMX"), "alu"),
    **dict.fromkeys(("PLOP3", "CS2R", "P2R", "R2P", "F2FP", "I2FP", "VIADD", "HFMA2"), "alu"),
    **dict.fromkeys(("MUFU", "I2F", "F2I", "F2F"), "special"),
    **dict.fromkeys(("SHFL", "LDS", "STS", "LDG", "STG", "LDSM", "STSM", "LDL", "STL"), "memory"),
}
LATENCY = {"LDG": LOAD, "MUFU": 24, "SHFL": 26, "LDS": 30, "LDSM": 33, "LDL": 30}
#: Instructions that write nothing, and those whose first two operands are written.
SILENT = {"STG", "STS", "STSM", "STL", "BAR", "BRA", "NOP", "EXIT", "WARPSYNC", "BSYNC", "BSSY", "DEPBAR", "MEMBAR"}
PAIRS = {"ISETP", "FSETP", "PLOP3", "UISETP", "UPLOP3", "HSETP2"}
LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?)([A-Z0-9_.]+)\s*(.*?);")


class Instruction(NamedTuple):
    address: int
    name: str  # with its modifiers
    read: frozenset[str]
    written: tuple[str, ...]
    target: int | None  # of a branch

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]


def _width(name: str) -> int:
    return 4 if ".128" in name or name.endswith(".M88.4") else 2 if ".64" in name or name.endswith(".M88.2") else 1


def _registers(operand: str, count: int) -> list[str]:
    found = re.findall(r"(?<![A-Z])(U?R)(\d+)", operand)
    return [f"{bank}{int(number) + k}" for bank, number in found for k in range(count)] + re.findall(
        r"(?<![A-Z0-9])U?P\d+", operand
    )


def _parse(line: str) -> Instruction | None:
    found = LINE.match(line)
    if found is None:
        return None
    address, predicate, name, rest = found.groups()
    kind, operands = name.split(".")[0], [x.strip() for x in rest.split(",")]
    count = 0 if kind in SILENT else 2 if kind in PAIRS else 1
    if kind in {"IADD3", "LEA", "UIADD3", "ULEA", "SHFL"}:  # a carry beside the result, or a predicate before it
        while count < len(operands) and re.fullmatch(r"U?P\d+", operands[count - (kind == "SHFL")]):
            count += 1
    wide = 2 if ".WIDE" in name or kind == "CS2R" else _width(name) if kind in {"LDG", "LDS", "LDL"} else 1
    written = [register for x in operands[:count] for register in _registers(x, wide)]
    read = set(re.findall(r"U?P\d+", predicate))
    for position, operand in enumerate(operands[count:]):
        stored = kind in {"STG", "STS", "STSM", "STL"} and position > 0
        addend = ".WIDE" in name and position == 2
        read.update(_registers(operand, _width(name) if stored else 2 if addend or ".64" in operand else 1))
    if predicate:  # what is not written keeps its value
        read.update(written)
    target = re.search(r"0x([0-9a-f]+)", rest) if kind == "BRA" else None
    return Instruction(int(address, 16), name, frozenset(read), tuple(written), target and int(target.group(1), 16))


class Kernel:
    """A compiled kernel.

    Args:
        cubin: its machine code.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread's registers that are kept in memory.
        loops: the instructions of each loop, by their place; one inside another comes after it. Of a kernel without
            loops, all its instructions.
    """

    def __init__(self, cubin: bytes) -> None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            told = [
                subprocess.run([TOOLS / "cuobjdump", how, file.name], capture_output=True, text=True, check=True).stdout
                for how in ("-res-usage", "-sass")
            ]
        usage = re.search(r"REG:(\d+) STACK:(\d+)", told[0])
        assert usage is not None, told[0]
        self.registers, self.spilled = map(int, usage.groups())
        code = [x for x in map(_parse, told[1].splitlines()) if x is not None]
        jumps = sorted({(x.target, x.address) for x in code if x.target is not None and x.target < x.address - 64})
        loops = [[x for x in code if first <= x.address <= last] for first, last in jumps]
        end = max(k for k, x in enumerate(code) if x.kind == "EXIT")
        self.loops = loops or [code[: end + 1]]

    def resident(self, warps: int) -> int:
        """Warps that a quarter of a multiprocessor holds at once, of ``warps`` in all on the chip."""
        return min(-(-warps // QUARTERS), REGISTERS // (32 * 8 * -(-self.registers // 8)))

    def cycles(self, warps: int, trips: list[int]) -> int:
        """Cycles of all ``warps``, each of which runs its loops ``trips`` times in all.

        Of a loop around others, its own instructions count alone.
        """
        at_once = self.resident(warps)
        own = [
            [x for x in loop if not any(x in other for other in self.loops[k + 1 :])]
            for k, loop in enumerate(self.loops)
        ]
        once = sum(count * _simulate(loop, at_once) for count, loop in zip(trips, own, strict=True))
        return round(math.ceil(warps / QUARTERS / at_once) * once)


def _simulate(body: list[Instruction], warps: int, repeats: int = 4) -> float:
    """Cycles of one round of a loop when so many warps run it side by side."""
    ready = [defaultdict[str, int](int) for _ in range(warps)]
    free = defaultdict[str, int](int)
    done, next_at = [0] * warps, [0] * warps
    now = last = turn = 0
    while min(done) < len(body) * repeats:
        best: tuple[int, int] | None = None
        for k in range(warps):
            warp = (turn + k) % warps
            if done[warp] >= len(body) * repeats:
                continue
            x = body[done[warp] % len(body)]
            times = [now, next_at[warp], free[PIPE_OF.get(x.kind, "")]]
            times += [ready[warp][name] for name in x.read] + [ready[warp][name] - 4 for name in x.written]
            if best is None or max(times) < best[0]:
                best = max(times), warp
            if best[0] <= now:
                break
        assert best is not None
        at, turn = best
        x = body[done[turn] % len(body)]
        if x.kind in PIPE_OF:
            free[PIPE_OF[x.kind]] = at + PIPES[PIPE_OF[x.kind]]
        latency = LATENCY.get(x.kind, 10 if x.kind.startswith("U") else 5)
        ready[turn].update(dict.fromkeys(x.written, at + latency))
        next_at[turn] = at + (16 if x.kind == "BAR" else 1)
        done[turn] += 1
        now, last = at + 1, at + 1
    return last / repeats
