"""``ssmgen doctor``: versions, devices, backends and optional packages."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from dataclasses import asdict
from typing import Any

from ssmgen.cli.command import Answer, add_command

#: Optional packages with their extra, as in pyproject.toml, and their purpose.
OPTIONAL = {
    "accelerate": ("train", "training"),
    "omegaconf": ("train", "settings of a run"),
    "docstring_parser": ("train", "help of the commands"),
    "tqdm": ("train", "progress bars"),
    "jinja2": ("train", "reports and pages"),
    "tensorboard": ("train", "curves of a run, tracker=tensorboard"),
    "trackio": ("trackers", "curves of a run, tracker=trackio"),
    "wandb": ("trackers", "curves of a run, tracker=wandb"),
    "torchdiffeq": ("adaptive", "adaptive solvers"),
    "torch-fidelity": ("metrics", "weights and values of FID"),
    "lpips": ("metrics", "diversity of samples"),
    "scikit-image": ("metrics", "resizing as in some FID protocols"),
    "gradio": ("demo", "the painting page"),
    "mamba-ssm": ("mamba", "its CUDA scan as a backend"),
}


def add(commands: Any) -> None:
    """Add the command."""
    about = (
        "Versions, devices, whether the compiled scan loads, which scan backend runs and why, and the optional\n"
        "packages. Include its output in a bug report."
    )
    add_command(commands, "doctor", _doctor, "versions, devices, which scan backend runs and why", about, "", "--json")


def _doctor(arguments: argparse.Namespace) -> Answer:
    facts = _facts()
    return facts, [*_machine_lines(facts), "", *_backend_lines(facts), "", *_package_lines(facts)]


def _facts() -> dict[str, Any]:
    import torch

    from ssmgen import __version__
    from ssmgen.ops import backends

    report = backends()
    return {
        "ssmgen": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "compiled_scan": {"loads": report["cpu"].available, "detail": report["cpu"].detail},
        "precision": _precision(),
        "backends": {name: asdict(status) for name, status in report.items()},
        "packages": {package: _version(package) for package in OPTIONAL},
    }


def _machine_lines(facts: dict[str, Any]) -> list[str]:
    from ssmgen.precision import Choice

    scan, precision = facts["compiled_scan"], facts["precision"]
    return [
        f"ssmgen {facts['ssmgen']}, Python {facts['python']}, {facts['platform']}",
        f"torch {facts['torch']}, {facts['threads']} threads",
        *(facts["devices"] or ["no CUDA device"]),
        f"compiled scan: {'loads' if scan['loads'] else 'does not load'} ({scan['detail']})",
        f"auto on {precision['device']} takes {Choice(**precision['auto'])}",
    ]


def _backend_lines(facts: dict[str, Any]) -> list[str]:
    lines = ["scan backends (selective_scan takes the one marked auto):"]
    for name, status in facts["backends"].items():
        auto = f"auto on {', '.join(status['auto_for'])}"
        mark = auto if status["auto_for"] else "ready" if status["available"] else "missing"
        lines.append(f"  {name:<10} {mark:<12} {status['detail']}")
    return lines


def _package_lines(facts: dict[str, Any]) -> list[str]:
    lines = ["optional packages:"]
    for package, (extra, purpose) in OPTIONAL.items():
        version = facts["packages"][package]
        fix = "" if version else f": pip install 'ssmgen[{extra}]'"
        lines.append(f"  {package:<15} {version or 'missing':<12} {purpose}{fix}")
    return lines


def _precision() -> dict[str, Any]:
    """What ``precision=auto`` takes here and why, and the seconds of a layer's products on the CPU."""
    from ssmgen.bench import default_device
    from ssmgen.precision import choose_precision, product_times

    device, times = default_device(), product_times()._asdict()
    return {"device": device, "auto": choose_precision("auto", device)._asdict(), "cpu_seconds": times}


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = range(torch.cuda.device_count())
    return [
        f"CUDA {torch.version.cuda}: {torch.cuda.get_device_name(i)}, "
        f"{torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        for i in devices
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
