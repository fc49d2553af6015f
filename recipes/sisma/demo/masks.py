"""Masks between browser and model: runs of labels as text, and uploaded PNGs, both capped and checked before use.

The page sends masks as text, never as files: ``"64 0x128,13x20,..."`` is the side of a square and how often each label
follows the one before, row by row.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmgen.data import LABEL_SETS, LabelSet, check_labels, remap
from ssmgen.data.images import from_pil, to_pil
from ssmgen.data.labels import likelier_order
from ssmgen.data.transforms import center_crop_resize_mask

#: Side in pixels and size in bytes of the largest upload.
MAX_SIDE, MAX_BYTES = 1024, 5_000_000
#: Mean distance to the nearest class colour (of 441) from which on an RGB image is taken for a photograph.
FAR = 40.0

_MAX_TEXT = 6 * MAX_SIDE**2  # every pixel a run of its own
_PNG = b"\x89PNG\r\n\x1a\n"
_RUNS = re.compile(r"\d{1,4} \d{1,3}x\d{1,7}(,\d{1,3}x\d{1,7})*")


class Refused(ValueError):
    """What a client sent is not taken; the message is meant for a person."""


def to_text(mask: Tensor) -> str:
    """A square mask ``(side, side)`` as text."""
    labels, counts = torch.unique_consecutive(mask.flatten(), return_counts=True)
    runs = (f"{label}x{count}" for label, count in zip(labels.tolist(), counts.tolist(), strict=True))
    return f"{mask.shape[0]} {','.join(runs)}"


def from_text(text: Any, labels: LabelSet) -> Tensor:
    """The reverse of `to_text`: ``(side, side)`` uint8.

    Raises:
        Refused: not such a text, a side above `MAX_SIDE`, or a label outside the set.
    """
    if not text:
        raise Refused("There is no mask yet: paint one, take an example, or upload one.")
    if not isinstance(text, str) or len(text) > _MAX_TEXT or not _RUNS.fullmatch(text):
        raise Refused("The mask did not arrive whole: reload the page.")
    side, _, runs = text.partition(" ")
    square = int(side) ** 2
    fits = 1 <= int(side) <= MAX_SIDE and runs.count(",") < square
    pairs = np.fromstring(runs.replace("x", ","), dtype=np.int64, sep=",").reshape(-1, 2) if fits else np.zeros((1, 2))
    values, counts = torch.from_numpy(pairs).T
    if int(counts.sum()) != square or not fits:
        raise Refused(f"The mask must be a square of at most {MAX_SIDE} pixels; the mask sent is not.")
    if int(values.max()) >= len(labels):
        raise Refused(f"The mask has a label {int(values.max())}; the model's classes are 0 to {len(labels) - 1}.")
    return torch.repeat_interleave(values.to(torch.uint8), counts).view(int(side), int(side))


@dataclass(frozen=True)
class Upload:
    """A mask from a file: labels ``(side, side)`` uint8, and what was done to it, in words."""

    mask: Tensor
    notes: tuple[str, ...] = ()


def from_upload(encoded: Any, labels: LabelSet, side: int, order: str = "") -> Upload:
    """A mask from a PNG file's bytes in base64: ids as grey or palette indices, or class colours.

    Colours between those of classes, as antialiased edges have them, go to the nearest class. What is not square is cut
    to its middle, what is larger or smaller than the model's side is brought to it by nearest neighbour.

    Args:
        encoded: the text.
        labels: what the ids of the result mean.
        side: of the result.
        order: the label set whose ids the file has, see `ssmgen.data.LABEL_SETS`; ``labels`` where empty.

    Raises:
        Refused: too large (checked in the header, before anything is decoded), not a PNG, damaged, or not a mask.
    """
    source = LABEL_SETS.get(order, labels)
    ids, moved = _labels_of(_open(_decoded(encoded)), source)
    notes = [_moved(moved, ids.numel())] if moved else []
    try:
        check_labels(ids, len(source), where="the file")
    except ValueError as error:
        raise Refused(f"{str(error).partition('. ')[0].capitalize()}: it is no mask of {source.name}.") from error
    mask = ids if source == labels else remap(ids, source, labels)
    other = likelier_order(mask, labels)
    if other is not None:
        notes.append(f"Its areas look like the order {other.name}: if the picture is wrong, choose that and try again.")
    height, width = mask.shape
    if height != width:
        notes.append(f"It was {width} x {height}: the middle square was taken.")
    return Upload(center_crop_resize_mask(mask, side), tuple(notes))


def _labels_of(image: Any, labels: LabelSet) -> tuple[Tensor, int]:
    """Ids, and how many pixels were moved to the nearest class. Class colours in a palette outweigh its indices."""
    if image.mode == "P":
        used = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=256)}
        if not used <= set(labels.palette):
            return from_pil(image), 0
    return (from_pil(image), 0) if image.mode == "L" else snap(from_pil(image.convert("RGB")), labels)


def snap(pixels: Tensor, labels: LabelSet) -> tuple[Tensor, int]:
    """Each pixel's nearest class.

    Args:
        pixels: colours ``(3, height, width)`` uint8.
        labels: the classes and their colours.

    Returns:
        Labels ``(height, width)`` uint8, and how many pixels had no class's colour. Three equal channels that are no
        class's colours are ids themselves.

    Raises:
        Refused: the colours are on the whole so far from all classes' that this is no mask.
    """
    palette = torch.tensor(labels.palette, dtype=torch.float32)
    colours, place = pixels.flatten(1).T.unique(dim=0, return_inverse=True)
    if bool((colours == colours[:, :1]).all()) and int(colours.max()) < len(labels):
        return pixels[0], 0
    nearest = [torch.cdist(part, palette).min(1) for part in colours.float().split(65536)]
    far = torch.cat([each.values for each in nearest])[place]
    if float(far.mean()) > FAR:
        raise Refused(
            "This looks like a photograph, not a mask: its colours are far from all classes'. A mask has one flat "
            f"colour of {labels.name} for each class, or class ids as grey values 0 to {len(labels) - 1}."
        )
    classes = torch.cat([each.indices for each in nearest])[place]
    return classes.view(pixels.shape[1:]).to(torch.uint8), int((far > 0).sum())


def as_png(pixels: Tensor, labels: LabelSet | None = None) -> bytes:
    """PNG bytes of ``(3, h, w)`` colours or ``(h, w)`` labels, uint8; labels get a palette where a set is given."""
    image = to_pil(pixels)
    if labels is not None:
        image.putpalette([value for colour in labels.palette for value in colour])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(png: bytes) -> str:
    """PNG bytes as an address that an image tag takes."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def image_from(url: Any, side: int) -> Tensor:
    """The reverse for an image the page made: ``(3, side, side)`` uint8.

    Raises:
        Refused: not such an address, or of another size.
    """
    if not isinstance(url, str) or not url.startswith("data:image/png;base64,"):
        raise Refused("There is no image to change yet: generate one, or choose one of those below.")
    image = _open(_decoded(url.partition(",")[2]))
    if image.mode != "RGB" or image.size != (side, side):
        raise Refused(f"The image to change must be {side} x {side} pixels; the one sent is not. Reload the page.")
    return from_pil(image)


def _decoded(encoded: Any) -> bytes:
    if not isinstance(encoded, str) or not encoded:
        raise Refused("No file arrived: choose a PNG file.")
    if len(encoded) > MAX_BYTES * 4 // 3 + 4:
        raise Refused(f"The file is larger than {MAX_BYTES // 1_000_000} MB: save the mask as an 8-bit PNG.")
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise Refused("The file did not arrive whole: try again.") from error


def _open(data: bytes) -> Any:
    """Decode a PNG whose header says that it is small enough."""
    from PIL import Image

    if not data.startswith(_PNG) or len(data) < 26 or data[12:16] != b"IHDR":
        kind = "a JPEG, whose compression alters labels" if data.startswith(b"\xff\xd8") else "not a PNG file"
        raise Refused(f"The file is {kind}: masks are PNG files.")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise Refused(f"The image is {width:,} x {height:,} pixels; the page takes at most {MAX_SIDE} x {MAX_SIDE}.")
    if depth > 8 or (depth < 8 and colour != 3):
        raise Refused(f"The PNG has {depth} bits per channel: save it with 8.")
    try:
        image: Any = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.size != (width, height) or getattr(image, "n_frames", 1) > 1:
            raise ValueError("an animation, or two sizes in one file")
        image.load()
    except Exception as error:  # Pillow raises nearly every built-in exception on crafted files
        raise Refused(f"The PNG is damaged and cannot be read ({str(error).rstrip('.')}).") from error
    if "A" in image.getbands() or "transparency" in image.info:
        return _opaque(image)
    if image.mode not in ("L", "P", "RGB"):
        raise Refused(f"The PNG is a {image.mode} image: save it as 8-bit grey labels, with a palette, or as RGB.")
    return image


def _opaque(image: Any) -> Any:
    if image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise Refused("The PNG has transparent pixels, which are no class: fill them with the background's colour.")
    return image.convert("L" if image.mode == "LA" else "P" if image.mode == "P" else "RGB")


def _moved(count: int, total: int) -> str:
    share = f"{count:,} of {total:,} pixels ({100 * count / total:.1f} %)"
    return f"{share} had colours between those of classes and went to the nearest."
