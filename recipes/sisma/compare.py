"""A run's pictures beside those of another model: ``python -m recipes.sisma.compare run=RUN [pipe=drawn-faces]``.

Writes ``compare.png`` into the run: unseen masks, what the run and the other model make of each, and the real image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from recipes.sisma.arguments import UsageError, from_command_line, run_command
from recipes.sisma.pairs import held_out_pairs
from recipes.sisma.pictures import save_mask_sheet
from recipes.sisma.runs import LoadedRun, check_writable, find_run, load_run
from ssmgen import MaskToImage
from ssmgen.data import CELEBAMASK19

_MASKS, _SAMPLES = 6, 2


@dataclass
class Settings:
    """Keys of the command line.

    Attributes:
        run: the run's folder, or ``hf://OWNER/NAME`` for one on the hub.
        pipe: the other model: packaged, a folder of recipes.sisma.export, or ``OWNER/NAME`` on the hub.
    """

    run: str = "runs/quick"
    pipe: str = "drawn-faces"


def main(argv: list[str]) -> None:
    """Load both, draw, write the picture."""
    settings = from_command_line(Settings(), argv)
    run = find_run(settings.run)
    loaded, pipe = load_run(run), MaskToImage.from_pretrained(settings.pipe)
    check_writable(run)
    file = run / "compare.png"
    compare(loaded, pipe, settings.pipe, file)
    print(f"picture: {file}, this run after {loaded.step} steps beside {settings.pipe} ({pipe.recipe.about})")


def compare(loaded: LoadedRun, pipe: MaskToImage, name: str, file: Path) -> None:
    """Draw both models' pictures of the same masks.

    Raises:
        UsageError: the models' images or classes are not the same.
    """
    size = loaded.config.image_size
    if (pipe.recipe.image_size, pipe.recipe.labels) != (size, CELEBAMASK19):
        raise UsageError(
            f"{name} makes images of {pipe.recipe.image_size} pixels from masks of {pipe.recipe.labels.name}, the run "
            f"of {size} from {CELEBAMASK19.name}: give pipe= another model"
        )
    pairs = held_out_pairs(loaded.config, _MASKS)
    real, masks = zip(*(pairs[i] for i in range(min(_MASKS, len(pairs)))), strict=True)
    seeds = list(range(len(masks) * _SAMPLES))
    ours = loaded.generate(torch.stack(masks).repeat_interleave(_SAMPLES, dim=0), seeds)
    theirs = (pipe(list(masks), seed=seeds, num_images=_SAMPLES, output_type="pt") * 255).round().to(torch.uint8)
    both = torch.cat([images.cpu().unflatten(0, (-1, _SAMPLES)) for images in (ours, theirs)], dim=1)
    save_mask_sheet(file, masks, list(both), real, CELEBAMASK19, ["this run"] * _SAMPLES + [name] * _SAMPLES)


if __name__ == "__main__":
    run_command(main)
