"""The peers that the benchmarks time, in a folder of their own: ``python -m benchmarks.peers`` installs them.

They are installed without their dependencies, which would change ours, and are put at the end of the path, so that all
run in one process. A peer that cannot be had is reported with its reason and left out of the table.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

FOLDER = Path(sys.prefix) / "peers"
WHEELS = ("mambapy==1.2.0", "transformers==5.23.0", "tokenizers==0.23.3")
SOURCES = ("mamba-ssm==2.3.2.post1",)
Scan = Callable[..., Tensor]


def install() -> None:
    """Fetch what is missing; what fails is said and skipped."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for wheel in WHEELS:
        name, version = wheel.split("==")
        if not (FOLDER / f"{name}-{version}.dist-info").exists():
            _run(wheel, [*pip, "install", "--no-deps", "--upgrade", "--target", str(FOLDER), wheel])
    for source in SOURCES:
        name, version = source.replace("-", "_").split("==")
        if not (FOLDER / f"{name}-{version}.tar.gz").exists():
            download = ["download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(FOLDER)]
            _run(source, [*pip, *download, source])


def _run(peer: str, command: list[str]) -> None:
    # mamba-ssm's set-up looks for a CUDA compiler unless told not to.
    done = subprocess.run(command, env=os.environ | {"MAMBA_SKIP_CUDA_BUILD": "TRUE"}, capture_output=True, text=True)
    if done.returncode:
        print(f"{peer} could not be installed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")


def load(loaders: dict[str, Callable[[], Scan]]) -> dict[str, Scan]:
    """What each loader returns, without those that fail, which are reported."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    found = {}
    for name, loader in loaders.items():
        try:
            found[name] = loader()
        except Exception as error:  # a peer may fail in any way; the table goes on without it
            print(f"{name} is not timed: {type(error).__name__}: {error}")
    return found


def mambapy() -> Scan:
    """mambapy's parallel scan, used as its own MambaBlock uses it; channel-last."""
    from mambapy.pscan import pscan  # type: ignore[import-not-found]

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        delta = F.softplus(delta + bias)
        states = pscan(torch.exp(delta.unsqueeze(-1) * A), delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1))
        return (states @ C.unsqueeze(-1)).squeeze(3) + D * u

    return scan


def mamba_ssm_reference() -> Scan:
    """mamba-ssm's own ``selective_scan_ref``, read out of its source package: importing it needs its compiled op.

    It is channel-first; the tensors it gets are made so beforehand by `channel_first`.
    """
    archive = next(FOLDER.glob("mamba_ssm-*.tar.gz"), None)
    if archive is None:
        raise FileNotFoundError(f"{FOLDER} holds no source package of mamba-ssm; python -m benchmarks.peers fetches it")
    with tarfile.open(archive) as tar:
        member = next(m for m in tar.getnames() if m.endswith("mamba_ssm/ops/selective_scan_interface.py"))
        file = tar.extractfile(member)
        assert file is not None
        tree = ast.parse(file.read())
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "selective_scan_ref"]
    scope = {"torch": torch, "F": F, "rearrange": rearrange, "repeat": repeat}
    exec(compile(ast.Module(body=wanted, type_ignores=[]), member, "exec"), scope)
    reference = scope["selective_scan_ref"]

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        u, delta, B, C = (x.transpose(1, 2) for x in (u, delta, B, C))
        y = reference(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)
        return y.transpose(1, 2)

    return scan


def channel_first(tensors: list[Tensor]) -> list[Tensor]:
    """u, delta, B and C laid out as a channel-first scan wants them, still addressed channel-last."""
    return [x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 3 else x for x in tensors]


def transformers_mixer(dim: int) -> torch.nn.Module:
    """transformers' Mamba layer with its per-step loop, at the sizes of `SelfMamba`'s."""
    from transformers import MambaConfig  # type: ignore[import-not-found]
    from transformers.models.mamba.modeling_mamba import MambaMixer  # type: ignore[import-not-found]

    config = MambaConfig(hidden_size=dim, state_size=16, conv_kernel=4, expand=2, time_step_rank=dim // 16)
    return MambaMixer(config, layer_idx=0).eval()


if __name__ == "__main__":
    install()
