"""The folder of a trained model: settings, weights, autoencoder and card, on disk, in the package or on the hub."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ssmgen.atomic import whole_folder, written_for
from ssmgen.data.buckets import check_buckets
from ssmgen.data.labels import LabelSet
from ssmgen.hub import HUB_ID, download_folder, hub_library
from ssmgen.reading import read_json
from ssmgen.registry import Spec, build, divided, find, names, plugin_of
from ssmgen.sampling import Sampling
from ssmgen.solvers import Solver
from ssmgen.weights import (
    REPLACED,
    check_inside,
    count_values,
    limit_parameters,
    load_weights,
    tensors_of,
    unwrapped,
    write_weights,
)

_LARGEST_SIDE = 2**14
_FORMAT = 3  # 1 had no objective, which was flow matching; 2 had one size, and no text encoders
_CONFIG, _WEIGHTS, _AUTOENCODER, _CARD = "config.json", "model.safetensors", "autoencoder", "README.md"
_PACKAGED = Path(__file__).parents[1] / "pretrained"
#: The dtypes of saved weights by name, as `MaskToImage.save_pretrained` takes them.
SAVED_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """Everything that describes a trained model except its weights; ``config.json`` in its folder.

    Attributes:
        model: registered name of the model.
        model_args: keyword arguments to build it with.
        autoencoder: registered name of its autoencoder.
        image_size: side of the square images in pixels, ``(height, width)``, or a list of several of these, the buckets
            that it was trained in.
        labels: classes of its masks.
        sampling: settings of sampling where a call gives none; a mapping of some of them will do.
        about: one line on what the model was trained on and can do.
        objective: registered name of the objective it was trained with, or a spec.
        text_encoders: for each condition that takes text, the spec of its text encoder, or what its ``describe()``
            returned, whose weights are then compared. Encoders are not saved with the model: a hub id or a folder names
            their weights.

    Raises:
        TypeError, ValueError: an invalid field or an unregistered name.
    """

    model: str
    model_args: dict[str, Any]
    autoencoder: str
    image_size: int | tuple[int, int] | list[tuple[int, int]]
    labels: LabelSet
    sampling: Sampling = Sampling()
    about: str = ""
    objective: Spec = "flow-matching"
    text_encoders: dict[str, Spec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in ("model", "autoencoder"):
            _check_registered(getattr(self, kind), kind)
        _check_registered(divided(self.objective)[0], "objective")
        for spec in self.text_encoders.values():
            _check_registered(divided(spec)[0], "text-encoder")
        object.__setattr__(self, "image_size", _checked_size(self.image_size))
        if not isinstance(self.model_args, dict):
            raise TypeError(f"model_args must be a dict, got {self.model_args!r}")
        if isinstance(self.sampling, Mapping):
            object.__setattr__(self, "sampling", Sampling().replaced(**self.sampling))
        if not isinstance(self.sampling, Sampling) or isinstance(self.sampling.solver, Solver):
            raise TypeError(f"sampling must be settings whose solver is a name or a spec, got {self.sampling!r}")

    @property
    def title(self) -> str:
        """The model and its image size, such as ``sisma-s, 128 x 128``."""
        return f"{self.model}, {' or '.join(f'{height} x {width}' for height, width in self.sizes)}"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels; of several sizes, the first."""
        return self.sizes[0]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """All sizes (height, width) in pixels that it was trained in."""
        if isinstance(self.image_size, list):
            return self.image_size
        return [self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)]


def _checked_size(size: Any) -> int | tuple[int, int] | list[tuple[int, int]]:
    """The side of a square, another ``(height, width)``, or several of these; JSON has all of them as lists."""
    if isinstance(size, list | tuple) and size and all(isinstance(each, list | tuple) for each in size):
        several = [(each, each) if isinstance(each, int) else each for each in map(_checked_size, size)]
        check_buckets(several)  # type: ignore[arg-type]
        return several if len(several) > 1 else _checked_size(several[0])  # type: ignore[return-value]
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= _LARGEST_SIDE for side in sides):
        raise ValueError(f"image_size must be 1 to {_LARGEST_SIDE} pixels, got {size!r}")
    return sides[0] if sides[0] == sides[1] else sides


def packaged() -> list[str]:
    """Names of the models shipped with the package, for `MaskToImage.from_pretrained`."""
    return sorted(file.parent.name for file in _PACKAGED.glob(f"*/{_CONFIG}"))


def locate(source: str | Path, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The folder for ``source``: the path itself, a packaged model's, or a copy of a repository on the hub.

    Raises:
        FileNotFoundError: ``source`` is none of these, or could not be fetched.
        ValueError: ``revision`` is given for a folder or packaged model.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir() and str(source) in packaged():
        folder = _PACKAGED / source
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for repositories on the hub, and {source} is the folder {folder}"
            )
        return folder
    if isinstance(source, Path) or not HUB_ID.fullmatch(source):
        there = ", ".join(packaged()) or "none"
        raise FileNotFoundError(
            f"{source}: no such folder, no packaged model (there are: {there}), and not a hub id of the form owner/name"
        )
    files = [_CONFIG, _WEIGHTS, f"{_AUTOENCODER}/*", _CARD]
    return download_folder(source, files, revision=revision, local_files_only=local_files_only)


def read_folder(folder: Path) -> tuple[Any, Any, Recipe, str]:
    """Load model, autoencoder, recipe and card from a folder; raises the errors of `MaskToImage.from_pretrained`."""
    check_inside(folder, _CONFIG, _CARD)
    recipe = _read_recipe(folder / _CONFIG)
    held = count_values(folder / _WEIGHTS)
    too_large = f"it has more parameters than the {held:,} values in {folder / _WEIGHTS}"
    try:
        with limit_parameters(REPLACED * held, too_large):
            model = build(recipe.model, **recipe.model_args)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / _CONFIG}: {recipe.model} cannot be built with its model_args: {error}") from error
    load_weights(model, folder / _WEIGHTS)
    where = {} if recipe.autoencoder == "identity" else {"source": str(folder / _AUTOENCODER)}
    card = folder / _CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    return model, build(recipe.autoencoder, **where), recipe, text


def write_folder(folder: Path, model: nn.Module, autoencoder: Any, recipe: Recipe, card: str) -> None:
    """Write a folder, or replace its files in an existing folder and leave all others.

    New files are complete before any is replaced, and ``config.json`` is absent during the replacement: `read_folder`
    rejects what an interruption leaves, so two models are never mixed. A new folder appears only when it is complete.

    Raises:
        OSError: the folder cannot be written; names it.
    """
    if not folder.exists():
        with whole_folder(folder) as partial:
            _write_parts(partial, model, autoencoder, recipe, card)
        return
    with TemporaryDirectory(prefix=".partial-", dir=folder) as name, written_for(folder, Path(name)):
        partial = Path(name)
        _write_parts(partial, model, autoencoder, recipe, card)
        folder.joinpath(_CONFIG).unlink(missing_ok=True)
        shutil.rmtree(folder / _AUTOENCODER, ignore_errors=True)
        for part in (_WEIGHTS, _AUTOENCODER, _CARD, _CONFIG):
            if partial.joinpath(part).exists():
                os.replace(partial / part, folder / part)


def upload(folder: Path, repository: str, private: bool) -> str:
    """Upload a folder to a repository on the hub, which is created if it does not exist; the address of the commit.

    Raises:
        OSError: it failed.
    """
    try:
        huggingface_hub = hub_library()
        huggingface_hub.create_repo(repository, private=private, exist_ok=True)
        return str(huggingface_hub.upload_folder(repo_id=repository, folder_path=str(folder)))
    except Exception as error:  # the hub, the HTTP library and the file system each raise their own
        raise OSError(f"{repository}: could not be uploaded to the hub: {error}") from error


def _check_recorded(model: nn.Module, recipe: Recipe) -> None:
    """Reject a recipe that builds another model than the one to be saved, which could never be loaded.

    Raises:
        ValueError: names the first weight that differs.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model gave the same ones
        built = build(recipe.model, **recipe.model_args).state_dict()
    own = {name: tuple(weight.shape) for name, weight in unwrapped(model).state_dict().items()}
    recorded = {name: tuple(weight.shape) for name, weight in built.items()}
    for name in sorted(own.keys() | recorded.keys()):
        if own.get(name) != recorded.get(name):
            raise ValueError(
                f"the recipe builds {recipe.model} with {recipe.model_args}, which is another model than the one to be "
                f"saved: {name} is {recorded.get(name, 'absent')} there and {own.get(name, 'absent')} here"
            )


def _write_parts(folder: Path, model: nn.Module, autoencoder: Any, recipe: Recipe, card: str) -> None:
    _check_recorded(model, recipe)
    write_weights(folder / _WEIGHTS, tensors_of(model))
    if recipe.autoencoder != "identity":
        autoencoder.save(folder / _AUTOENCODER)
    folder.joinpath(_CARD).write_text(card, encoding="utf-8")
    content = {"format": _FORMAT, **asdict(recipe)}
    if not recipe.sampling.shared_noise:
        del content["sampling"]["shared_noise"]  # earlier versions do not know it
    if not recipe.text_encoders:
        del content["text_encoders"]
        content["format"] = _FORMAT if len(recipe.sizes) > 1 else 2  # what earlier versions can read, they should
    if plugins := _plugins_of(recipe):
        content["plugins"] = plugins
    folder.joinpath(_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_registered(name: Any, kind: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{kind} must be a name, got {name!r}")
    try:
        find(name, kind)
    except ValueError as error:
        if name in names():
            raise
        raise ValueError(f"{error} If you registered it yourself, import that module first.") from None


def _plugins_of(recipe: Recipe) -> dict[str, str]:
    """The names in a recipe that plug-ins registered, and the package each comes from."""
    known = set(names())

    def found(value: Any) -> Iterator[str]:
        if isinstance(value, str) and value in known:
            yield value
        elif isinstance(value, Mapping | list | tuple):
            for item in value.values() if isinstance(value, Mapping) else value:
                yield from found(item)

    parts = (recipe.model, recipe.model_args, recipe.autoencoder, recipe.objective, recipe.text_encoders)
    used = found([*parts, recipe.sampling.solver])
    return {name: plugin.package for name in sorted(set(used)) if (plugin := plugin_of(name))}


def _check_plugins(recorded: Any) -> None:
    """Check that the names which plug-ins registered where the folder was written are known here.

    Raises:
        ValueError: one is not; says which package it comes from.
    """
    for name, package in recorded.items():
        try:
            find(name)
        except ValueError as error:
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]* [\w.+!]+", package):
                raise
            raise ValueError(
                f"{name!r} comes from the package {package}, according to this folder. If you trust it: pip install "
                f"'{package.replace(' ', '==')}'. Here: {error}"
            ) from None


def _read_recipe(file: Path) -> Recipe:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; {file.parent} was not written by MaskToImage.save_pretrained")
    try:
        content = read_json(file)
        if content.pop("format") > _FORMAT:
            raise ValueError("it was written by a newer ssmgen: pip install --upgrade ssmgen")
        _check_plugins(content.pop("plugins", {}))
        return Recipe(labels=LabelSet.from_stored(content.pop("labels")), **content)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a MaskToImage configuration ({error})") from error
