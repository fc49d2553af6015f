"""Checkpoints in safetensors and JSON: complete or absent, verified before use, nothing unpickled.

``step-00001500/`` holds ``model.safetensors``, ``ema.safetensors``, ``optimizer.safetensors``, ``state.json`` and
``MANIFEST.json`` (size and SHA-256 of each), written last. It is written beside its name and renamed, so that a process
killed at any moment leaves the older ones as they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_MANIFEST = "MANIFEST.json"
_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Write one complete checkpoint into ``folder`` and return its path.

    Args:
        folder: where checkpoints live, e.g. ``RUN/checkpoints``.
        step: optimiser steps done.
        model: the trained weights.
        ema: their moving average, a module with the same parameters.
        optimizer: its state is stored under the names of the model's parameters.
        state: what else belongs to it (configuration, counters); must be JSON.

    Raises:
        OSError: no space or no permission. The checkpoints already there stay as they are.
    """
    from safetensors.torch import save_file

    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(_tensors(model.state_dict()), temporary / "model.safetensors")
        save_file(_tensors(ema.state_dict()), temporary / "ema.safetensors")
        save_file(_optimizer_tensors(optimizer, model), temporary / "optimizer.safetensors")
        _write_text(temporary / _STATE, json.dumps({"step": step, **state}, indent=2))
        _write_text(temporary / _MANIFEST, json.dumps(_manifest(temporary), indent=2))
        if final.exists():
            shutil.rmtree(final)  # the same step, saved again
        temporary.rename(final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module | None = None,
    ema: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Any]:
    """Verify a checkpoint and load the parts asked for; returns its state.

    The optimiser's state is stored by parameter name, so ``model`` is needed along with ``optimizer``.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or does not fit the module; names the file.
    """
    from safetensors.torch import load_file

    state = verify_checkpoint(path)
    for module, name in ((model, "model.safetensors"), (ema, "ema.safetensors")):
        if module is not None:
            _load_weights(module, path / name)
    if optimizer is not None:
        assert model is not None, "the optimiser's state is keyed by the model's parameter names"
        _load_optimizer(optimizer, model, load_file(path / "optimizer.safetensors"), path / "optimizer.safetensors")
    return state


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
    """The state of a checkpoint as it is, without the check of `verify_checkpoint`.

    Raises:
        CheckpointError: it cannot be read.
    """
    return _read_json(path / _STATE)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, oldest first; unfinished ones are not counted."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / _MANIFEST).is_file())


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints, and what unfinished saves left behind."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)
    for path in folder.glob("step-*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _tensors(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    named: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{named[parameter]}:{slot}": value.detach().cpu().contiguous()
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    named = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, slot = key.rpartition(":")
        if name not in named:
            raise CheckpointError(f"{file}: holds state of {name!r}, which the model does not have")
        parameter = named[name]
        # Adam keeps its step counter on the CPU whatever the device of the weights.
        device = value.device if slot == "step" else parameter.device
        optimizer.state[parameter][slot] = value.to(device)


def _load_weights(module: nn.Module, file: Path) -> None:
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise CheckpointError(f"{file}: does not fit the model: {error}") from error


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(file for file in folder.iterdir() if file.is_file())
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


def _write_text(file: Path, text: str) -> None:
    file.write_text(text + "\n")
    _sync(file)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a rename never outruns its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
