"""Checkpoints in safetensors and JSON: complete or absent, verified before use, nothing unpickled.

``step-00001500/`` holds ``model.safetensors``, ``ema.safetensors``, ``optimizer.safetensors``, ``state.json`` and
``MANIFEST.json`` (size and SHA-256 of each), written last. The folder is written under a temporary name and renamed, so
a process killed at any moment leaves the older checkpoints intact.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ssmgen.atomic import whole_folder
from ssmgen.weights import (
    current_name,
    load_weights,
    plain_name,
    read_weights,
    sharded_like,
    tensors_of,
    unwrapped,
    whole,
    write_weights,
)

_MANIFEST = "MANIFEST.json"
_STATE = "state.json"
_EMA = "ema.safetensors"
_AVERAGED = "averaged"
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


class Collected(NamedTuple):
    """The tensors of a checkpoint, each in one piece and under the model's own names.

    Attributes:
        model, ema: weights of the model, and their moving average.
        optimizer: the optimiser's state, under ``parameter:slot``.
        averaged: updates of the moving average, on which its ramp depends; 0 of a plain module.
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    averaged: int


def collect(*, model: nn.Module, ema: nn.Module, optimizer: Optimizer, keep: bool = True) -> Collected:
    """The tensors of a checkpoint. If the model is sharded, all processes must call this.

    Args:
        model, ema, optimizer: as in `save_checkpoint`.
        keep: return the tensors; with False, which is for all processes but the one that writes, the dicts are empty.
    """
    averaged = int(ema.n_averaged) if isinstance(ema, AveragedModel) else 0
    return Collected(
        _in_one_piece(tensors_of(model), keep),
        _in_one_piece(tensors_of(ema), keep),
        _in_one_piece(_optimizer_tensors(optimizer, model), keep),
        averaged,
    )


def _in_one_piece(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if keep:  # a gathered tensor leaves the device at once, because all of them may not fit there
            found[name] = gathered if gathered is tensor else gathered.cpu()
    return found


def save_checkpoint(
    folder: Path, step: int, *, model: nn.Module, ema: nn.Module, optimizer: Optimizer, state: dict[str, Any]
) -> Path:
    """Write one complete checkpoint into ``folder`` and return its path.

    Args:
        folder: the folder of all checkpoints, e.g. ``RUN/checkpoints``.
        step: optimiser steps done.
        model, ema: the trained model and its moving average; wrapped or not, weights are written under plain names.
        optimizer: its state is stored under the names of the model's parameters.
        state: configuration, counters and the like; must be JSON.

    Raises:
        OSError: no space or no permission; names the checkpoint. Existing checkpoints stay intact.
    """
    return write_checkpoint(folder, step, collect(model=model, ema=ema, optimizer=optimizer), state)


def write_checkpoint(folder: Path, step: int, tensors: Collected, state: dict[str, Any]) -> Path:
    """As `save_checkpoint`, from tensors that `collect` returned."""
    final = folder / f"step-{step:08d}"
    with whole_folder(final) as temporary:
        write_weights(temporary / "model.safetensors", tensors.model)
        write_weights(temporary / _EMA, tensors.ema)
        write_weights(temporary / "optimizer.safetensors", tensors.optimizer)
        _write_json(temporary / _STATE, {"step": step, _AVERAGED: tensors.averaged, **state})
        _write_json(temporary / _MANIFEST, _manifest(temporary))
        if final.exists():
            shutil.rmtree(final)  # the same step, saved again
    _sync(folder)
    return final


def load_checkpoint(
    path: Path, *, model: nn.Module | None = None, ema: nn.Module | None = None, optimizer: Optimizer | None = None
) -> dict[str, Any]:
    """Verify a checkpoint and load the parts asked for; returns its state. ``optimizer`` needs ``model`` as well.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or does not fit the module; names the file.
    """
    state = verify_checkpoint(path)
    try:
        if model is not None:
            load_weights(model, path / "model.safetensors")
        if ema is not None:
            averaged, count = read_average(path)
            load_weights(ema, path / _EMA, averaged)
            if isinstance(ema, AveragedModel):
                ema.n_averaged.fill_(state.get(_AVERAGED, count))
        if optimizer is not None:
            assert model is not None, "the optimiser's state is keyed by the model's parameter names"
            _load_optimizer(optimizer, model, path / "optimizer.safetensors")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return state


def read_average(path: Path) -> tuple[dict[str, Tensor], int]:
    """The averaged weights of a checkpoint, of any shape, by the model's names, and the number of their updates.

    The first format kept the number among the weights, under the wrapper's names. Later ones keep it in the state, and
    0 is returned here.
    """
    tensors = read_weights(path / _EMA)
    count = tensors.pop("n_averaged", None)
    if count is None:
        return tensors, 0
    return {name.removeprefix("module."): value for name, value in tensors.items()}, int(count)


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Check sizes and hashes of every file against the manifest and return the state; `CheckpointError` otherwise."""
    manifest = _read_json(path / _MANIFEST)
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, though the manifest lists it")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{file}: has {file.stat().st_size} bytes, the manifest says {expected['bytes']}")
        if _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{file}: its SHA-256 is not the manifest's; the file was altered or damaged")
    return _read_json(path / _STATE)


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, without the checks of `verify_checkpoint`; `CheckpointError` if it cannot be read."""
    return _read_json(path / _STATE)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first."""
    return sorted(p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and (p / _MANIFEST).is_file())


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints, and the leftovers of unfinished saves."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)
    for path in folder.glob("step-*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {plain_name(name): parameter for name, parameter in unwrapped(model).named_parameters()}


def _optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    named: dict[Tensor, str] = {parameter: name for name, parameter in _parameters(model).items()}
    return {
        f"{named[parameter]}:{slot}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }


def _load_optimizer(optimizer: Optimizer, model: nn.Module, file: Path) -> None:
    named = _parameters(model)
    for key, value in read_weights(file).items():
        stored, _, slot = key.rpartition(":")
        name = current_name(model, stored)
        if name not in named:
            raise CheckpointError(f"{file}: holds state of {name!r}, which the model does not have")
        parameter = named[name]
        # Adam keeps its step counter on the CPU, whatever the device of the weights.
        optimizer.state[parameter][slot] = value if slot == "step" else sharded_like(value, parameter)


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(folder.iterdir())
    for file in files:
        _sync(file)
    return {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; this is no complete checkpoint") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
    _sync(file)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a rename never precedes its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
