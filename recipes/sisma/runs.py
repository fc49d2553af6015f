"""What a run folder holds and how it is read back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.sisma.pairs import load_autoencoder
from recipes.sisma.pictures import to_uint8
from recipes.sisma.presets import Config
from ssmgen import MaskToImage, build, initial_noise, sample
from ssmgen.atomic import write_text
from ssmgen.data import CELEBAMASK19
from ssmgen.extras import require
from ssmgen.hub import HUB_ID, download_folder
from ssmgen.pipeline import SAMPLING, Recipe, check_sampling
from ssmgen.training import (
    CheckpointError,
    check_launch,
    checkpoints,
    on_cpu,
    read_average,
    schedule_of,
    verify_checkpoint,
)
from ssmgen.weights import load_weights


@dataclass
class LoadedRun:
    """A trained run: its settings, averaged weights and autoencoder, and after how many steps and seconds they are.

    ``weights`` is the SHA-256 of the file the averaged weights are read from, ``schedule`` which ``lr_decay_steps`` the
    learning rate followed from which step on (`ssmgen.training.schedule_of`).
    """

    config: Config
    model: nn.Module
    autoencoder: Any
    step: int
    seconds: float
    weights: str
    schedule: list[dict[str, int]]

    @torch.no_grad()
    def generate(self, masks: Tensor, seeds: list[int], **settings: Any) -> Tensor:
        """One image per seed, uint8 ``(len(seeds), 3, size, size)``; see `generate`."""
        return generate(self.model, self.autoencoder, self.config, masks, seeds, **settings)


def new_model(config: Config, autoencoder: Any) -> nn.Module:
    """The untrained model of a run, for its autoencoder's channels and factor and the 19 face classes."""
    return build(config.model, **model_arguments(config, autoencoder))


def model_arguments(config: Config, autoencoder: Any) -> dict[str, Any]:
    """What the model of a run is built with.

    Raises:
        ValueError: ``model_args`` holds what follows from the autoencoder or the labels.
    """
    fixed = {"in_channels": autoencoder.channels, "mask_scale": autoencoder.factor, "num_classes": len(CELEBAMASK19)}
    taken = sorted(fixed.keys() & config.model_args.keys())
    if taken:
        raise ValueError(f"model_args.{taken[0]} follows from the autoencoder and the labels: leave it out")
    return fixed | config.model_args


def latent_size(config: Config, autoencoder: Any) -> tuple[int, int, int]:
    """(channels, height, width) of a latent."""
    side = config.image_size // autoencoder.factor
    return autoencoder.channels, side, side


def sampling_settings(config: Config, model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """A run's own ``solver``, ``steps``, ``shift``, ``guidance_scale`` and ``guidance_start``, or those given.

    Args:
        config: of the run.
        model: of the run.
        given: settings by name; None is the run's own.

    Raises:
        ValueError: another setting, one out of range, no such solver, or guidance without mask dropout.
    """
    own = {name: getattr(config, "solver_steps" if name == "steps" else name) for name in SAMPLING}
    chosen = own | {name: value for name, value in given.items() if value is not None}
    check_sampling(chosen)
    if chosen["guidance_scale"] != 1 and not getattr(model, "mask_dropout", 0):
        raise ValueError(
            f"guidance_scale={chosen['guidance_scale']} needs a run trained with model_args.mask_dropout, e.g. 0.1"
        )
    return chosen


def as_pipeline(loaded: LoadedRun, about: str) -> MaskToImage:
    """A run as the pipeline that serves it."""
    config = loaded.config
    recipe = Recipe(
        model=config.model,
        model_args=model_arguments(config, loaded.autoencoder),
        autoencoder=loaded.autoencoder.name,
        image_size=config.image_size,
        labels=CELEBAMASK19,
        sampling=sampling_settings(config, loaded.model, {}),
        about=about,
    )
    return MaskToImage(loaded.model, loaded.autoencoder, recipe)


def generate(
    model: nn.Module,
    autoencoder: Any,
    config: Config,
    masks: Tensor,
    seeds: list[int],
    *,
    batch_size: int = 16,
    **sampling: Any,
) -> Tensor:
    """Images uint8 ``(len(seeds), 3, size, size)``, image i from ``masks[i]`` (or the only mask) and ``seeds[i]``.

    Raises:
        ValueError: what `sampling_settings` refuses.
    """
    settings = sampling_settings(config, model, sampling)
    images = []
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        latents = sample(
            model,  # type: ignore[arg-type]
            initial_noise(seeds[part], latent_size(config, autoencoder)),
            masks if len(masks) == 1 else masks[part],
            **settings,
        )
        images.append(to_uint8(autoencoder.decode(latents)))
    return torch.cat(images)


def check_writable(folder: Path) -> None:
    """Make a folder if need be, and find out now, not after the work, whether files can be written there.

    Raises:
        OSError: they cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".write-test-{os.getpid()}"
    probe.touch()
    probe.unlink()


def save_config(config: Config, file: Path) -> None:
    """Write the resolved settings as YAML."""
    write_text(file, require("omegaconf", extra="train").OmegaConf.to_yaml(config))


def load_config(run: Path) -> Config:
    """The settings of a run.

    Raises:
        FileNotFoundError: ``run`` is no run folder.
    """
    omegaconf = require("omegaconf", extra="train").OmegaConf
    file = run / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; {run} is no run folder of recipes.sisma.train")
    return omegaconf.to_object(omegaconf.merge(omegaconf.structured(Config), omegaconf.load(file)))


def find_run(name: str, copies: Path = Path("runs/hub")) -> Path:
    """The folder of a run: ``name`` itself, or for ``hf://OWNER/NAME`` a copy of that repository on the hub.

    Only what a run is read back from is fetched, into ``copies/OWNER--NAME``, where its evaluation then lies too.

    Raises:
        FileNotFoundError: no such repository, or no network and no copy of it yet.
        ValueError: ``hf://`` without an owner and a name.
    """
    if not name.startswith("hf://"):
        return Path(name)
    repository = name.removeprefix("hf://")
    if not HUB_ID.fullmatch(repository):
        raise ValueError(f"{name}: expected hf://OWNER/NAME")
    return download_folder(repository, ["config.yaml", "checkpoints/*"], folder=copies / repository.replace("/", "--"))


def all_processes() -> Any:
    """accelerate's `PartialState`: which of torchrun's processes this one is.

    Without being told that the CPU is meant, it takes each process of a machine without GPU for the only one. The
    others wait up to a day, as the first one may encode images for hours.

    Raises:
        ValueError: the environment asks for a model in shards.
    """
    check_launch()
    return require("accelerate", extra="train").PartialState(cpu=on_cpu(), timeout=timedelta(days=1))


def load_run(run: Path) -> LoadedRun:
    """Averaged weights of the newest checkpoint of a run, with what is needed to use them.

    Raises:
        FileNotFoundError: no run folder, or it has no checkpoint yet.
        CheckpointError: the checkpoint is damaged, or belongs to another autoencoder.
    """
    config = load_config(run)
    found = checkpoints(run / "checkpoints")
    if not found:
        raise FileNotFoundError(f"{run / 'checkpoints'}: no complete checkpoint; has the run reached checkpoint_every?")
    state = verify_checkpoint(found[-1])
    autoencoder = load_autoencoder(config)
    trained_with = state["record"]["autoencoder"]
    if trained_with != autoencoder.describe():
        raise CheckpointError(
            f"{found[-1]}: trained on latents of {trained_with}, but {config.autoencoder_source} is "
            f"{autoencoder.describe()}: give back the autoencoder it was trained with"
        )
    model = new_model(config, autoencoder)
    load_weights(model, found[-1] / "ema.safetensors", read_average(found[-1])[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    digest = json.loads((found[-1] / "MANIFEST.json").read_text())["ema.safetensors"]["sha256"]  # verified above
    schedule = schedule_of(state, config.lr_decay_steps)
    return LoadedRun(
        config, model.eval().to(device), autoencoder.to(device), state["step"], state["seconds"], digest, schedule
    )
