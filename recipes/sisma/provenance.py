"""What is recorded beside every figure: command, commit, seed, versions and hardware."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ssmgen.ops import backends

_PACKAGES = (
    *("torch", "triton", "einops", "diffusers", "accelerate"),
    *("torch-fidelity", "lpips", "scikit-image", "torchvision"),
)


def provenance(command: str, seed: int) -> dict[str, Any]:
    """Command, commit, seed, versions and hardware, for a result's JSON."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": command,
        "commit": _commit(),
        "seed": seed,
        "versions": versions,
        "hardware": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "scan": {name: status.detail for name, status in backends().items() if status.auto_for},
        },
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())} ({os.cpu_count()} cores)"


def _commit() -> str | None:
    """The checkout's commit, marked ``-dirty`` if code differs from it.

    Outside a checkout, such as in a copy of the tree, what the environment's ``SSMGEN_COMMIT`` says, or None.
    """
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return os.environ.get("SSMGEN_COMMIT") or None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        # Pages and earlier results do not affect a measurement.
        changed = git("diff", "--name-only", "HEAD", "--", ".", ":!docs", ":!*.md", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD").strip() + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
