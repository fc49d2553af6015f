"""The arithmetic floor of the selective scan on this processor.

The floor counts 15 vector operations per vector of state updates forward (11 of them the exponential) and 29 more
backward, at the rate at which the machine does independent multiply-adds of whole vectors. No kernel can be faster
without computing something else; loads, stores and dependent chains come on top.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import tempfile
import threading
import time
from functools import lru_cache
from pathlib import Path

import torch

FORWARD, WITH_BACKWARD = 15, 44
_ROUNDS = 4_000_000


@lru_cache(1)
def vector_rate() -> tuple[float, int] | None:
    """Vector multiply-adds a second on torch's number of threads, and floats in a vector; None without a C compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma.so"
        source = Path(__file__).with_name("fma.c")
        command = [compiler, "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-o", str(library)]
        subprocess.run([*command, str(source)], check=True)
        functions = ctypes.CDLL(str(library))
    functions.lanes.restype = ctypes.c_int64
    functions.run.argtypes, functions.run.restype = [ctypes.c_int64, ctypes.c_float], ctypes.c_float
    threads = torch.get_num_threads()
    best = max(_rate(functions, threads) for _ in range(5))
    return best, functions.lanes()


def _rate(functions: ctypes.CDLL, threads: int) -> float:
    workers = [threading.Thread(target=functions.run, args=(_ROUNDS, 0.999)) for _ in range(threads)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return threads * _ROUNDS * 16 / (time.perf_counter() - started)


def floor_ms(shape: tuple[int, int, int, int], operations: int) -> float:
    """Milliseconds for (batch, dim, length, d_state); NaN where the rate could not be measured."""
    measured = vector_rate()
    if measured is None:
        return math.nan
    rate, lanes = measured
    return math.prod(shape) / lanes * operations / rate * 1e3
