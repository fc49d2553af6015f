"""The command ``ssmgen``: ``list``, ``info``, ``doctor``, ``bench`` and ``export``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssmgen.registry import KINDS, find, names

Answer = tuple[dict[str, Any], list[str]]  # the same facts for a program and for a person

#: Optional packages: their extra, and what they are for. The extras are those of pyproject.toml.
OPTIONAL = {
    "accelerate": ("train", "training"),
    "omegaconf": ("train", "settings of a run"),
    "tqdm": ("train", "progress bars"),
    "jinja2": ("train", "reports and pages"),
    "tensorboard": ("train", "curves of a run, tracker=tensorboard"),
    "trackio": ("trackers", "curves of a run, tracker=trackio"),
    "wandb": ("trackers", "curves of a run, tracker=wandb"),
    "torchdiffeq": ("adaptive", "adaptive solvers"),
    "torch-fidelity": ("metrics", "weights and figures of FID"),
    "lpips": ("metrics", "diversity of samples"),
    "scikit-image": ("metrics", "resizing as some FID protocols do"),
    "gradio": ("demo", "the painting page"),
    "mamba-ssm": ("mamba", "its CUDA scan as a backend"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 when all went well; 2 for what the user can mend, with one message on stderr; 130 after Ctrl-C; 141 where the
    reader of a pipe went away, as ``head`` does.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        facts, lines = arguments.command(arguments)
        print(json.dumps(facts, indent=2) if arguments.json else "\n".join(lines), flush=True)
    except (ValueError, TypeError, ImportError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would complain once more at its end
            return 141
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssmgen",
        description="What ssmgen can build, what it costs, what runs here; and models as folders.",
        epilog=_examples("list 'sisma*'", "info sisma-xl", "doctor", "bench", "export OWNER/NAME faces")
        + "\n'ssmgen COMMAND --help' tells more. Training and sampling: python -m recipes.sisma.train, see the README.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ssmgen {_version('ssmgen')}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    for add in (_add_list, _add_info, _add_doctor, _add_bench, _add_export):
        add(commands)
    return parser


def _add(
    commands: Any, name: str, run: Callable[[argparse.Namespace], Answer], help: str, about: str, *examples: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=about,
        epilog=_examples(*(f"{name} {words}".strip() for words in examples)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.set_defaults(command=run)
    return command


def _examples(*commands: str) -> str:
    return "\n".join(["examples:", *(f"  ssmgen {words}" for words in commands)])


def _add_list(commands: Any) -> None:
    about = "Names that ssmgen.build takes: models, blocks, objectives, solvers and autoencoders."
    help = "names of models, blocks, objectives, solvers and autoencoders"
    command = _add(commands, "list", _list, help, about, "", "'sisma*'", "'*mamba*' --json")
    command.add_argument("pattern", nargs="?", default="*", help="shell pattern, in quotes, e.g. 'sisma*'")


def _list(arguments: argparse.Namespace) -> Answer:
    found = {kind: entries for kind in KINDS if (entries := names(kind, arguments.pattern))}
    if not found:
        raise ValueError(f"no name matches {arguments.pattern!r}; 'ssmgen list' shows all")
    width = max(len(kind) for kind in KINDS) + 2
    return found, [f"{kind + ':':<{width}}{', '.join(entries)}" for kind, entries in found.items()]


def _add_info(commands: Any) -> None:
    about = (
        "Parameters by component, operations, memory, and a guess at the speed on this machine.\n"
        "The counts are exact; the memory is an estimate. The speed is a guess: the operations over what this\n"
        "machine does of matrix products and scans, timed for a moment. The real thing is slower."
    )
    help = "parameters, operations, memory and a guess at the speed of a model"
    command = _add(commands, "info", _info, help, about, "sisma-xl", "sisma-s --size 16 --batch 8", "dit-b --json")
    command.add_argument("name", help="a model's name, see 'ssmgen list'")
    command.add_argument("--size", type=int, help="side of the latent (default: that of a 256 pixel image)")
    command.add_argument("--batch", type=int, default=1, help="images at a time, for the memory (default 1)")
    command.add_argument("--device", help="cpu or cuda, for the guess (default: cuda where there is one)")


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
        "basis": "operations over rates measured on this machine just now; the real thing is slower",
        "device": device,
        "matrix_flops_per_second": measured.matrix,
        "scan_flops_per_second": measured.scan,
        "seconds_per_image_and_evaluation": step,
        "sampled_images_per_second": 1 / (_EVALUATIONS * step),
        "trained_images_per_second": 1 / (3 * step),
    }
    return asdict(summary) | {"guess": guess}, [*summary.lines(), *_guess_lines(guess)]


_EVALUATIONS = 25  # of the sampler's default, ab3 in 24 steps, without guidance


def _guess_lines(guess: dict[str, Any]) -> list[str]:
    matrix, scan = (guess[f"{part}_flops_per_second"] / 1e9 for part in ("matrix", "scan"))
    return [
        f"speed on this machine's {guess['device']}, float32: a guess, and the real thing is slower",
        f"  from the operations above at {matrix:,.0f} (products) and {scan:,.1f} (scans) GFLOP/s, timed just now",
        f"  one evaluation of one image      {guess['seconds_per_image_and_evaluation']:.3g} s",
        f"  sampling, {_EVALUATIONS} evaluations         {guess['sampled_images_per_second']:.3g} images a second",
        f"  training, backward twice forward {guess['trained_images_per_second']:.3g} images a second",
    ]


def _add_doctor(commands: Any) -> None:
    about = (
        "Versions, devices, whether the compiled scan loads, which scan backend runs and why, and the optional\n"
        "packages. Put its output into a bug report."
    )
    _add(commands, "doctor", _doctor, "versions, devices, which scan backend runs and why", about, "", "--json")


def _doctor(arguments: argparse.Namespace) -> Answer:
    import torch

    from ssmgen import __version__
    from ssmgen.ops import backends
    from ssmgen.precision import Choice

    report = backends()
    precision = _precision()
    extension = {"loads": report["cpu"].available, "detail": report["cpu"].detail}
    facts: dict[str, Any] = {
        "ssmgen": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "compiled_scan": extension,
        "precision": precision,
        "backends": {name: asdict(status) for name, status in report.items()},
        "packages": {package: _version(package) for package in OPTIONAL},
    }
    lines = [
        f"ssmgen {__version__}, Python {facts['python']}, {facts['platform']}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        *(_devices() or ["no CUDA device"]),
        f"compiled scan: {'loads' if extension['loads'] else 'does not load'} ({extension['detail']})",
        f"auto on {precision['device']} takes {Choice(**precision['auto'])}",
        "",
        "scan backends (selective_scan takes the one marked auto):",
    ]
    for name, status in report.items():
        auto = f"auto on {', '.join(status.auto_for)}"
        mark = auto if status.auto_for else "ready" if status.available else "missing"
        lines.append(f"  {name:<10} {mark:<12} {status.detail}")
    lines += ["", "optional packages:"]
    for package, (extra, purpose) in OPTIONAL.items():
        version = facts["packages"][package]
        fix = "" if version else f": pip install 'ssmgen[{extra}]'"
        lines.append(f"  {package:<15} {version or 'missing':<12} {purpose}{fix}")
    return facts, lines


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


def _add_bench(commands: Any) -> None:
    about = (
        "Times selective_scan and one SISMA block with each scan backend that runs here, for some seconds: in one\n"
        "process, in turn, medians, and their ratio to the backend that 'auto' takes. Quote the ratios: single times\n"
        "move with the load of the machine. 'reference' is there for tests and is slow."
    )
    help = "time the scan and one block with each backend that runs here"
    examples = ("", "--tokens 1024 --dim 512 --rounds 5", "--device cuda --json")
    command = _add(commands, "bench", _bench, help, about, *examples)
    command.add_argument("--tokens", type=int, default=256, help="length of the sequence (default 256)")
    command.add_argument("--dim", type=int, default=256, help="width of the block (default 256)")
    command.add_argument("--batch", type=int, default=1, help="sequences at a time (default 1)")
    command.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    command.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")


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


def _add_export(commands: Any) -> None:
    about = (
        "Copy a trained model into a folder for ssmgen.MaskToImage, perhaps with smaller weights. SOURCE is such a\n"
        "folder, a model that comes with the package, or OWNER/NAME on the hub, which is then downloaded.\n"
        "A training run becomes such a folder by another command:\n"
        "  python -m recipes.sisma.export run=runs/quick out=exports/quick"
    )
    help = "copy a trained model into a folder, perhaps with 16-bit weights"
    examples = ("exports/quick small --dtype bfloat16", "OWNER/NAME faces", "OWNER/NAME faces --local-files-only")
    command = _add(commands, "export", _export, help, about, *examples)
    command.add_argument("source", metavar="SOURCE", help="folder, packaged model, or OWNER/NAME on the hub")
    command.add_argument("out", metavar="OUT", help="the folder to write; it must not be there yet")
    command.add_argument("--dtype", default="float32", help="of the weights: float32 (default), bfloat16 or float16")
    command.add_argument("--revision", help="branch, tag or commit on the hub")
    command.add_argument("--local-files-only", action="store_true", help="stay off the network")


def _export(arguments: argparse.Namespace) -> Answer:
    from ssmgen.pipeline import SAVED_DTYPES, MaskToImage

    source, out = Path(arguments.source).expanduser(), Path(arguments.out).expanduser()
    if arguments.dtype not in SAVED_DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(SAVED_DTYPES)}, got {arguments.dtype!r}")
    if out.exists():
        raise ValueError(f"{out} is there already: delete it or name another folder")
    if (source / "checkpoints").is_dir():
        command = shlex.join(["python", "-m", "recipes.sisma.export", f"run={source}", f"out={out}"])
        raise ValueError(f"{source} is a training run: {command}")
    pipe = MaskToImage.from_pretrained(
        arguments.source, revision=arguments.revision, local_files_only=arguments.local_files_only
    )
    pipe.save_pretrained(out, dtype=SAVED_DTYPES[arguments.dtype])
    size = (out / "model.safetensors").stat().st_size
    facts = {"out": str(out), "model": pipe.recipe.model, "dtype": arguments.dtype, "weight_bytes": size}
    return facts, [
        f"saved {out}: {pipe.recipe.model}, {arguments.dtype}, {size / 1e6:,.1f} MB of weights",
        f"use it: ssmgen.MaskToImage.from_pretrained({str(out)!r})",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
