"""``ssmgen export``: a trained model into a folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ssmgen.cli.command import Answer, add_command


def add(commands: Any) -> None:
    """Add the command."""
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


def _export(arguments: argparse.Namespace) -> Answer:
    from ssmgen.pipeline import SAVED_DTYPES, MaskToImage

    source, out = Path(arguments.source).expanduser(), Path(arguments.out).expanduser()
    if arguments.dtype not in SAVED_DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(SAVED_DTYPES)}, got {arguments.dtype!r}")
    if out.exists():
        raise ValueError(f"{out} exists already: delete it or name another folder")
    if (source / "checkpoints").is_dir():
        raise ValueError(f"{source} is a training run, not a pipeline folder: use its recipe's own export command")
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
