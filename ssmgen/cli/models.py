"""``ssmgen list``, ``info`` and ``export``: what can be built, what a model costs, and a trained one as a folder."""

import argparse
import inspect
import sys
import textwrap
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssmgen import bench
from ssmgen.cli.command import Answer, add_command
from ssmgen.models.summary import summarize
from ssmgen.pipeline import SAVED_DTYPES, MaskToImage
from ssmgen.registry import KINDS, Entry, find, names, plugins, source

_EVALUATIONS = 25  # of the sampler's default, ab3 in 24 steps, without guidance


def add(commands: Any) -> None:
    """Add the three commands."""
    about = f"Names that ssmgen.build takes, by kind: {', '.join(KINDS)}."
    help = "names of models, blocks, objectives, solvers and the like"
    command = add_command(commands, "list", _list, help, about, "", "'sisma*'", "'*mamba*' --json")
    command.add_argument("pattern", nargs="?", default="*", help="shell pattern, in quotes, e.g. 'sisma*'")
    about = (
        "Parameters by component, operations, memory, and a guess at the speed on this machine.\n"
        "The counts are exact; the memory is an estimate. The speed is a guess: the operations divided by the\n"
        "throughput of matrix products and scans, timed for a moment. Real runs are slower."
    )
    about += "\nOf a block, condition, solver or the like: its documentation and arguments."
    help = "what a model costs; what a block, condition, solver or the like is and takes"
    examples = ("sisma-xl", "sisma-s --size 16 --batch 8", "cross-mamba", "dit-b --json")
    command = add_command(commands, "info", _info, help, about, *examples)
    command.add_argument("name", help="a registered name, see 'ssmgen list'")
    command.add_argument("--size", type=int, help="side of the latent (default: that of a 256 pixel image)")
    command.add_argument("--batch", type=int, help="images at a time, for the memory (default 1)")
    command.add_argument("--device", help="cpu or cuda, for the guess (default: cuda if available)")
    about = (
        "Copy a trained model into a folder for ssmgen.MaskToImage, optionally with smaller weights. SOURCE is such a\n"
        "folder, a model shipped with the package, or OWNER/NAME on the hub, which is then downloaded.\n"
        "A training run is not such a folder: the training recipe that wrote it has its own export command."
    )
    help = "copy a trained model into a folder, optionally with 16-bit weights"
    shown = ("exports/quick small --dtype bfloat16", "OWNER/NAME faces", "OWNER/NAME faces --local-files-only")
    command = add_command(commands, "export", _export, help, about, *shown)
    command.add_argument("source", metavar="SOURCE", help="folder, packaged model, or OWNER/NAME on the hub")
    command.add_argument("out", metavar="OUT", help="the folder to write; it must not exist")
    command.add_argument("--dtype", default="float32", help="of the weights: float32 (default), bfloat16 or float16")
    command.add_argument("--revision", help="branch, tag or commit on the hub")
    command.add_argument("--local-files-only", action="store_true", help="stay off the network")


def _list(arguments: argparse.Namespace) -> Answer:
    with warnings.catch_warnings(action="ignore"):  # said below, as a line of this command
        broken = [plugin.error for plugin in plugins() if plugin.error]
    print(*(f"warning: {error}\n" for error in broken), sep="", end="", file=sys.stderr)
    found = {kind: entries for kind in KINDS if (entries := names(kind, arguments.pattern))}
    if not found:
        raise ValueError(f"no name matches {arguments.pattern!r}; 'ssmgen list' shows all")
    others = {name: place for entries in found.values() for name in entries if (place := source(name)) != "ssmgen"}
    width = max(len(kind) for kind in KINDS) + 2
    form = {"width": 120, "subsequent_indent": width * " ", "break_on_hyphens": False, "break_long_words": False}
    lines: list[str] = []
    for kind, entries in found.items():
        shown = [f"{name} ({others[name]})" if name in others else name for name in entries]
        lines += textwrap.wrap(f"{kind + ':':<{width}}{', '.join(shown)}", **form)  # type: ignore[arg-type]
    return found | ({"sources": others} if others else {}) | ({"broken": broken} if broken else {}), lines


def _info(arguments: argparse.Namespace) -> Answer:
    entry = find(arguments.name)
    if entry.kind != "model":
        if given := [option for option in ("size", "batch", "device") if getattr(arguments, option) is not None]:
            raise ValueError(f"--{given[0]} is for models, and {entry.name!r} is a {entry.kind}: leave it out")
        return _about(entry)
    for option in ("size", "batch"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}")
    device = arguments.device or bench.default_device()
    measured = bench.rates(device)
    summary = summarize(arguments.name, arguments.size, 1 if arguments.batch is None else arguments.batch)
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
    facts = asdict(summary) | {"source": source(arguments.name), "guess": guess}
    return facts, [*summary.lines(), f"registered by {facts['source']}", *_guess_lines(guess)]


def _about(entry: Entry) -> Answer:
    """What a name other than a model's builds: its documentation, and the arguments it takes."""
    signature = inspect.signature(entry.builder)
    arguments = {name: str(each).removeprefix(f"{name}: ") for name, each in signature.parameters.items()}
    arguments |= {name: f"{value!r} (the default of this name)" for name, value in entry.defaults.items()}
    text = inspect.getdoc(entry.builder) or ""
    facts = {"kind": entry.kind, "arguments": arguments, "documentation": text, "source": source(entry.name)}
    head = f"{entry.name}: {entry.kind}, registered by {facts['source']}"
    taken = [f"  {name}: {value}" for name, value in arguments.items()] or ["  none"]
    return facts, [head, "", *text.splitlines(), "", "arguments:", *taken]


def _guess_lines(guess: dict[str, Any]) -> list[str]:
    matrix, scan = (guess[f"{part}_flops_per_second"] / 1e9 for part in ("matrix", "scan"))
    return [
        f"speed on this machine's {guess['device']}, float32: a guess, real runs are slower",
        f"  from the operations above at {matrix:,.0f} (products) and {scan:,.1f} (scans) GFLOP/s, timed just now",
        f"  one evaluation of one image      {guess['seconds_per_image_and_evaluation']:.3g} s",
        f"  sampling, {_EVALUATIONS} evaluations         {guess['sampled_images_per_second']:.3g} images a second",
        f"  training, backward twice forward {guess['trained_images_per_second']:.3g} images a second",
    ]


def _export(arguments: argparse.Namespace) -> Answer:
    source, out, dtype = Path(arguments.source).expanduser(), Path(arguments.out).expanduser(), arguments.dtype
    if dtype not in SAVED_DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(SAVED_DTYPES)}, got {dtype!r}")
    if out.exists():
        raise ValueError(f"{out} exists already: delete it or name another folder")
    if (source / "checkpoints").is_dir():
        raise ValueError(f"{source} is a training run, not a pipeline folder: use its recipe's own export command")
    options = {"revision": arguments.revision, "local_files_only": arguments.local_files_only}
    pipe = MaskToImage.from_pretrained(arguments.source, **options)
    pipe.save_pretrained(out, dtype=SAVED_DTYPES[dtype])
    size = (out / "model.safetensors").stat().st_size
    return {"out": str(out), "model": pipe.recipe.model, "dtype": dtype, "weight_bytes": size}, [
        f"saved {out}: {pipe.recipe.model}, {dtype}, {size / 1e6:,.1f} MB of weights",
        f"use it: ssmgen.MaskToImage.from_pretrained({str(out)!r})",
    ]
