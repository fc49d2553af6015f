"""``ssmgen list`` and ``ssmgen info``: what can be built, and what a model costs."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from ssmgen.cli.command import Answer, add_command
from ssmgen.registry import KINDS, find, names

_EVALUATIONS = 25  # of the sampler's default, ab3 in 24 steps, without guidance


def add(commands: Any) -> None:
    """Add both commands."""
    about = f"Names that ssmgen.build takes, by kind: {', '.join(KINDS)}."
    help = "names of models, blocks, objectives, solvers and the like"
    command = add_command(commands, "list", _list, help, about, "", "'sisma*'", "'*mamba*' --json")
    command.add_argument("pattern", nargs="?", default="*", help="shell pattern, in quotes, e.g. 'sisma*'")
    about = (
        "Parameters by component, operations, memory, and a guess at the speed on this machine.\n"
        "The counts are exact; the memory is an estimate. The speed is a guess: the operations divided by the\n"
        "throughput of matrix products and scans, timed for a moment. Real runs are slower."
    )
    help = "parameters, operations, memory and a guess at the speed of a model"
    command = add_command(
        commands, "info", _info, help, about, "sisma-xl", "sisma-s --size 16 --batch 8", "dit-b --json"
    )
    command.add_argument("name", help="a model's name, see 'ssmgen list'")
    command.add_argument("--size", type=int, help="side of the latent (default: that of a 256 pixel image)")
    command.add_argument("--batch", type=int, default=1, help="images at a time, for the memory (default 1)")
    command.add_argument("--device", help="cpu or cuda, for the guess (default: cuda if available)")


def _list(arguments: argparse.Namespace) -> Answer:
    found = {kind: entries for kind in KINDS if (entries := names(kind, arguments.pattern))}
    if not found:
        raise ValueError(f"no name matches {arguments.pattern!r}; 'ssmgen list' shows all")
    width = max(len(kind) for kind in KINDS) + 2
    return found, [f"{kind + ':':<{width}}{', '.join(entries)}" for kind, entries in found.items()]


def _info(arguments: argparse.Namespace) -> Answer:
    from ssmgen.bench import check_device, default_device, rates
    from ssmgen.models.summary import summarize

    kind = find(arguments.name).kind
    if kind != "model":
        raise ValueError(f"{arguments.name!r} is a {kind}; info takes a model: {', '.join(names('model'))}")
    for option in ("size", "batch"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}")
    device = arguments.device or default_device()
    check_device(device)
    summary = summarize(arguments.name, arguments.size, arguments.batch)
    measured = rates(device)
    step = summary.matrix_flops / measured.matrix + summary.scan_flops / measured.scan
    guess = {
        "basis": "operations divided by throughput measured on this machine just now; real runs are slower",
        "device": device,
        "matrix_flops_per_second": measured.matrix,
        "scan_flops_per_second": measured.scan,
        "seconds_per_image_and_evaluation": step,
        "sampled_images_per_second": 1 / (_EVALUATIONS * step),
        "trained_images_per_second": 1 / (3 * step),
    }
    return asdict(summary) | {"guess": guess}, [*summary.lines(), *_guess_lines(guess)]


def _guess_lines(guess: dict[str, Any]) -> list[str]:
    matrix, scan = (guess[f"{part}_flops_per_second"] / 1e9 for part in ("matrix", "scan"))
    return [
        f"speed on this machine's {guess['device']}, float32: a guess, real runs are slower",
        f"  from the operations above at {matrix:,.0f} (products) and {scan:,.1f} (scans) GFLOP/s, timed just now",
        f"  one evaluation of one image      {guess['seconds_per_image_and_evaluation']:.3g} s",
        f"  sampling, {_EVALUATIONS} evaluations         {guess['sampled_images_per_second']:.3g} images a second",
        f"  training, backward twice forward {guess['trained_images_per_second']:.3g} images a second",
    ]
