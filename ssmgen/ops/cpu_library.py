"""The CPU kernels, compiled from csrc/ when the package is built: loaded through ctypes, run on torch's threads."""

import ctypes
import os
from ctypes import c_char_p, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: The kernels, in the order of csrc/cpu_kernels.c.
KERNELS = (
    *("scan_forward", "scan_backward", "norm_forward", "norm_backward", "conv_forward", "conv_backward"),
    *("gelu_forward", "gelu_backward", "embed_backward"),
)
#: VERSION of csrc/cpu_kernels.c that this code calls: raise both where the kernels or their structures change.
VERSION = 1


def _load() -> tuple[Any, str | None, int]:
    """The library or the reason why there is none, and the number of floats in its vectors."""
    file = Path(__file__).with_name("_cpu_kernels.so")
    if not file.is_file():
        return None, "its library was not compiled: reinstall ssmgen from a wheel, or where there is a C compiler", 1
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        return None, f"{file.name} does not load ({error}): reinstall ssmgen", 1
    version = getattr(library, "ssmgen_cpu_version", lambda: 0)()
    if version != VERSION:  # it would read its arguments at other offsets
        return None, f"{file.name} is version {version} and this ssmgen needs {VERSION}: run make install", 1
    library.ssmgen_cpu_choose.restype, library.ssmgen_cpu_choose.argtypes = c_int64, [c_char_p]
    library.ssmgen_cpu_chosen.restype = c_char_p
    library.ssmgen_is_permutation.restype, library.ssmgen_is_permutation.argtypes = c_int64, [c_void_p, c_int64]
    library.ssmgen_cpu_run.restype, library.ssmgen_cpu_run.argtypes = c_int64, [c_int64, c_void_p, c_int64, c_void_p]
    forced = os.environ.get("SSMGEN_CPU_ISA")
    lanes = library.ssmgen_cpu_choose(forced.encode() if forced else None)
    if not lanes:
        return None, f"SSMGEN_CPU_ISA={forced} is not avx512, avx2 or generic, or this processor lacks it", 1
    return library, None, lanes


def _team() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded, so that both share its threads."""
    for name in ("libgomp.so.1", None):
        try:
            return ctypes.cast(ctypes.CDLL(name).GOMP_parallel, c_void_p).value
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
    isa = _LIBRARY.ssmgen_cpu_chosen().decode()
    return f"fused C kernel, {isa}, {torch.get_num_threads()} threads" + ("" if _TEAM else " of its own")


def is_permutation(order: Tensor) -> bool:
    """Whether a contiguous int64 vector ``(n,)`` holds each of 0 ... n - 1 once."""
    return bool(_LIBRARY.ssmgen_is_permutation(order.data_ptr(), order.numel()))


def run(kernel: str, arguments: ctypes.Structure, tensors: dict[str, Tensor]) -> None:
    """Run one of `KERNELS` on its structure, with sizes and strides, and tensors of any shape; other pointers are null.

    Raises:
        MemoryError: its working buffers do not fit.
    """
    for name, x in tensors.items():
        setattr(arguments, name, x.data_ptr() if x.numel() else None)
    if _LIBRARY.ssmgen_cpu_run(KERNELS.index(kernel), ctypes.byref(arguments), torch.get_num_threads(), _TEAM):
        raise MemoryError(f"{kernel}: no memory for its working buffers")


def structure(name: str, integers: str, pointers: str, doubles: str = "") -> type[ctypes.Structure]:
    """The structure of this name in csrc/cpu_kernels.c: its integers, doubles and pointers, in this order."""
    kinds = ((integers, c_int64), (doubles, ctypes.c_double), (pointers, c_void_p))
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def set_strides(arguments: ctypes.Structure, tensors: dict[str, Tensor]) -> None:
    """Fill in ``<name>_batch`` and ``<name>_step`` for tensors ``(batch, length, dim)``."""
    for name, x in tensors.items():
        setattr(arguments, f"{name}_batch", x.stride(0))
        setattr(arguments, f"{name}_step", x.stride(1))
