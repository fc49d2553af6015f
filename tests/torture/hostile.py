"""Hostile files wherever a file is read: nothing is executed, nothing else read, no socket opened; each is named."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from networks import tiny_network
from pipelines import random_pipe

from ssmgen import MaskToImage, build
from ssmgen.data import CELEBAMASK19, PreparedFolder, draw_face, read_image, read_mask, write_png
from ssmgen.training import load_checkpoint
from torture import damage
from torture.campaign import Campaign, Case, Failed, named
from torture.watching import nothing_done, watch

_EXPECTED = (ValueError, OSError)


class _Runs:
    """Unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def prepare(shared: Path) -> None:
    """One of everything that is read: checkpoint, cache, model folder, autoencoder, prepared folder, images, parser."""
    from recipes.sisma.parser import SHIPPED
    from recipes.sisma.prepare.command import main

    damage.prepare(shared)
    random_pipe().save_pretrained(shared / "model")
    tiny_network().save_pretrained(shared / "autoencoder")
    main(["source=drawn", f"target={shared / 'prepared'}", "count=8", "size=16"])
    (shared / "files").mkdir()
    image, mask = draw_face(0, 32)
    write_png(shared / "files" / "image.png", image)
    write_png(shared / "files" / "mask.png", mask)
    shutil.copy(SHIPPED, shared / "files" / "parser.safetensors")


def _doors() -> dict[str, tuple[tuple[str, ...], Callable[[Path], Any]]]:
    """Which files are replaced, below the folder of a case, and what then reads them."""
    from recipes.sisma.parser import load_parser

    newest = "run/checkpoints/step-00000006"
    parts = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json")
    checkpoint = tuple(f"{newest}/{name}" for name in parts)
    weights = ("autoencoder/config.json", "autoencoder/diffusion_pytorch_model.safetensors")
    return {
        "checkpoint": (checkpoint, lambda f: load_checkpoint(f / newest, **damage._network())),
        "cache": (("cache/cache.json", "cache/shard-00000.safetensors"), lambda f: damage._read(f / "cache")),
        "model": (("model/config.json", "model/model.safetensors"), lambda f: MaskToImage.from_pretrained(f / "model")),
        "autoencoder": (weights, lambda f: build("autoencoder-tiny", source=str(f / "autoencoder"))),
        "prepared": (
            ("prepared/prepared.json", "prepared/splits.json"),
            lambda f: PreparedFolder(f / "prepared", "train"),
        ),
        "image": (("files/image.png",), lambda f: read_image(f / "files/image.png")),
        "mask": (("files/mask.png",), lambda f: read_mask(f / "files/mask.png", CELEBAMASK19)),
        "parser": (("files/parser.safetensors",), lambda f: load_parser(f / "files/parser.safetensors")),
    }


def opened(case: Case) -> str:
    """Put a hostile file in the place of a good one, and read it."""
    draw = case.random
    doors = _doors()
    door = draw.choice(sorted(doors))
    names, read = doors[door]
    name = draw.choice(names)
    top = name.split("/")[0]
    shutil.copytree(case.shared / top, case.folder / top)
    canary, secret, file = case.folder / "canary", case.folder / "secret", case.folder / name
    kind = draw.choice(sorted(_PAYLOADS))
    _PAYLOADS[kind](_emptied(file), canary, secret, draw)
    watch(secret)
    try:
        read(case.folder)
    except _EXPECTED as error:
        shown, outcome = str(error), "refused by name"
        # What is no file at all is not found in an autoencoder's folder.
        named(shown, file.name, *([str(case.folder / door)] if door == "autoencoder" and not file.is_file() else []))
    except Exception as error:
        raise Failed(f"{kind} as {name}: {type(error).__name__}: {error}") from error
    else:
        raise Failed(f"{kind} as {name}: accepted in silence")
    nothing_done(canary, shown)
    return f"{door}, {outcome}"


def _emptied(file: Path) -> Path:
    file.unlink()
    return file


def _pickled(file: Path, canary: Path, secret: Path, draw: random.Random) -> None:
    file.write_bytes(pickle.dumps(_Runs(f"touch {canary}"), protocol=draw.choice((0, 2, 4))))


def _torch_zip(file: Path, canary: Path, secret: Path, draw: random.Random) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Runs(f"touch {canary}"), protocol=2))
        archive.writestr("archive/version", "3\n")


def _torch_tar(file: Path, canary: Path, secret: Path, draw: random.Random) -> None:
    with tarfile.open(file, "w") as archive:
        for name in ("sys_info", "pickle", "../../escaped"):
            content = pickle.dumps(_Runs(f"touch {canary}"), protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def _numpy_object(file: Path, canary: Path, secret: Path, draw: random.Random) -> None:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    content = pickle.dumps(_Runs(f"touch {canary}"), protocol=2)
    file.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content)


def _safetensors(header: Callable[[random.Random], Any]) -> Callable[..., None]:
    def write(file: Path, canary: Path, secret: Path, draw: random.Random) -> None:
        text = json.dumps(header(draw)).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))

    return write


def _overlapping(draw: random.Random) -> Any:
    return {name: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for name in ("a", "b")}


def _outside(draw: random.Random) -> Any:
    end = draw.choice((65, 2**40, 2**63 - 1))
    return {"a": {"dtype": "F32", "shape": [end // 4], "data_offsets": [0, end]}}


def _absurd(draw: random.Random) -> Any:
    return {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]}}


def _huge_png(file: Path, canary: Path, secret: Path, draw: random.Random) -> None:
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = draw.choice((30_000, 60_000, 2**31 - 1))
    header = struct.pack(">IIBBBBB", size, size, 8, draw.choice((0, 2)), 0, 0, 0)
    body = zlib.compress(bytes(100_000))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def _text(template: str) -> Callable[..., None]:
    def write(file: Path, canary: Path, secret: Path, draw: random.Random) -> None:
        file.write_text(template.replace("CANARY", str(canary)).replace("SECRET", str(secret)))

    return write


def _linked(target: Callable[[Path], str]) -> Callable[..., None]:
    return lambda file, canary, secret, draw: file.symlink_to(target(secret))


_PAYLOADS: dict[str, Callable[..., None]] = {
    "a pickle": _pickled,
    "torch's zip": _torch_zip,
    "torch's tar": _torch_tar,
    "an array of objects": _numpy_object,
    "overlapping tensors": _safetensors(_overlapping),
    "tensors beyond the file": _safetensors(_outside),
    "tensors of absurd size": _safetensors(_absurd),
    "a header of 2^63 bytes": lambda file, canary, secret, draw: file.write_bytes(struct.pack("<Q", 2**63) + bytes(64)),
    "a huge PNG": _huge_png,
    "an SVG": _text('<svg xmlns="http://www.w3.org/2000/svg"><image href="file://SECRET"/></svg>'),
    "XML entities": _text('<!DOCTYPE a [<!ENTITY b SYSTEM "file://SECRET">]><a>&b;</a>'),
    "Python": _text("import os\nos.system('touch CANARY')\n"),
    "JSON with a class": _text('{"_class_name": "os.system", "__reduce__": ["os.system", "touch CANARY"]}'),
    "JSON with a module": _text('{"auto_map": {"AutoModel": "evil.Model"}, "_class_name": ["evil", "Model"]}'),
    "YAML with a tag": _text("!!python/object/apply:os.system ['touch CANARY']\n"),
    "deep JSON": _text("[" * 200_000),
    "PostScript": _text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(SECRET) (r) file\n"),
    "a FIFO": lambda file, canary, secret, draw: os.mkfifo(file),
    "a folder": lambda file, canary, secret, draw: file.mkdir(),
    "an endless device": _linked(lambda secret: "/dev/zero"),
    "a link to itself": lambda file, canary, secret, draw: file.symlink_to(file),
}

CAMPAIGN = Campaign(
    "hostile",
    "A hostile file (pickles, archives, crafted headers, images, JSON, FIFOs, devices) in the place of a checkpoint, "
    "cache, model, autoencoder, prepared folder, image, mask or parser is an error that names it; nothing is executed, "
    "no environment read, no socket opened",
    opened,
    1000,
    prepare,
    limit=10,
)
