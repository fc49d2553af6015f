"""The compiled CPU kernels: loads the library through ctypes and runs a kernel on torch's threads.

The library lies beside this file, compiled from csrc/ when the package is built. It needs neither Python nor torch.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch
from torch import Tensor

#: The kernels, in the order of csrc/cpu_kernels.c.
KERNELS = (
    *("scan_forward", "scan_backward", "norm_forward", "norm_backward", "conv_forward", "conv_backward"),
    *("gelu_forward", "gelu_backward", "embed_backward"),
)


def _load() -> tuple[ctypes.CDLL | None, str | None, int]:
    """The library or the reason why there is none, and the number of floats in its vectors."""
    file = Path(__file__).with_name("_cpu_kernels.so")
    if not file.is_file():
        return None, "its library was not compiled: reinstall ssmgen from a wheel, or where there is a C compiler", 1
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        return None, f"{file.name} does not load ({error}): reinstall ssmgen", 1
    library.ssmgen_cpu_choose.restype = ctypes.c_int64
    library.ssmgen_cpu_choose.argtypes = [ctypes.c_char_p]
    library.ssmgen_cpu_chosen.restype = ctypes.c_char_p
    library.ssmgen_is_permutation.restype = ctypes.c_int64
    library.ssmgen_is_permutation.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.ssmgen_cpu_run.restype = ctypes.c_int64
    library.ssmgen_cpu_run.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    forced = os.environ.get("SSMGEN_CPU_ISA")
    lanes = library.ssmgen_cpu_choose(forced.encode() if forced else None)
    if not lanes:
        return None, f"SSMGEN_CPU_ISA={forced} is not avx512, avx2 or generic, or this processor lacks it", 1
    return library, None, lanes


def _team() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded, so that both share its threads."""
    for name in ("libgomp.so.1", None):
        try:
            return ctypes.cast(ctypes.CDLL(name).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError, TypeError):
            continue
    return None


_LIBRARY, _REASON, LANES = _load()
_TEAM = _team() if _LIBRARY is not None else None


def unavailable() -> str | None:
    """Why the kernels cannot run here, or None."""
    return _REASON


def describe() -> str:
    """What runs, for the backend report."""
    assert _LIBRARY is not None
    isa = _LIBRARY.ssmgen_cpu_chosen().decode()
    return f"fused C kernel, {isa}, {torch.get_num_threads()} threads" + ("" if _TEAM else " of its own")


def is_permutation(order: Tensor) -> bool:
    """Whether a contiguous int64 vector holds each of 0 ... n - 1 once."""
    assert _LIBRARY is not None
    return bool(_LIBRARY.ssmgen_is_permutation(order.data_ptr(), order.numel()))


def run(kernel: str, arguments: ctypes.Structure, tensors: dict[str, Tensor]) -> None:
    """Run one of `KERNELS`.

    Args:
        kernel: its name.
        arguments: its structure with sizes and strides filled in.
        tensors: the tensors its pointers point to, by name; the other pointers stay null.

    Raises:
        MemoryError: its working buffers do not fit.
    """
    assert _LIBRARY is not None
    for name, x in tensors.items():
        setattr(arguments, name, x.data_ptr() if x.numel() else None)
    if _LIBRARY.ssmgen_cpu_run(KERNELS.index(kernel), ctypes.byref(arguments), torch.get_num_threads(), _TEAM):
        raise MemoryError(f"{kernel}: no memory for its working buffers")


def structure(integers: tuple[str, ...], pointers: tuple[str, ...]) -> list[tuple[str, type]]:
    """The fields of a ctypes structure of integers followed by pointers."""
    return [*((name, ctypes.c_int64) for name in integers), *((name, ctypes.c_void_p) for name in pointers)]


def dense_rows(x: Tensor) -> Tensor:
    """``x`` if its last dimension is dense, else a contiguous copy: the kernels stride over the other dimensions."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
