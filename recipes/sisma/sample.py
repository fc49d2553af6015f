"""Turn masks into images with a trained run: ``python -m recipes.sisma.sample run=RUN mask=FILE_OR_FOLDER out=FOLDER``.

python -m recipes.sisma.sample run=runs/quick mask=face.png num_images=4 seed=7
python -m recipes.sisma.sample run=runs/quick mask=masks/ out=faces/ solver=euler steps=50
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recipes.sisma.arguments import UsageError, from_command_line, run_command
from recipes.sisma.runs import check_writable, find_run, load_run, sampling_settings
from ssmgen.data import CELEBAMASK19
from ssmgen.data.files import files_with
from ssmgen.data.images import read_mask, write_png
from ssmgen.data.transforms import center_crop_resize_mask
from ssmgen.model_folder import SAMPLING


@dataclass
class Settings:
    """Keys of the command line.

    Attributes:
        run: folder of a trained run, or ``hf://OWNER/NAME`` for one on the hub.
        mask: a label PNG, or a folder of them.
        out: folder for the images, ``<mask's name>-<seed>.png``.
        solver, steps, shift, guidance_scale, guidance_start: of `ssmgen.Sampler`; the run's own where not given.
        seed: of the first image of each mask; the next ones count up.
        num_images: images per mask.
    """

    run: str = "runs/quick"
    mask: str = ""
    out: str = "out"
    solver: str | None = None
    steps: int | None = None
    shift: float | None = None
    guidance_scale: float | None = None
    guidance_start: float | None = None
    seed: int = 0
    num_images: int = 1


def main(argv: list[str]) -> None:
    """Check all masks, then sample them."""
    settings = from_command_line(Settings(), argv)
    if settings.num_images < 1:
        raise UsageError(f"num_images must be at least 1, got {settings.num_images}")
    files = mask_files(settings.mask)
    loaded = load_run(find_run(settings.run))
    given = {name: getattr(settings, name) for name in SAMPLING}
    sampling = sampling_settings(loaded.config, loaded.model, given)
    size = loaded.config.image_size
    masks = [center_crop_resize_mask(read_mask(file, CELEBAMASK19), size) for file in files]
    out = Path(settings.out)
    check_writable(out)
    seeds = [settings.seed + i for i in range(settings.num_images)]
    for file, mask in zip(files, masks, strict=True):
        images = loaded.generate(mask.unsqueeze(0), seeds, **sampling)
        for seed, image in zip(seeds, images, strict=True):
            target = out / f"{file.stem}-{seed}.png"
            write_png(target, image)
            print(target)


def mask_files(mask: str) -> list[Path]:
    """The files a ``mask=`` names.

    Raises:
        UsageError: none was given.
        FileNotFoundError: no such file, or a folder without PNGs.
    """
    if not mask:
        raise UsageError("mask= is missing: give a label PNG or a folder of them")
    path = Path(mask)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = files_with(path, {".png"})
    if not files:
        raise FileNotFoundError(f"{path}: holds no .png files")
    return files


if __name__ == "__main__":
    run_command(main)
