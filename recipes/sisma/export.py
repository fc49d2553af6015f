"""Make a folder for `ssmgen.MaskToImage` of a run: ``python -m recipes.sisma.export run=RUN out=FOLDER``.

    python -m recipes.sisma.export run=runs/quick out=exports/quick
    python -m recipes.sisma.export run=runs/faces out=exports/faces hub=OWNER/NAME

Holds the averaged weights, the autoencoder, the settings, and a model card with what the run's evaluation measured.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes.sisma.arguments import UsageError, from_command_line, run_command
from recipes.sisma.presets import Config, preset
from recipes.sisma.runs import LoadedRun, check_writable, find_run, load_run, model_arguments
from ssmgen import MaskToImage
from ssmgen.data import CELEBAMASK19
from ssmgen.pipeline import Recipe


@dataclass
class Settings:
    """Keys of the command line.

    Attributes:
        run: the run's folder, or ``hf://OWNER/NAME`` for one on the hub.
        out: the folder to write; it must not be there yet.
        hub: also upload it to this repository, ``OWNER/NAME``.
        about: a line on what the model can do; one is written where it is empty.
    """

    run: str = "runs/quick"
    out: str = "exports/quick"
    hub: str = ""
    about: str = ""


def main(argv: list[str]) -> None:
    """Load the run, write the folder, upload it if asked to."""
    settings = from_command_line(Settings(), argv)
    out, run = Path(settings.out), find_run(settings.run)
    if out.exists():
        raise UsageError(f"out={out} is there already: delete it or name another folder")
    loaded = load_run(run)
    check_writable(out)
    pipe = as_pipeline(loaded, settings.about or _about(loaded))
    pipe.save_pretrained(out)
    card = model_card(loaded, pipe, _result(run))
    out.joinpath("README.md").write_text(card)
    print(f"saved {out}; use it: ssmgen.MaskToImage.from_pretrained({str(out)!r})")
    if settings.hub:
        print(pipe.push_to_hub(settings.hub, card=card))


def as_pipeline(loaded: LoadedRun, about: str) -> MaskToImage:
    """A run as the pipeline that serves it."""
    config = loaded.config
    recipe = Recipe(
        model=config.model,
        model_args=model_arguments(config, loaded.autoencoder),
        autoencoder=config.autoencoder,
        image_size=config.image_size,
        labels=CELEBAMASK19,
        sampling={
            "solver": config.solver,
            "steps": config.solver_steps,
            "shift": config.shift,
            "guidance_scale": config.guidance_scale,
        },
        about=about,
    )
    return MaskToImage(loaded.model, loaded.autoencoder, recipe)


def model_card(loaded: LoadedRun, pipe: MaskToImage, result: dict[str, Any]) -> str:
    """README.md of the folder: what it is, how to use it, what was measured, under which terms."""
    drawn = loaded.config.data == "drawn"
    terms = "apache-2.0" if drawn else "other"
    data = (
        "Faces drawn by the library itself; Apache-2.0."
        if drawn
        else "CelebAMask-HQ or a folder like it. CelebAMask-HQ is for non-commercial research only, and weights "
        "trained on it fall under the same terms."
    )
    size, labels = pipe.recipe.image_size, pipe.recipe.labels
    return f"""---
library_name: ssmgen
license: {terms}
tags: [mamba, state-space-model, flow-matching, semantic-image-synthesis]
---

# {loaded.config.model}, {size} x {size}

{pipe.recipe.about}

```python
from ssmgen import MaskToImage

pipe = MaskToImage.from_pretrained("OWNER/NAME")  # this folder or repository
pipe("mask.png", seed=0)[0].save("face.png")
```

Masks have {len(labels)} classes in the order {labels.name}: {", ".join(labels.classes)}.

## Data

{data}

## Training

`{training_command(loaded.config)}`: {loaded.step} steps in {loaded.seconds:.0f} s, weights averaged.

## Evaluation

{_table(result)}
"""


def training_command(config: Config) -> str:
    """The command that makes a run with these settings; where data and weights lay is left to its user."""
    words = []
    plain = asdict(preset(config.preset))
    for key, value in asdict(config).items():
        if key in ("run", "resume", "cache") or value == plain[key]:
            continue
        if isinstance(value, dict):
            words += [f"{key}.{name}={one}" for name, one in value.items() if plain[key].get(name) != one]
        elif key in ("data", "autoencoder_source", "parser") and Path(str(value)).exists():
            words.append(f"{key}=...")
        else:
            words.append(f"{key}={value}")
    return " ".join(["python -m recipes.sisma.train", config.preset, *words])


def _table(result: dict[str, Any]) -> str:
    if "mask_agreement" not in result:
        return "Not measured: `python -m recipes.sisma.evaluate` does."
    names = {
        "mask_agreement": "generated images against their masks",
        "floor": "the same against other masks",
        "ceiling": "real images",
        "autoencoder_ceiling": "real images after the autoencoder",
    }
    rows = [
        f"| {name} | {result[key]['miou']:.3f} | {result[key]['pixel_accuracy']:.3f} |" for key, name in names.items()
    ]
    words = " ".join(f"{key}={value}" for key, value in result["sampling"].items())
    return "\n".join(
        [
            f"`python -m recipes.sisma.evaluate masks={result['masks']} {words}`, unseen masks, commit "
            f"`{result['commit']}`, seed {result['seed']}:",
            "",
            "| | mIoU | pixel accuracy |",
            "|---|---|---|",
            *rows,
        ]
    )


def _result(run: Path) -> dict[str, Any]:
    file = run / "result.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _about(loaded: LoadedRun) -> str:
    what = "faces drawn by a program, not photographs" if loaded.config.data == "drawn" else "real faces"
    return f"Trained on {what}, {loaded.config.image_size} pixels, for {loaded.step} steps."


if __name__ == "__main__":
    run_command(main)
