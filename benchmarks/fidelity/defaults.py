"""What each setting of the presets `quick` and `faces` stands on; models and `paper` have docs/paper.md.

A test wants an entry for every setting in which one of the two differs from a run's defaults.
"""

from __future__ import annotations

from typing import Any

from recipes.sisma.arguments import flat
from recipes.sisma.presets import Config, preset

PRESETS = ("quick", "faces")
#: What names a run or its data and is no choice among better and worse.
NAMES = ("preset", "run", "data", "parser", "autoencoder_source", "evaluate_masks", "sample_every", "lr_decay_steps")
STANDS_ON = {
    "model": "`simplest`: sisma2 is level or a little lower in `quick`; sizes were not compared; four states: `design`",
    "model_args.ffn_ratio": "not varied",
    "model_args.gates": "`design`, and level in `faces`",
    "model_args.dim": "a small network for a small set; sizes were not compared",
    "model_args.depth": "a small network for a small set; sizes were not compared",
    "model_args.patch_size": "a token per 8 x 8 pixels, so that eyes and earrings have their own; not compared",
    "model_args.mask_input": "`mask-entry`: level with adding or concatenating alone; `ways-in`: nothing beats adding",
    "model_args.mask_dropout": "guidance needs it; not varied",
    "flip": "a small set; not varied",
    "crops": "a small set; not varied",
    "balance": "`design`: 0.5 level with 1, 0 lower, within the spread; `faces`: 1 gives no gain",
    "class_weighting": "`design`: lower without both it and balance; not varied alone",
    "mirrored_weighting": "`sides`; lower agreement in `quick`; in `faces` not varied",
    "optimizer": "`design`",
    "lr": "`design`: half of it is lower, twice it is no better",
    "t_sampling": "`design`",
    "precision": "speed: bf16 if the machine is faster with it; not compared",
    "steps": "`training-time`; `quick` takes the steps that fit in its minutes, 400 to 1,300",
    "minutes": "`make demo` within nine minutes on two AVX2 cores",
    "ema_decay": "not varied",
    "solver_steps": "`sampling`",
    "guidance_scale": "`sampling`",
    "guidance_start": "`sampling`: level, at a lower cost",
    "shared_noise": "`alike`: left and right agree more, at no cost; in `faces` not varied",
}


def chosen(name: str) -> dict[str, Any]:
    """The settings in which a preset differs from what a run has where nothing is said, names left out."""
    plain, own = _flat(Config()), _flat(preset(name))
    return {key: value for key, value in own.items() if value != plain.get(key) and key not in NAMES}


def rows() -> list[list[str]]:
    """Setting, its value in each preset, what it stands on."""
    presets = [_flat(preset(name)) for name in PRESETS]
    return [[f"`{key}`", *(str(own.get(key, "-")) for own in presets), why] for key, why in STANDS_ON.items()]


def _flat(config: Config) -> dict[str, Any]:
    settings = flat(config)
    arguments = {f"model_args.{key}": value for key, value in settings.pop("model_args").items()}
    return settings | arguments
