"""Checkpoints in safetensors and JSON: complete or absent, verified before use, nothing unpickled.

``step-00001500/`` holds ``model.safetensors``, ``ema.safetensors``, ``optimizer.safetensors``, ``state.json`` and
``MANIFEST.json``, see `ssmgen.training.manifest`. The folder is written under a temporary name, flushed, read back and
renamed, and a folder to be deleted is renamed first: a process killed at any moment leaves a complete checkpoint.
"""

import json
import os
from errno import EIO, ENOENT
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ssmgen.atomic import disk_error, flush, remove_folder, remove_leftovers, whole_folder
from ssmgen.training.manifest import (
    AVERAGED,
    EMA,
    MANIFEST,
    NAME,
    STATE,
    CheckpointError,
    NewerFormatError,
    checked_state,
    verify_checkpoint,
    write_manifest,
)
from ssmgen.weights import (
    bytes_of,
    current_name,
    full_tensor,
    load_weights,
    plain_name,
    read_weights,
    sharded_like,
    tensors_of,
    unwrapped,
    write_weights,
)

# Above the values: names and shapes of the tensors, and the manifest.
_OVERHEAD = 2**20


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
        gathered = full_tensor(tensor)
        if keep:  # a gathered tensor leaves the device at once, because all of them may not fit there
            found[name] = gathered if gathered is tensor else gathered.cpu()
    return found


def save_checkpoint(
    folder: Path, step: int, *, model: nn.Module, ema: nn.Module, optimizer: Optimizer, state: dict[str, Any]
) -> Path:
    """Write one complete checkpoint into ``folder``, read it back, and return its path.

    Args:
        folder: the folder of all checkpoints, e.g. ``RUN/checkpoints``.
        step: optimiser steps done.
        model, ema: the trained model and its moving average; wrapped or not, weights are written under plain names.
        optimizer: its state is stored under the names of the model's parameters.
        state: configuration, counters and the like; must be JSON, and what this library reads must have its type.

    Raises:
        OSError: too little space, a disk that cannot be written, or one that does not return what was written; names
            the checkpoint. Existing checkpoints stay intact.
        ValueError, TypeError: ``state`` could not be read again, or ``step`` has more than eight digits. Nothing was
            written.
    """
    return write_checkpoint(folder, step, collect(model=model, ema=ema, optimizer=optimizer), state)


def write_checkpoint(folder: Path, step: int, tensors: Collected, state: dict[str, Any]) -> Path:
    """As `save_checkpoint`, from tensors that `collect` returned."""
    final = folder / f"step-{step:08d}"
    if not NAME.fullmatch(final.name):
        raise ValueError(f"step={step}: a checkpoint's step has at most eight digits")
    text = _state_text({"step": step, AVERAGED: tensors.averaged} | state | {"step": step})
    needed = sum(map(bytes_of, tensors[:3])) + len(text) + _OVERHEAD
    replaced = replaced_by(final)
    remove_leftovers(folder, idle=True)  # of any step: they take up space
    if os.path.lexists(final) and os.path.lexists(replaced):  # a kill interrupted an earlier replacement
        remove_folder(replaced if _verifies(final) else final)
    with whole_folder(final, needed=needed) as temporary:
        write_weights(temporary / "model.safetensors", tensors.model)
        write_weights(temporary / EMA, tensors.ema)
        write_weights(temporary / "optimizer.safetensors", tensors.optimizer)
        (temporary / STATE).write_text(text)
        try:
            write_manifest(temporary)
            _read_back(temporary)
        except CheckpointError as error:
            raise disk_error(f"{error}, although it was just written: the disk is at fault", EIO) from error
        if os.path.lexists(final):  # the same step, saved again; until the rename, `checkpoints` finds the old one
            final.rename(replaced)
    if os.path.lexists(replaced):
        remove_folder(replaced)
    return final


def _state_text(state: dict[str, Any]) -> str:
    """The state as JSON, held to the rules of reading: a fault of the caller must not look like one of the disk."""
    try:
        text = json.dumps(state, indent=2, allow_nan=False) + "\n"
        checked_state(Path(STATE), text)
    except RecursionError:
        raise ValueError("state of a checkpoint: is nested too deeply") from None
    except CheckpointError as error:
        raise ValueError(f"state of a checkpoint: {str(error).removeprefix(f'{STATE}: ')}") from None
    return text


def _read_back(folder: Path) -> None:
    """Verify what the disk returns, not what memory still holds."""
    flush(folder)
    for file in folder.iterdir():
        if hasattr(os, "posix_fadvise"):
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    verify_checkpoint(folder)


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
            load_weights(ema, path / EMA, averaged)
            if isinstance(ema, AveragedModel):
                ema.n_averaged.fill_(state.get(AVERAGED, count))
        if optimizer is not None:
            assert model is not None, "the optimiser's state is keyed by the model's parameter names"
            _load_optimizer(optimizer, model, path / "optimizer.safetensors")
    except CheckpointError:
        raise
    except (ValueError, RuntimeError) as error:  # what safetensors and torch say about a forged file
        raise CheckpointError(
            str(error) if str(path) in str(error) else f"{path}: cannot be loaded ({error})"
        ) from error
    return state


def read_average(path: Path) -> tuple[dict[str, Tensor], int]:
    """The averaged weights of a checkpoint, of any shape, by the model's names, and the number of their updates.

    The first format kept the number among the weights, under the wrapper's names. Later ones keep it in the state, and
    0 is returned here.
    """
    tensors = read_weights(path / EMA)
    count = tensors.pop("n_averaged", None)
    if count is None:
        return tensors, 0
    if count.numel() != 1 or count.is_floating_point() or count.is_complex():
        raise CheckpointError(f"{path / EMA}: n_averaged must be one whole number")
    return {name.removeprefix("module."): value for name, value in tensors.items()}, int(count)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in ``folder`` that have a manifest, oldest first. They are not verified.

    Raises:
        OSError: the folder exists, but cannot be listed.
    """
    return [path for path in checkpoint_folders(folder) if (path / MANIFEST).is_file()]


def newest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run, verified. A damaged one is an error: an older one is not taken in its place.

    Raises:
        FileNotFoundError: there is none yet.
        CheckpointError: it is damaged; names the file, and the command that sets it aside. A `NewerFormatError` if a
            later ssmgen wrote it.
        OSError: the folder or the checkpoint cannot be read.
    """
    found = checkpoint_folders(run / "checkpoints")
    if not found and (aside := [path.name for path in listed(run / "checkpoints") if "damaged-step-" in path.name]):
        raise CheckpointError(
            f"{run / 'checkpoints'}: holds only what was set aside as damaged ({', '.join(aside)}); ssmgen fsck {run} "
            "says why"
        )
    if not found:
        raise FileNotFoundError(f"{run / 'checkpoints'}: no complete checkpoint; has the run reached checkpoint_every?")
    try:
        verify_checkpoint(found[-1])
    except NewerFormatError:
        raise
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\nThis is the newest checkpoint. ssmgen fsck {run} lists the intact ones; with --mend it sets "
            "damaged ones aside, and the newest intact one is taken"
        ) from error
    return found[-1]


def checkpoint_folders(folder: Path) -> list[Path]:
    """Everything in ``folder`` under the name of a checkpoint, complete or not, one for each step, oldest first.

    Raises:
        OSError: the folder exists, but cannot be listed.
    """
    found: dict[int, Path] = {}
    for path in listed(folder):
        if named := NAME.fullmatch(path.name):
            found.setdefault(int(named[1]), path)  # the plain name sorts before that of what it replaced
    return list(found.values())


def listed(folder: Path) -> list[Path]:
    """Everything in a folder, by name; nothing if it does not exist.

    `Path.glob` would report an empty folder for one that cannot be read, and the run would begin anew.

    Raises:
        OSError: it exists, but cannot be listed, or is a link to nowhere.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(folder / entry.name for entry in entries)
    except FileNotFoundError as error:
        if os.path.lexists(folder):
            text = f"{folder}: is a link to a folder that does not exist; restore that folder, or delete the link"
            raise disk_error(text, ENOENT) from error
        return []


def replaced_by(path: Path) -> Path:
    """Where a checkpoint stays while another of its step takes its name."""
    return path.with_name(f"{path.name}.replaced")


def prune_checkpoints(folder: Path, keep: int, verified: set[str] | None = None) -> None:
    """Delete all checkpoints older than the newest ``keep`` that verify, and the leftovers of unfinished saves.

    Args:
        folder: the folder of all checkpoints.
        keep: at least 1. Damaged ones are not counted, so the last one that verifies always stays.
        verified: names of those that are known to verify; others are read, and added if they do.

    Raises:
        OSError: one cannot be read or deleted.
    """
    known = set() if verified is None else verified
    good = 0
    for path in reversed(checkpoint_folders(folder)):
        replaced = replaced_by(path)
        if good < max(keep, 1):
            if path.name not in known and not _verifies(path):
                continue
            known.add(path.name)
            good += 1
        else:
            remove_folder(path)
        if os.path.lexists(replaced):
            remove_folder(replaced)
    remove_leftovers(folder, idle=True)


def _verifies(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except CheckpointError:
        return False
    return True


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
        if value.numel() != 1 and value.shape != parameter.shape:
            raise CheckpointError(
                f"{file}: {key} has the shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}"
            )
        # Adam keeps its step counter on the CPU, whatever the device of the weights.
        optimizer.state[parameter][slot] = value if slot == "step" else sharded_like(value, parameter)
