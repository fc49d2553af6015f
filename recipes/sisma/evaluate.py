"""Measure a run or a folder of images: ``python -m recipes.sisma.evaluate run=RUN`` or ``images=FOLDER data=PREPARED``.

    python -m recipes.sisma.evaluate run=runs/quick
    python -m recipes.sisma.evaluate run=runs/paper masks=2000 fid=sdm-oasis lpips=true diversity_masks=2000 weights=DIR
    python -m recipes.sisma.evaluate images=faces data=prepared parser=runs/parser.safetensors
    torchrun --nproc-per-node 2 -m recipes.sisma.evaluate run=runs/quick

Writes ``result.json``, ``result.png`` and ``report.html`` into the run. A parser labels the generated images; their
agreement with the masks they were made from lies between a floor (the same images against other images' masks) and a
ceiling (the parser on real held-out images).

The images are kept in ``RUN/evaluation``: repeat the command after an interruption and it continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recipes.sisma.arguments import UsageError, command_line, from_command_line, run_command
from recipes.sisma.evaluation.image_folder import evaluate_images
from recipes.sisma.evaluation.settings import Settings
from recipes.sisma.evaluation.trained_run import evaluate_run
from recipes.sisma.runs import all_processes, find_run
from ssmgen.sampling import SETTINGS

_GENERATING = ("run", *SETTINGS, "samples", "diversity_masks", "seed", "batch_size", "micro_batch")


def main(argv: list[str]) -> None:
    """Evaluate a run or a folder of images from the command line."""
    settings = from_command_line(Settings(), argv)
    command = command_line("evaluate", *argv)
    processes = all_processes()
    if settings.images:
        _reject(argv, _GENERATING, "has no meaning for existing images")
        if processes.is_main_process:  # no images to generate, so nothing to share
            evaluate_images(Path(settings.images), settings, command=command)
        return
    _reject(argv, ("data", "out"), "needs images=FOLDER; a run knows its data and keeps its result")
    with processes.main_process_first():
        run = find_run(settings.run)
    evaluate_run(run, settings, command=command, processes=processes)


def _reject(argv: Sequence[str], keys: Sequence[str], why: str) -> None:
    """Reject keys that would have no effect."""
    for word in argv:
        key = word.partition("=")[0]
        if key in keys:
            raise UsageError(f"{key}= {why}")


if __name__ == "__main__":
    run_command(main)
