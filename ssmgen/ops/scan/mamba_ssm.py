"""Selective scan by mamba-ssm's CUDA op, where that package is installed and asked for."""

import importlib.util

import torch
from torch import Tensor

from ssmgen.ops.backend import FLOATS_UP_TO_32
from ssmgen.ops.scan.inputs import SEQUENCES, ScanInputs

name, takes_order = "mamba-ssm", False
devices: tuple[str, ...] | None = ("cuda",)
dtypes = FLOATS_UP_TO_32
auto_for: tuple[str, ...] | None = ()  # its gradients do not repeat to the bit
# Looked up once, since Dynamo of torch 2.11 refuses to trace the look-up.
_INSTALLED, _BUILT = (importlib.util.find_spec(name) is not None for name in ("mamba_ssm", "selective_scan_cuda"))


def unavailable() -> str | None:
    if not _INSTALLED:
        return "mamba-ssm is not installed: pip install 'ssmgen[mamba]' (needs a CUDA compiler)"
    if not torch.cuda.is_available():
        return "mamba-ssm's scan needs a CUDA device and none is visible"
    if not _BUILT:
        return (
            "mamba-ssm was built without its Mamba-1 CUDA op: reinstall it with MAMBA_KEEP_CUDA_BUILD=TRUE and "
            "--no-build-isolation"
        )
    return None


def describe() -> str:
    return "mamba-ssm's CUDA op (its B and C gradients come from atomic adds and do not repeat to the bit)"


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """mamba_ssm's `selective_scan_fn`, channel-first and from zero: y ``(batch, length, dim)`` and the last state.

    Raises:
        ValueError: an initial state was given, which that op does not take.
    """
    if inputs.initial_state is not None:
        raise ValueError("backend 'mamba-ssm' takes no initial_state: use backend='portable' for this call")
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, A, B, C, D, z, bias, *_, softplus = inputs.apply(lambda x: x.transpose(1, 2).contiguous(), *SEQUENCES)
    y, state = selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=softplus, return_last_state=True)
    return y.transpose(1, 2), state
