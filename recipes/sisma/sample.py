"""Generate images with a trained run: ``python -m recipes.sisma.sample run=RUN mask=FILE_OR_FOLDER out=FOLDER``.

    python -m recipes.sisma.sample run=runs/quick mask=face.png num_images=4 seed=7
    python -m recipes.sisma.sample run=runs/quick mask=masks/ out=faces/ solver=euler steps=50
    python -m recipes.sisma.sample run=runs/quick mask=parsed.png remap=bisenet19
    python -m recipes.sisma.sample run=runs/asked mask=face.png words="black hair" style=other.png style_mask=mask.png

Masks are read as `ssmgen.MaskToImage` reads them: they must have about the aspect ratio of the run's images, or of one
of its sizes, and a mask that seems to use the other order of classes causes a warning.

Several processes share the work: ``torchrun --nproc-per-node 4 -m recipes.sisma.sample ...`` writes the same images.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from recipes.sisma.arguments import UsageError, from_command_line, run_command
from recipes.sisma.image_names import check_mask_names, image_name
from recipes.sisma.runs import SamplingKeys, all_processes, check_writable, find_run, load_run, resized, sampling_of
from recipes.sisma.told import unknown_words
from ssmgen import MaskToImage
from ssmgen.data.files import files_with, stem_of, unreadable
from ssmgen.data.images import write_png
from ssmgen.noise import image_seeds

# Images of a mask per call of the model.
_BATCH = 16


@dataclass
class Settings(SamplingKeys):
    """Keys of the command line.

    Attributes:
        run: folder of a trained run, or ``hf://OWNER/NAME`` for a run on the hub.
        mask: a label PNG, or a folder of them.
        out: folder for the images, ``<mask's name>--<seed>.png``; existing ones are replaced, which is reported.
        palette: the label set of an RGB mask's colours if it is not the run's: ``bisenet19``.
        remap: the label set of a mask's ids if it is not the run's: ``bisenet19``.
        seed: of the first image of each mask, from 0 to 2**64 - 1; the next ones count up.
        num_images: images per mask.
        size: a side or height x width in pixels, such as ``192x96``, if the images are to have another size than the
            run's.
        words: for a run with ``words=true``: what all images are told.
        style: for a run with ``style=true`` or ``style=whole``: the picture whose colours all images get; PNG, JPEG,
            WebP or BMP.
        style_mask: its mask, a label PNG as for ``mask``; none with ``style=whole``.
    """

    run: str = "runs/quick"
    mask: str = ""
    out: str = "out"
    palette: str = ""
    remap: str = ""
    seed: int = 0
    num_images: int = 1
    size: str = ""
    words: str = ""
    style: str = ""
    style_mask: str = ""


def main(argv: list[str]) -> None:
    """Check all masks, then generate this process's share of their images."""
    settings = from_command_line(Settings(), argv)
    if settings.num_images < 1:
        raise UsageError(f"num_images must be at least 1, got {settings.num_images}")
    seeds = image_seeds(settings.seed, settings.num_images)
    files = mask_files(settings.mask)
    check_names(files, seeds)
    processes = all_processes()
    with processes.main_process_first():
        run = find_run(settings.run)
    pipe = resized(load_run(run)[0], settings.size)
    told = _told(pipe, settings)
    sampling = sampling_of(pipe, settings, ["mask", *(name for name in told if name in pipe.sampler.conditions)])
    with warnings.catch_warnings():
        if not processes.is_main_process:
            warnings.simplefilter("ignore")  # the first one has said it
        names = {"palette": settings.palette, "remap": settings.remap}
        masks = [pipe.label_maps(file, **names) for file in files]
        values = pipe.values_of(told, 1, **names)
    out = Path(settings.out)
    check_writable(out)
    if processes.is_main_process:
        report_replaced([out / f"{image_name(stem_of(file), seed)}.png" for file in files for seed in seeds])
    processes.wait_for_everyone()  # before any of them exists
    # Rounding depends on the shapes in a call, so the batches are the same for any number of processes.
    parts = [seeds[start : start + _BATCH] for start in range(0, len(seeds), _BATCH)]
    batches = [(file, mask, part) for file, mask in zip(files, masks, strict=True) for part in parts]
    for file, mask, part in batches[processes.process_index :: processes.num_processes]:
        settled = {"seed": part, "num_images": len(part), "output_type": "uint8", "sampling": sampling}
        images = pipe(mask, **settled, **values)
        for seed, image in zip(part, images, strict=True):
            target = out / f"{image_name(stem_of(file), seed)}.png"
            write_png(target, image)
            print(target, flush=True)
    processes.wait_for_everyone()


def _told(pipe: MaskToImage, settings: Settings) -> dict[str, str]:
    """What the model is told besides masks, by name; a `UsageError` for what it cannot be told."""
    told = {name: getattr(settings, name) for name in ("words", "style", "style_mask") if getattr(settings, name)}
    for name in told:
        owner = name.removesuffix("_mask")
        if owner not in pipe.sampler.conditions:
            raise UsageError(
                f"{name}= is for a run that was trained with {owner}=true, and {settings.run} takes "
                f"{' and '.join(pipe.sampler.conditions)} only"
            )
    if "words" in told and (unknown := unknown_words(told["words"])):
        found = ", ".join(map(repr, unknown))
        print(f"note: no training text had the words {found}, so they mean nothing to the model", file=sys.stderr)
    return told


def report_replaced(images: list[Path]) -> None:
    """Say on stderr how many images exist already: they are of the same masks and seeds, but perhaps of another run."""
    existing = [image for image in images if image.exists()]
    if existing:
        print(f"note: {len(existing)} of {len(images)} images exist and are replaced: {existing[0]}", file=sys.stderr)


def check_names(files: list[Path], seeds: list[int]) -> None:
    """A `ValueError` for masks whose images would share a name."""
    stems: dict[str, Path] = {}
    for file in files:
        stem = stem_of(file)
        if stem in stems:
            name = f"{image_name(stem, seeds[0])}.png"
            raise ValueError(f"{file} and {stems[stem].name} would both be sampled into {name}: rename one of them")
        stems[stem] = file
    check_mask_names(list(stems), seeds)


def mask_files(mask: str) -> list[Path]:
    """The files that ``mask=`` names.

    Raises:
        UsageError: it is empty.
        FileNotFoundError: no such file, or a folder without PNGs.
        ValueError: a PNG in the folder is no regular file, e.g. a FIFO.
    """
    if not mask:
        raise UsageError("mask= is missing: give a label PNG or a folder of them")
    path = Path(mask)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir() and (odd := unreadable(path, {".png"})):
        raise ValueError("\n".join(f"{file}: {reason}" for file, reason in odd))
    files = files_with(path, {".png"}) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path}: holds no .png files")
    return files


if __name__ == "__main__":
    run_command(main)
