"""Run folders: settings, weights, and a run loaded as a `ssmgen.MaskToImage`."""

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from recipes.sisma.arguments import UsageError, from_file
from recipes.sisma.pairs import load_autoencoder
from recipes.sisma.presets import Config, checked_size, size_of
from recipes.sisma.reading import read_json, read_yaml
from recipes.sisma.told import text_encoders, told_arguments, told_sampling
from ssmgen import MaskToImage, Sampling, build
from ssmgen.atomic import disk_error, write_text
from ssmgen.data import CELEBAMASK19, LabelSet
from ssmgen.extras import require
from ssmgen.hub import HUB_ID, download_folder
from ssmgen.pipeline import Recipe
from ssmgen.sampling import SETTINGS
from ssmgen.training import CheckpointError, newest_checkpoint, read_average, read_manifest, read_state, schedule_of
from ssmgen.training.launch import PATIENCE, check_launch, on_cpu
from ssmgen.training.watchdog import watch_ranks
from ssmgen.weights import REPLACED, count_values, limit_parameters, load_weights

_LABELS, _SOURCE = "labels.json", "source.json"
#: What a run records of how its data were prepared: not the names of their files.
_RECORDED = ("layout", "label_order", "merged")
_BYTES_TO_TRAIN = 16  # float32: weight, gradient, and AdamW's two moments


@dataclass(frozen=True)
class Trained:
    """What is known about the training of a run.

    ``weights`` is the SHA-256 of the averaged weights' file, ``schedule`` is from `ssmgen.training.schedule_of`.
    """

    config: Config
    step: int
    seconds: float
    weights: str
    schedule: list[dict[str, int]]


def load_run(run: Path) -> tuple[MaskToImage, Trained]:
    """Load the averaged weights of a run's newest checkpoint as a pipeline, on CUDA if available.

    Raises:
        FileNotFoundError: ``run`` is not a run folder, or has no checkpoint yet.
        CheckpointError: the newest checkpoint is damaged, or was trained with another autoencoder.
    """
    config, labels = load_config(run), load_labels(run)
    newest = newest_checkpoint(run)
    state, autoencoder = read_state(newest), load_autoencoder(config)
    trained_with, given = state.get("record", {}).get("autoencoder"), autoencoder.describe()
    if trained_with != given:
        raise CheckpointError(
            f"{newest}: trained on latents of {trained_with}, but {config.autoencoder_source} is {given}: "
            "give back the autoencoder it was trained with"
        )
    weights = newest / "ema.safetensors"
    held = count_values(weights)
    too_large = f"{run / 'config.yaml'}: its model has more parameters than the {held:,} in {weights}"
    with limit_parameters(REPLACED * held, too_large):
        model = build(config.model, **model_arguments(config, autoencoder, labels))
    load_weights(model, weights, read_average(newest)[0])
    digest = read_manifest(newest).files["ema.safetensors"].sha256
    schedule = schedule_of(state, config.train.lr_decay_steps)
    pipe = as_pipeline(config, model, autoencoder, labels, f"A run after {state['step']} steps of training.")
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    return pipe, Trained(config, state["step"], state.get("seconds", 0.0), digest, schedule)


def new_model(config: Config, autoencoder: Any, labels: LabelSet = CELEBAMASK19) -> nn.Module:
    """The untrained model of a run, for its autoencoder's channels and factor and the classes of its masks.

    Raises:
        ValueError: float32 weights, gradients and AdamW's two moments would not fit the memory of this machine.
    """
    memory = _machine_memory()
    most = memory // _BYTES_TO_TRAIN
    too_large = (
        f"{config.model} with model_args {dict(config.model_args)} does not fit this machine: training takes "
        f"{_BYTES_TO_TRAIN} bytes a parameter, and {memory / 2**30:,.1f} GiB of memory hold {most:,} parameters at "
        "most. Use a smaller dim or depth"
    )
    arguments = model_arguments(config, autoencoder, labels)
    with limit_parameters(most, too_large), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the real model gives the same ones
        build(config.model, **arguments)  # takes no memory and draws no number
    return cast(nn.Module, build(config.model, **arguments))


def _machine_memory() -> int:
    """Bytes of main memory and of all CUDA devices; shards of a model may lie on several of these."""
    devices = range(torch.cuda.device_count())
    main: int = require("psutil", extra="train").virtual_memory().total
    return main + sum(torch.cuda.get_device_properties(i).total_memory for i in devices)


def model_arguments(config: Config, autoencoder: Any, labels: LabelSet = CELEBAMASK19) -> dict[str, Any]:
    """The arguments a run's model is built with; a `ValueError` if ``model_args`` sets one that is not free."""
    fixed = {"in_channels": autoencoder.channels, "mask_scale": autoencoder.factor, "num_classes": len(labels)}
    taken = sorted(fixed.keys() & config.model_args.keys())
    if taken:
        raise ValueError(f"model_args.{taken[0]} follows from the autoencoder and the labels: leave it out")
    return fixed | config.model_args | told_arguments(config)


def as_pipeline(
    config: Config, model: nn.Module, autoencoder: Any, labels: LabelSet = CELEBAMASK19, about: str = ""
) -> MaskToImage:
    """A pipeline around a run's model, which is put into evaluation mode and takes no more gradients."""
    recipe = Recipe(
        model=config.model,
        model_args=model_arguments(config, autoencoder, labels),
        autoencoder=autoencoder.name,
        image_size=config.size,
        labels=labels,
        sampling=told_sampling(config.sampling, model),
        objective=config.objective,
        about=about,
        text_encoders=text_encoders(config),
    )
    return MaskToImage(model, autoencoder, recipe)


def resized(pipe: MaskToImage, size: str) -> MaskToImage:
    """The pipeline for images of a ``size=`` of the command line, such as ``192x96``; empty keeps its own.

    Raises:
        UsageError: not one size.
        ValueError: not a multiple of what the model needs.
    """
    if not size:
        return pipe
    if "," in size:
        raise UsageError(f"size={size}: give one size, such as 192x96")
    return pipe.resized(size_of(checked_size(size)))


@dataclass
class SamplingKeys:
    """Keys of a command that samples a run.

    Attributes:
        solver, steps, shift: of `ssmgen.Sampling`; the run's own where None.
        guidance_scale, guidance_start: of all conditions, or by condition, such as ``guidance_scale.words=3``; the
            run's own where none is given.
        shared_noise: of `ssmgen.Sampling`; the run's own where None.
    """

    solver: str | None = None
    steps: int | None = None
    shift: float | None = None
    guidance_scale: Any = None
    guidance_start: Any = None
    shared_noise: bool | None = None


def sampling_of(pipe: MaskToImage, keys: SamplingKeys, given: Sequence[str] = ("mask",)) -> Sampling:
    """The sampling settings of a run, replaced by those of ``keys`` that are not None.

    Args:
        pipe: the run.
        keys: the settings given.
        given: names of the conditions that have a value.

    Raises:
        ValueError: a value out of range, an unknown solver, or guidance of a condition without dropout or value.
    """
    own = pipe.recipe.sampling.for_values(given, pipe.model.conditions)
    settings = {name: _merged(getattr(own, name), getattr(keys, name)) for name in SETTINGS}
    sampling = own.replaced(**settings)
    sampling.guidances(list(given), pipe.model.conditions)
    return sampling


def _merged(own: Any, given: Any) -> Any:
    """A setting that may be one by condition: a mapping replaces those of a run's own that it names, a number all."""
    return {**own, **given} if isinstance(own, Mapping) and isinstance(given, Mapping) else given


def check_writable(folder: Path) -> None:
    """Create a folder if necessary; an `OSError` before the work, not after it, if files cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "is a file" if folder.is_file() else f"cannot be written to ({error.strerror})"
        raise disk_error(f"{folder}: {reason}; choose another folder", error.errno) from error


def save_config(config: Config, file: Path) -> None:
    """Write the resolved settings as YAML."""
    write_text(file, require("omegaconf", extra="train").OmegaConf.to_yaml(config))


def save_labels(labels: LabelSet, run: Path) -> None:
    """Record the classes of a run's masks, so that it can be loaded where its data are not."""
    write_text(run / _LABELS, json.dumps(asdict(labels), indent=1, ensure_ascii=False) + "\n")


def save_source(config: Config, run: Path) -> None:
    """Record how a run's data were prepared, which tells their terms when they are no longer there."""
    write_text(run / _SOURCE, json.dumps(_prepared_source(config), indent=1, ensure_ascii=False) + "\n")


def load_source(run: Path, config: Config) -> dict[str, Any]:
    """How a run's data were prepared: ``layout``, ``label_order`` and ``merged``, each if known.

    A run that began before this was recorded takes it from its prepared folder if that still exists.

    Raises:
        ValueError: a record is damaged; names the file.
    """
    file = run / _SOURCE
    return _checked_source(read_json(file), file) if file.is_file() else _prepared_source(config)


def _prepared_source(config: Config) -> dict[str, Any]:
    """The part of the record of a run's prepared folder that a run keeps; empty if the folder is not there."""
    if config.data == "drawn":
        return {"layout": "drawn"}
    file = Path(config.data) / "prepared.json"
    if not config.data or not file.is_file():
        return {}
    return _checked_source(read_json(file).get("source"), file)


def _checked_source(source: Any, file: Path) -> dict[str, Any]:
    found = {key: source[key] for key in _RECORDED if key in source} if isinstance(source, dict) else None
    merged = {} if found is None else found.get("merged", {})
    if found is None or not isinstance(merged, dict) or not all(isinstance(names, list) for names in merged.values()):
        raise ValueError(f"{file}: is not the record of how data were prepared")
    return found


def load_labels(run: Path) -> LabelSet:
    """The classes of a run's masks; those of celebamask19 for a run that began before they were recorded.

    Raises:
        FileNotFoundError: a later run has lost the file.
        ValueError: the file is damaged; names it.
    """
    file = run / _LABELS
    if not file.is_file():
        if "recipe" in read_yaml(run / "config.yaml")[0]:  # recorded since the classes are
            raise FileNotFoundError(
                f"{file}: not found, so the classes of the run's masks are not known: restore it, or continue the "
                "training, which writes it again"
            )
        return CELEBAMASK19
    try:
        return LabelSet.from_stored(read_json(file))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: is not the record of a label set ({error})") from error


def load_config(run: Path) -> Config:
    """The settings of a run; a `FileNotFoundError` if ``run`` is not a run folder."""
    file = run / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; {run} is not a run folder of recipes.sisma.train")
    return from_file(Config(), file)


def find_run(name: str, copies: Path = Path("runs/hub")) -> Path:
    """The folder of a run: ``name`` itself, or for ``hf://OWNER/NAME`` a copy of the files needed to load it.

    Raises:
        FileNotFoundError: the repository does not exist, or there is neither a network nor a local copy.
        ValueError: ``hf://`` is not followed by an owner and a name.
    """
    if not name.startswith("hf://"):
        return Path(name)
    repository = name.removeprefix("hf://")
    if not HUB_ID.fullmatch(repository):
        raise ValueError(f"{name}: expected hf://OWNER/NAME")
    return download_folder(
        repository, ["config.yaml", _LABELS, _SOURCE, "checkpoints/*"], folder=copies / repository.replace("/", "--")
    )


def all_processes() -> Any:
    """accelerate's `PartialState`: which of torchrun's processes this one is. From here on they watch each other.

    Raises:
        ValueError: the environment asks for a sharded model.
    """
    check_launch()
    watch_ranks()  # first: a rank may fail while the others wait for it
    # Without a GPU it must be told so, or every process considers itself the only one. The others wait for up to a day,
    # because the first one may encode images for hours; the watchdog ends the job if it dies or is stopped.
    return require("accelerate", extra="train").PartialState(cpu=on_cpu(), timeout=PATIENCE)
