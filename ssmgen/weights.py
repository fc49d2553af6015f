"""Weights in safetensors files, under the model's own names; every error names the file."""

import hashlib
import json
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import EIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.optim.swa_utils import AveragedModel

from ssmgen.atomic import whole_file
from ssmgen.reading import irregular

_COMPILED = "_orig_mod"
# Suffixes of weights that are read by unpickling.
_PICKLED = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside the wrappers of `torch.compile`, data parallelism and `AveragedModel`."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
    while True:
        if isinstance(module, parallel):
            module = module.module
        elif _COMPILED in module._modules:
            module = getattr(module, _COMPILED)
        else:
            return module


def plain_name(name: str) -> str:
    """The name of a tensor without what `torch.compile` of a part of the model adds to it."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def current_name(module: nn.Module, name: str) -> str:
    """The present name of a weight that a file may hold under an earlier one (the model's attribute ``renamed``)."""
    renamed: Mapping[str, str] = getattr(unwrapped(module), "renamed", {})
    old = next((old for old in renamed if name.startswith(old)), "")
    return renamed[old] + name.removeprefix(old) if old else name


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, of any shape, by a model's own names, also if it is wrapped; they share its memory."""
    return {plain_name(name): value for name, value in unwrapped(module).state_dict().items()}


def hash_of_weights(module: nn.Module) -> str:
    """A hash over names, shapes, dtypes and values of parameters and buffers, whichever file they came from."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(json.dumps([key, list(value.shape), str(value.dtype)]).encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor of any shape in one piece; if it is sharded, all processes must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor of any shape that this process holds, sharing its memory; all of it if it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sharded_like(tensor: Tensor, reference: Any) -> Tensor:
    """A whole tensor of any shape on the device of ``reference``, and divided among the processes if that is."""
    tensor = tensor.to(reference.device)
    if not hasattr(reference, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole tensor, so that nothing is sent.
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def gathered(part: Tensor, reference: Any) -> Tensor:
    """The whole tensor, of any shape, of which this process holds ``part``, divided as ``reference`` is.

    All processes must call this if ``reference`` is sharded; otherwise the part is the whole.
    """
    if not hasattr(reference, "placements"):
        return part
    from torch.distributed.tensor import DTensor

    shape, stride = reference.shape, reference.stride()
    divided = DTensor.from_local(part, reference.device_mesh, reference.placements, shape=shape, stride=stride)
    return full_tensor(divided)


def copy_whole(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into one of the same shape that may be sharded."""
    with torch.no_grad():
        local_shard(target).copy_(
            local_shard(sharded_like(source, target)) if hasattr(target, "placements") else source
        )


def write_weights(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors of any shape, device and layout to a safetensors file atomically, with text for its header.

    Raises:
        OSError: the disk is full or cannot be written; names the file and the free space.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    seen: set[int] = set()
    plain = {}
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in seen else value  # safetensors refuses two names of one memory
        seen.add(storage)
    with whole_file(file, needed=bytes_of(plain)) as partial:
        partial.touch()  # safetensors makes files that only their owner reads; this one has the user's permissions
        mode = partial.stat().st_mode
        try:
            save_file(plain, partial, metadata=metadata)
        except SafetensorError as error:  # errors of the disk as well
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else EIO, str(error)) from error
        partial.chmod(mode)


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that the values of tensors of any shape take in a file."""
    return sum(value.numel() * value.element_size() for value in tensors.values())


def conversion_hint(path: Path) -> str:
    """How to convert pickled weights: the file itself, or those in the folder. Empty if there are none."""
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in _PICKLED and file.is_file())
    else:
        found = [path] if path.is_file() and _is_pickled(path) else []
    if not found:
        return ""
    return (
        f"; {found[0].name} holds pickled weights, which can run code when they are read. If you trust them, convert "
        f"them with safetensors.torch.save_file(torch.load({found[0].name!r}, weights_only=True), 'model.safetensors')"
    )


def _is_pickled(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4).startswith((b"PK", b"\x80", b"cpos", b"cos", b"cbui"))


def check_inside(folder: Path, *names: str) -> None:
    """Check that files of a folder from outside are not links to files outside; the hub's own cache links to its blobs.

    Raises:
        ValueError: a file is such a link.
    """
    for name in names:
        file, home = folder / name, folder.resolve()
        allowed = (home, home.parents[1] / "blobs") if home.parent.name == "snapshots" else (home,)
        try:
            target = file.resolve()
        except (OSError, RuntimeError):  # a link to itself; the kind depends on Python
            raise ValueError(f"{file}: is a link that leads nowhere: replace it by the file") from None
        if file.is_symlink() and not any(target.is_relative_to(each) for each in allowed):
            raise ValueError(f"{file}: is a link to a file outside its folder: replace it by the file, if you trust it")


def open_weights(file: Path) -> Any:
    """Open a safetensors file with `safetensors.safe_open`.

    Raises:
        FileNotFoundError, OSError: there is no such file, or it cannot be read.
        ValueError: it is no regular file, no safetensors file, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not file.exists() or file.is_dir():
        raise FileNotFoundError(f"{file}: not found{conversion_hint(file.parent) if file.parent.is_dir() else ''}")
    if fault := irregular(file):
        raise ValueError(f"{file}: {fault}")
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: is no safetensors file, or damaged ({error}){conversion_hint(file)}") from error
    except OSError as error:
        raise OSError(f"{file}: cannot be read ({error})") from error


def read_weights(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, of any shape; raises the errors of `open_weights`."""
    with open_weights(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


#: How many parameters a model may register for each that it has: a constructor may replace what another one made.
#: Whether it has those of a file, `load_weights` says.
REPLACED = 2


@contextmanager
def limit_parameters(most: int, message: str) -> Iterator[None]:
    """Stop building a model in this thread as soon as it has too many parameters.

    Sizes come from files and command lines. A layer registers an empty parameter before filling it, and the system
    hands out memory only when it is filled: a parameter that is too large is rejected before it takes any.

    Raises:
        ValueError: ``message``, where the model registers more than ``most``, or one that cannot be allocated at all.
    """
    count, thread = 0, threading.get_ident()

    def note(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        if parameter is not None and threading.get_ident() == thread:  # the hook sees the models of all threads
            count += parameter.numel()
            if count > most:
                raise _TooManyError

    handle = register_module_parameter_registration_hook(note)
    try:
        yield
    except _TooManyError:
        raise ValueError(message) from None
    except (RuntimeError, OverflowError) as error:
        if not re.search("overflow|alloc", str(error)):
            raise
        raise ValueError(message) from error
    finally:
        handle.remove()


class _TooManyError(Exception):
    pass


def count_values(file: Path) -> int:
    """Values in all tensors of a safetensors file, from its header; raises the errors of `open_weights`."""
    with open_weights(file) as opened:
        return sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118


def load_weights(module: nn.Module, file: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Copy the weights of a safetensors file into a model, which may be wrapped: all or none.

    Args:
        module: the model.
        file: the file.
        tensors: its content, of any shape, under the model's names; read from the file if None.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; names the file and the first such tensor.
        FileNotFoundError, OSError: see `open_weights`.
    """
    read = read_weights(file) if tensors is None else tensors
    given = {current_name(module, name): value for name, value in read.items()}
    own = tensors_of(module)
    found, wanted = ({name: tuple(value.shape) for name, value in part.items()} for part in (given, own))
    wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"{file}: {len(wrong)} tensor(s) do not fit the model, the first {first}: the file has "
            f"{found.get(first)}, the model {wanted.get(first)}"
        )
    for name, value in own.items():
        copy_whole(value, given[name])
