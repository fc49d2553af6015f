"""Folders and files made by someone who wants code to run or files to be read: generators for tests.

Each payload creates the folder ``canary`` if anything in it is executed.
"""

import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

Change = Callable[[Path], None]

#: Values that no setting expects, except huge sizes.
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, float("nan"), "", "x", "../../etc/passwd", "/etc/passwd", "os.system"),
    *("${oc.env:HOME}", "!!python/object/apply:os.system", "\u0000", [], {}, [[]], {"name": "os.system"}, "9" * 5000),
    *({"_target_": "os.mkdir"}, {"name": "euler", "__class__": "os"}, ["a"] * 1000),
)
#: Keys with which other libraries load code.
CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipeline", "_target_", "__reduce__", "quantization_config")


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def payloads(canary: Path) -> dict[str, bytes]:
    """Files that run code if they are unpickled, by name."""
    harmful = _Canary(canary)
    found = {f"protocol-{number}.pkl": pickle.dumps(harmful, number) for number in (0, 2, 5)}
    for name, modern in (("zip.pt", True), ("legacy.pt", False)):
        buffer = io.BytesIO()
        torch.save({"weight": harmful}, buffer, _use_new_zipfile_serialization=modern)
        found[name] = buffer.getvalue()
    for name, write in (("objects.npy", np.save), ("objects.npz", np.savez)):
        buffer = io.BytesIO()
        write(buffer, np.array([harmful], dtype=object))
        found[name] = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        zipped.writestr("../outside/data.pkl", found["protocol-2.pkl"])
    found["traversal.zip"] = buffer.getvalue()
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    found["huge.safetensors"] = len(header).to_bytes(8, "little") + header
    found["endless-header.safetensors"] = (2**62).to_bytes(8, "little") + b"{}"
    return found


def edit(file: str, change: Callable[[dict[str, Any]], object]) -> Change:
    """A change of a folder's JSON file."""

    def apply(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def with_code_keys(file: str, canary: Path) -> Iterator[tuple[str, Change]]:
    """A folder's JSON file with keys that name code."""
    for key in CODE_KEYS:
        for value in ("os.system", {"AutoModel": f"evil.Canary--{canary}"}, True, {"quant_method": "evil"}):
            yield f"{key}={value}"[:60], edit(file, lambda content, key=key, value=value: content.update({key: value}))


def odd_settings(file: str, count: int, seed: int = 0) -> Iterator[tuple[str, Change]]:
    """A folder's JSON file with one or two values replaced by some that no setting expects."""
    draw = random.Random(seed)

    def change(content: dict[str, Any], number: int) -> None:
        own = random.Random(number)
        for _ in range(own.randint(1, 2)):
            place: Any = content
            while True:
                keys = list(place) if isinstance(place, dict) else list(range(len(place)))
                key = own.choice(keys)
                if not isinstance(place[key], dict | list) or not place[key] or own.random() < 0.4:
                    break
                place = place[key]
            place[key] = own.choice(ODD_VALUES)

    for _ in range(count):
        number = draw.randrange(2**32)
        yield f"odd-{number}", edit(file, lambda content, number=number: change(content, number))


def pickled_weights(canary: Path, stem: str, remove: str = "") -> Iterator[tuple[str, Change]]:
    """Pickled weights beside a folder's safetensors file, or in its place if it is to be removed."""
    content = payloads(canary)["zip.pt"]
    for suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):

        def change(folder: Path, suffix: str = suffix) -> None:
            folder.joinpath(stem + suffix).write_bytes(content)
            if remove:
                folder.joinpath(remove).unlink()

        yield f"{stem}{suffix}{' alone' if remove else ''}", change


def linked(file: str, target: Path) -> Change:
    """A folder whose file is a link to one outside."""

    def change(folder: Path) -> None:
        folder.joinpath(file).unlink(missing_ok=True)
        folder.joinpath(file).symlink_to(target)

    return change


def shards(names: list[str], canary: Path) -> Change:
    """An autoencoder's folder whose index names other files for its weights."""

    def change(folder: Path) -> None:
        weights = folder / "diffusion_pytorch_model.safetensors"
        weights.rename(folder / "other.safetensors")
        folder.joinpath("evil.bin").write_bytes(payloads(canary)["zip.pt"])
        index = {"metadata": {}, "weight_map": {f"weight.{number}": name for number, name in enumerate(names)}}
        folder.joinpath("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))

    return change
