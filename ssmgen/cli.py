"""The command ``ssmgen``: ``list``, ``info`` and ``doctor``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ssmgen.registry import KINDS, find, names


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 for what the user can mend, with one message on stderr."""
    arguments = _arguments().parse_args(argv)
    try:
        facts, lines = arguments.command(arguments)
    except (ValueError, TypeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(facts, indent=2) if arguments.json else "\n".join(lines))
    return 0


Answer = tuple[dict[str, Any], list[str]]  # the same facts for a program and for a person


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ssmgen", description="Look at what ssmgen can build and what runs here.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON instead of text")
    listing = commands.add_parser(
        "list", parents=[shared], help="names of models, blocks, objectives, solvers and autoencoders"
    )
    listing.add_argument("pattern", nargs="?", default="*", help="shell pattern, e.g. 'sisma*'")
    listing.set_defaults(command=_list)
    info = commands.add_parser(
        "info", parents=[shared], help="parameters by component, operations and memory of a model"
    )
    info.add_argument("name", help="a model's name")
    info.add_argument("--size", type=int, help="side of the latent (default: that of a 256 pixel image)")
    info.add_argument("--batch", type=int, default=1, help="images at a time, for the memory (default 1)")
    info.set_defaults(command=_info)
    doctor = commands.add_parser(
        "doctor", parents=[shared], help="versions, devices, and which scan backend runs and why"
    )
    doctor.set_defaults(command=_doctor)
    return parser


def _list(arguments: argparse.Namespace) -> Answer:
    found = {kind: entries for kind in KINDS if (entries := names(kind, arguments.pattern))}
    if not found:
        raise ValueError(f"no name matches {arguments.pattern!r}; 'ssmgen list' shows all")
    width = max(len(kind) for kind in KINDS) + 2
    return found, [f"{kind + ':':<{width}}{', '.join(entries)}" for kind, entries in found.items()]


def _info(arguments: argparse.Namespace) -> Answer:
    from ssmgen.models.summary import summarize

    kind = find(arguments.name).kind
    if kind != "model":
        raise ValueError(f"{arguments.name!r} is a {kind}; info takes a model: {', '.join(names('model'))}")
    summary = summarize(arguments.name, arguments.size, arguments.batch)
    return asdict(summary), summary.lines()


def _doctor(arguments: argparse.Namespace) -> Answer:
    import torch

    from ssmgen import __version__
    from ssmgen.ops import backends

    report = backends()
    facts = {
        "ssmgen": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "backends": {name: asdict(status) for name, status in report.items()},
        "packages": {package: _version(package) for package in _OPTIONAL},
    }
    lines = [
        f"ssmgen {__version__}, Python {facts['python']}, {facts['platform']}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        *(_devices() or ["no CUDA device"]),
        "",
        "scan backends (selective_scan takes the one marked auto):",
    ]
    for name, status in report.items():
        auto = f"auto on {', '.join(status.auto_for)}"
        mark = auto if status.auto_for else "ready" if status.available else "missing"
        lines.append(f"  {name:<10} {mark:<12} {status.detail}")
    lines += ["", "optional packages:"]
    return facts, lines + [f"  {package:<12} {_version(package)}" for package in _OPTIONAL]


_OPTIONAL = ("accelerate", "diffusers", "omegaconf", "torchdiffeq", "mamba-ssm")


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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    raise SystemExit(main())
