"""A run's images beside those of another model: ``python -m recipes.sisma.compare run=RUN [pipe=drawn-faces]``.

Writes ``compare.png`` into the run: held-out masks, the images of both models, and the real images.
"""

from dataclasses import dataclass

import torch

from recipes.sisma.arguments import UsageError, from_command_line, run_command
from recipes.sisma.pairs import first_held_out
from recipes.sisma.runs import check_writable, find_run, load_run
from recipes.sisma.sheets import samples_of, save_mask_sheet
from ssmgen import MaskToImage
from ssmgen.pipeline import Recipe

_MASKS, _SAMPLES = 6, 2


@dataclass
class Settings:
    """Keys of the command line.

    Attributes:
        run: the run's folder, or ``hf://OWNER/NAME`` for a run on the hub.
        pipe: the other model: a packaged one, a folder of recipes.sisma.export, or ``OWNER/NAME`` on the hub.
    """

    run: str = "runs/quick"
    pipe: str = "drawn-faces"


def main(argv: list[str]) -> None:
    """Load both models, generate images of the same held-out masks, write the picture."""
    settings = from_command_line(Settings(), argv)
    run, name = find_run(settings.run), settings.pipe
    (pipe, trained), other = load_run(run), MaskToImage.from_pretrained(name)
    check_writable(run)
    ours, theirs = pipe.recipe, other.recipe
    if (theirs.image_size, theirs.labels) != (ours.image_size, ours.labels):
        raise UsageError(
            f"{name} makes images of {_sizes(theirs)} pixels from masks of {theirs.labels.name}, the run of "
            f"{_sizes(ours)} from {ours.labels.name}: give pipe= another model"
        )
    real, masks = first_held_out(trained.config, _MASKS)
    seeds = [[row * _SAMPLES + column for column in range(_SAMPLES)] for row in range(len(masks))]
    drawn = [samples_of(one, masks, seeds) for one in (pipe, other)]
    groups = [torch.cat(both) for both in zip(*drawn, strict=True)]
    file = run / "compare.png"
    save_mask_sheet(file, masks, groups, real, ours.labels, ["this run"] * _SAMPLES + [name] * _SAMPLES)
    print(f"picture: {file}, this run after {trained.step} steps beside {name} ({theirs.about})")


def _sizes(recipe: Recipe) -> str:
    return " or ".join(f"{height} x {width}" for height, width in recipe.sizes)


if __name__ == "__main__":
    run_command(main)
