"""Export a run as a folder for `ssmgen.MaskToImage`: ``python -m recipes.sisma.export run=RUN out=FOLDER``.

    python -m recipes.sisma.export run=runs/quick out=exports/quick
    python -m recipes.sisma.export run=runs/faces out=exports/faces hub=OWNER/NAME
    python -m recipes.sisma.export run=runs/drawn out=ssmgen/pretrained/drawn-faces name=drawn-faces

The folder holds the averaged weights, the autoencoder, the settings, and a model card with the run's evaluation.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from recipes.sisma.arguments import UsageError, command_line, flat, from_command_line, run_command
from recipes.sisma.evaluation.results import summary
from recipes.sisma.presets import PRESETS, Config, Presets, preset
from recipes.sisma.reading import read_json
from recipes.sisma.runs import Trained, check_writable, find_run, load_run
from ssmgen import MaskToImage
from ssmgen.atomic import check_space
from ssmgen.data import CELEBAMASK19
from ssmgen.pipeline import SAVED_DTYPES
from ssmgen.pipeline.card import NAME, model_card
from ssmgen.pipeline.values import examples_of
from ssmgen.training import schedule_changes

# The license lines of a card's metadata, and its section on the data.
_TERMS = {
    "drawn": ("apache-2.0", "Faces drawn by the library itself; Apache-2.0."),
    "CelebAMask-HQ": (
        "other\nlicense_name: celebamask-hq-non-commercial\n"
        "license_link: https://github.com/switchablenorms/CelebAMask-HQ",
        "CelebAMask-HQ or a folder like it. CelebAMask-HQ is for non-commercial research only, and weights trained on "
        "it fall under the same terms.",
    ),
    "own": ("other", "Pictures of its author's own choice: the weights fall under the terms of these."),
}
_ABOUT = {
    "drawn": "faces drawn by a program, not photographs",
    "CelebAMask-HQ": "CelebAMask-HQ or a folder like it",
    "own": "pictures with classes of their own",
}


@dataclass
class Settings:
    """Keys of the command line.

    Attributes:
        run: the run's folder, or ``hf://OWNER/NAME`` for a run on the hub.
        out: the folder to write; it must not exist yet.
        hub: also upload it to this repository, ``OWNER/NAME``.
        name: by which its card loads it; the repository's if empty.
        dtype: of the weights in the file: ``float32``, or ``float16`` or ``bfloat16`` for half the size.
        about: a line on what the model can do; written from the run's settings if empty.
    """

    run: str = "runs/quick"
    out: str = "exports/quick"
    hub: str = ""
    name: str = ""
    dtype: str = "float32"
    about: str = ""


def main(argv: list[str], presets: Presets = PRESETS) -> None:
    """Load the run, upload it if requested, write the folder; ``presets`` are those of the run's recipe."""
    settings = from_command_line(Settings(), argv)
    out, run = Path(settings.out), find_run(settings.run)
    if out.exists():
        raise UsageError(f"out={out} already exists: delete it or name another folder")
    if settings.dtype not in SAVED_DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(SAVED_DTYPES)}, got {settings.dtype}")
    pipe, trained = load_run(run)
    recipe = trained.config.recipe
    if trained.config.preset not in presets and recipe != "recipes.sisma":
        raise UsageError(f"{run}: is a run of {recipe}: export it with python -m {recipe}.export")
    check_writable(out.parent)
    dtype = SAVED_DTYPES[settings.dtype]
    check_space(out, weights_size(pipe, dtype or torch.float32))
    what = _ABOUT[_origin(pipe, trained)]
    about = f"Trained on {what}, {trained.config.image_size} pixels, for {trained.step} steps."
    pipe.recipe = replace(pipe.recipe, about=settings.about or about)
    card = run_card(pipe, trained, _result(run, trained.step), presets)
    pipe.card = card.replace(NAME, settings.name or settings.hub or NAME)
    # Upload first: if it fails, no folder is in the way of the next attempt.
    address = pipe.push_to_hub(settings.hub, dtype=dtype) if settings.hub else ""
    pipe.save_pretrained(out, dtype=dtype)
    print(f"saved {out}; use it: ssmgen.MaskToImage.from_pretrained({str(out)!r})")
    if address:
        print(address)


def weights_size(pipe: MaskToImage, dtype: torch.dtype) -> int:
    """Bytes of the weights in an exported folder, nearly all of its size."""
    own = sum(value.numel() * value.element_size() for value in pipe.autoencoder.state_dict().values())
    return own + sum(parameter.numel() for parameter in pipe.model.parameters()) * dtype.itemsize


def _origin(pipe: MaskToImage, trained: Trained) -> str:
    """A key of `_TERMS`."""
    if is_drawn(trained.config):
        return "drawn"
    return "CelebAMask-HQ" if pipe.recipe.labels.classes == CELEBAMASK19.classes else "own"


def run_card(pipe: MaskToImage, trained: Trained, result: dict[str, Any], presets: Presets = PRESETS) -> str:
    """README.md of the folder: what the model is, how to use it, its evaluation, and its license."""
    license, data = _TERMS[_origin(pipe, trained)]
    recipe, command = pipe.recipe, training_command(trained.config, presets)
    training = [f"`{command}`: {trained.step} steps in {trained.seconds:.0f} s, weights averaged."]
    training += [f"{change.capitalize()}." for change in schedule_changes(trained.schedule)]
    sections = {"Data": data, "Training": " ".join(training), "Evaluation": _evaluation(result)}
    more = {"license": license, "sections": sections, "told": examples_of(pipe.sampler.conditions)}
    return model_card(recipe.title, recipe.about, recipe.labels, **more)


def training_command(config: Config, presets: Presets = PRESETS) -> str:
    """The command that trains a run with these settings; paths of data and weights are left open."""
    words = []
    plain = flat(preset(config.preset, presets))
    for key, value in flat(config).items():
        if key in ("run", "resume", "cache", "rebuild_cache") or value == plain[key]:
            continue
        if isinstance(value, dict):
            words += [f"{key}.{name}={one}" for name, one in value.items() if plain[key].get(name) != one]
        elif key in ("data", "autoencoder_source", "parser") and Path(str(value)).exists():
            words.append(f"{key}=...")
        else:
            words.append(f"{key}={value}")
    return command_line("train", config.preset, *words, recipe=config.recipe)


def _evaluation(result: dict[str, Any]) -> str:
    if "mask_agreement" not in result:
        return "Not measured: `python -m recipes.sisma.evaluate` does."
    names = {
        "mask_agreement": "generated images against their masks",
        "floor": "the same against other masks",
        "ceiling": "real images",
        "autoencoder_ceiling": "real images after the autoencoder",
    }
    found = [(name, result[key]) for key, name in names.items() if key in result]
    rows = [f"| {name} | {figures['miou']:.3f} | {figures['pixel_accuracy']:.3f} |" for name, figures in found]
    words = [f"masks={result['masks']}", *(f"{key}={value}" for key, value in result["sampling"].items())]
    origin = (
        f"`{command_line('evaluate', 'run=RUN', *words)}`, unseen masks, commit `{result['commit']}`, "
        f"seed {result['seed']}, {result['hardware']['processor']}, torch {result['versions']['torch']}:"
    )
    lines = [f"- {line}" for line in summary(result).splitlines()]
    return "\n".join([origin, "", "| | mIoU | pixel accuracy |", "|---|---|---|", *rows, "", *lines])


def _result(run: Path, step: int) -> dict[str, Any]:
    """The result of these weights' evaluation; empty if there is none, or only one of another step."""
    file = run / "result.json"
    result = read_json(file) if file.is_file() else {}
    return result if result.get("steps") == step else {}


def is_drawn(config: Config) -> bool:
    """Whether a run was trained on drawn faces, or on a folder prepared from them that still exists."""
    if config.data == "drawn":
        return True
    file = Path(config.data) / "prepared.json"
    source = read_json(file).get("source") if file.is_file() else {}
    return isinstance(source, dict) and source.get("layout") == "drawn"


if __name__ == "__main__":
    run_command(main)
