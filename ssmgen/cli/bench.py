"""``ssmgen bench``: the scan and one block with each backend that runs here."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from ssmgen.cli.command import Answer, add_command


def add(commands: Any) -> None:
    """Add the command."""
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


def _bench(arguments: argparse.Namespace) -> Answer:
    import torch

    from ssmgen.bench import default_device, timings

    device = arguments.device or default_device()
    sizes = {name: getattr(arguments, name) for name in ("tokens", "dim", "batch", "rounds")}
    seconds = timings(device=device, **sizes)
    medians = {part: {name: statistics.median(t) for name, t in times.items()} for part, times in seconds.items()}
    facts = {"device": device, "threads": torch.get_num_threads(), **sizes, "medians": medians, "seconds": seconds}
    lines = [
        f"batch {sizes['batch']}, {sizes['tokens']} tokens, width {sizes['dim']}, float32, {device}, "
        f"{torch.get_num_threads()} threads; medians of {sizes['rounds']} rounds"
    ]
    for part, times in medians.items():
        first = next(iter(times))
        lines += ["", part]
        lines += [f"  {name:<12}{t * 1e3:>10.2f} ms{t / times[first]:>9.2f}x" for name, t in times.items()]
    return facts, lines
