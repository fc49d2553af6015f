"""Export a run as a folder for `ssmgen.MaskToImage`: ``python -m recipes.sisma.export run=RUN out=FOLDER``.

    python -m recipes.sisma.export run=runs/quick out=exports/quick
    python -m recipes.sisma.export run=runs/faces out=exports/faces hub=OWNER/NAME
    python -m recipes.sisma.export run=runs/drawn out=ssmgen/pretrained/drawn-faces name=drawn-faces

The folder holds the averaged weights, the autoencoder, the settings, and a model card with the run's evaluation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from recipes.sisma.arguments import UsageError, command_line, flat, from_command_line, run_command
from recipes.sisma.evaluation.results import summary
from recipes.sisma.prepare.readers import FACE_ORDERS
from recipes.sisma.presets import PRESETS, Config, Presets, preset
from recipes.sisma.reading import read_json
from recipes.sisma.runs import Trained, check_writable, find_run, load_run, load_source
from ssmgen import MaskToImage
from ssmgen.atomic import check_space
from ssmgen.data import CELEBAMASK19, LabelSet
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
    "unknown": (
        "other",
        "Unknown: neither the run nor a prepared folder tells what it was trained on. The weights fall under the terms "
        "of those pictures; those of CelebAMask-HQ are for non-commercial research only.",
    ),
}
_ABOUT = {
    "drawn": "faces drawn by a program, not photographs",
    "CelebAMask-HQ": "CelebAMask-HQ or a folder like it",
    "own": "pictures with classes of their own",
    "unknown": "pictures of an unrecorded source",
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


def main(argv: list[str], presets: Presets = PRESETS, recipe: str = "recipes.sisma") -> None:
    """Load the run, upload it if requested, write the folder.

    Args:
        argv: the command line, see `Settings`.
        presets: those of the recipe by name.
        recipe: the recipe's package; runs of others are rejected.
    """
    settings = from_command_line(Settings(), argv)
    out, run = Path(settings.out), find_run(settings.run)
    if out.exists():
        raise UsageError(f"out={out} already exists: delete it or name another folder")
    if settings.dtype not in SAVED_DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(SAVED_DTYPES)}, got {settings.dtype}")
    pipe, trained = load_run(run)
    if (its := trained.config.recipe) != recipe:
        raise UsageError(f"{run}: is a run of {its}: export it with python -m {its}.export")
    check_writable(out.parent)
    dtype = SAVED_DTYPES[settings.dtype]
    check_space(out, weights_size(pipe, dtype or torch.float32))
    origin = origin_of(load_source(run, trained.config), pipe.recipe.labels)
    what = _ABOUT[origin]
    about = f"Trained on {what}, {trained.config.image_size} pixels, for {trained.step} steps."
    pipe.recipe = replace(pipe.recipe, about=settings.about or about)
    card = run_card(pipe, trained, origin, _result(run, trained.step), presets)
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


def origin_of(source: dict[str, Any], labels: LabelSet) -> str:
    """Which data a run was trained on, a key of the terms on its card: drawn, CelebAMask-HQ, own or unknown.

    Args:
        source: how the data were prepared, see `recipes.sisma.runs.load_source`; empty if that is not known.
        labels: the classes of the run's masks. Those of CelebAMask-HQ may have been merged into them.
    """
    if source.get("layout") == "drawn":
        return "drawn"
    merged = source.get("merged") or {}
    before = {name for names in merged.values() for name in names} or set(labels.classes)
    faces = before == set(CELEBAMASK19.classes) or source.get("label_order") in FACE_ORDERS
    if faces or source.get("layout") == "official":
        return "CelebAMask-HQ"
    return "own" if "label_order" in source else "unknown"


def run_card(
    pipe: MaskToImage, trained: Trained, origin: str, result: dict[str, Any], presets: Presets = PRESETS
) -> str:
    """README.md of the folder: what the model is, how to use it, its evaluation, and its license by `origin_of`."""
    license, data = _TERMS[origin]
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
            words += _words_of(key, value, plain[key])
        elif key in ("data", "autoencoder_source", "parser") and Path(str(value)).exists():
            words.append(f"{key}=...")
        else:
            words.append(f"{key}={value}")
    return command_line("train", config.preset, *words, recipe=config.recipe)


def _words_of(key: str, value: Mapping[str, Any], before: Any) -> list[str]:
    """The words for what differs in a mapping: ``key.name=one``, and deeper where a value is a mapping itself."""
    before = before if isinstance(before, Mapping) else {}  # one number, or one for each condition
    words = []
    for name, one in value.items():
        if isinstance(one, Mapping) and one:
            words += _words_of(f"{key}.{name}", one, before.get(name))
        elif before.get(name) != one:
            words.append(f"{key}.{name}={one}")
    return words


def sampling_words(sampling: Mapping[str, Any]) -> list[str]:
    """The ``key=value`` words of settings of sampling; of a setting by condition, ``key.condition=value``."""
    words = []
    for key, value in sampling.items():
        each = {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, Mapping) else {key: value}
        words += [f"{name}={one}" for name, one in each.items()]
    return words


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
    words = [f"masks={result['masks']}", *sampling_words(result["sampling"])]
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


if __name__ == "__main__":
    run_command(main)
