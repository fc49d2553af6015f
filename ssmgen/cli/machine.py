"""``ssmgen doctor`` and ``ssmgen bench``: what runs on this machine, and how fast its scan backends are."""

import argparse
import importlib.metadata
import platform
import statistics
from dataclasses import asdict
from typing import Any

import torch

from ssmgen import __version__, bench
from ssmgen.cli.command import Answer, add_command
from ssmgen.ops import backends
from ssmgen.precision import choose_precision, product_times

#: Optional packages with their extra, as in pyproject.toml, and their purpose.
OPTIONAL = {
    "accelerate": ("train", "training"),
    "omegaconf": ("train", "settings of a run"),
    "docstring_parser": ("train", "help of the commands"),
    "psutil": ("train", "the watchdog of a training's processes"),
    "tqdm": ("train", "progress bars"),
    "jinja2": ("train", "reports and pages"),
    "tensorboard": ("train", "curves of a run, tracker=tensorboard"),
    "transformers": ("text", "text encoders, transformers-text"),
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
    """Add both commands."""
    about = (
        "Versions, devices, whether the compiled scan loads, which scan backend runs and why, and the optional\n"
        "packages. Include its output in a bug report."
    )
    add_command(commands, "doctor", _doctor, "versions, devices, which scan backend runs and why", about, "", "--json")
    about = (
        "Times selective_scan and one SISMA block with each scan backend that runs here, for some seconds: in one\n"
        "process, in turn, medians, and their ratio to the backend that 'auto' takes. Quote the ratios: single times\n"
        "vary with the load of the machine. 'reference' is a slow loop for tests."
    )
    help = "time the scan and one block with each backend that runs here"
    shown = ("", "--tokens 1024 --dim 512 --rounds 5", "--device cuda --json")
    command = add_command(commands, "bench", _bench, help, about, *shown)
    command.add_argument("--tokens", type=int, default=256, help="length of the sequence (default 256)")
    command.add_argument("--dim", type=int, default=256, help="width of the block (default 256)")
    command.add_argument("--batch", type=int, default=1, help="sequences at a time (default 1)")
    command.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    command.add_argument("--device", help="cpu or cuda (default: cuda if available)")


def _doctor(arguments: argparse.Namespace) -> Answer:
    report, device = backends(), bench.default_device()
    precision, scan = choose_precision("auto", device), report["cpu"]
    facts: dict[str, Any] = {
        "ssmgen": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "compiled_scan": {"loads": scan.available, "detail": scan.detail},
        "precision": {"device": device, "auto": precision._asdict(), "cpu_seconds": product_times()._asdict()},
        "backends": {name: asdict(status) for name, status in report.items()},
        "packages": {package: _version(package) for package in OPTIONAL},
    }
    return facts, [
        f"ssmgen {facts['ssmgen']}, Python {facts['python']}, {facts['platform']}",
        f"torch {facts['torch']}, {facts['threads']} threads",
        *(facts["devices"] or ["no CUDA device"]),
        f"compiled scan: {'loads' if scan.available else 'does not load'} ({scan.detail})",
        f"auto on {device} takes {precision}",
        "",
        *_backend_lines(facts["backends"]),
        "",
        *_package_lines(facts["packages"]),
    ]


def _backend_lines(report: dict[str, Any]) -> list[str]:
    lines = ["scan backends (selective_scan takes the one marked auto):"]
    for name, status in report.items():
        auto = f"auto on {', '.join(status['auto_for'])}"
        mark = auto if status["auto_for"] else "ready" if status["available"] else "missing"
        lines.append(f"  {name:<10} {mark:<12} {status['detail']}")
    return lines


def _package_lines(versions: dict[str, str | None]) -> list[str]:
    lines = ["optional packages:"]
    for package, (extra, purpose) in OPTIONAL.items():
        fix = "" if versions[package] else f": pip install 'ssmgen[{extra}]'"
        lines.append(f"  {package:<15} {versions[package] or 'missing':<12} {purpose}{fix}")
    return lines


def _devices() -> list[str]:
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


def _bench(arguments: argparse.Namespace) -> Answer:
    device, threads = arguments.device or bench.default_device(), torch.get_num_threads()
    sizes = {name: getattr(arguments, name) for name in ("tokens", "dim", "batch", "rounds")}
    seconds = bench.timings(device=device, **sizes)
    medians = {part: {name: statistics.median(t) for name, t in times.items()} for part, times in seconds.items()}
    facts = {"device": device, "threads": threads, **sizes, "medians": medians, "seconds": seconds}
    lines = [
        f"batch {sizes['batch']}, {sizes['tokens']} tokens, width {sizes['dim']}, float32, {device}, "
        f"{threads} threads; medians of {sizes['rounds']} rounds"
    ]
    for part, times in medians.items():
        first = next(iter(times.values()))
        lines += ["", part, *(f"  {name:<12}{t * 1e3:>10.2f} ms{t / first:>9.2f}x" for name, t in times.items())]
    return facts, lines
