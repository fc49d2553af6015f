"""What browser and server exchange: PNG files, and masks as run-length text; all input is checked before use.

A mask as text, ``"64x48 0x128,13x20,..."``, is its height and width, then ``LABELxCOUNT`` for each run of equal labels
in row order.
"""

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

#: Largest accepted side in pixels and file size in bytes.
MAX_SIDE, MAX_BYTES = 1024, 5_000_000
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Mean RGB distance to the nearest class colour (at most 441) above which an image is considered a photograph.
MAX_COLOUR_DISTANCE = 40.0
_MAX_TEXT = 6 * MAX_SIDE**2  # every pixel a run of its own
_RUNS = re.compile(r"\d{1,4}x\d{1,4} \d{1,3}x\d{1,7}(,\d{1,3}x\d{1,7})*")


class InvalidRequest(ValueError):
    """The browser sent something the page does not accept; the message is shown there."""


def encode_png(pixels: Tensor, labels: LabelSet | None = None) -> bytes:
    """PNG bytes of colours ``(3, h, w)`` or labels ``(h, w)``, uint8; a label set adds its palette."""
    image = to_pil(pixels)
    if labels is not None:
        image.putpalette([value for colour in labels.palette for value in colour])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(png: bytes) -> str:
    """PNG bytes as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def image_from_url(url: Any, size: tuple[int, int]) -> Tensor:
    """Image ``(3, height, width)`` uint8 of a data URL that the page made; an InvalidRequest for anything else."""
    if not isinstance(url, str) or not url.startswith("data:image/png;base64,"):
        raise InvalidRequest("There is no picture to change yet: generate one, or choose one of the results.")
    image = decode_png(url.partition(",")[2])
    height, width = size
    if image.mode != "RGB" or image.size != (width, height):
        raise InvalidRequest(f"The picture must be {width} x {height} pixels; this one is not. Reload the page.")
    return from_pil(image)


def decode_png(encoded: Any) -> Any:
    """PIL image of a PNG file in base64: mode L, P or RGB, at most `MAX_SIDE` pixels wide and high.

    Size and depth are read from the header before anything is decoded.

    Raises:
        InvalidRequest: too large, not a PNG, damaged, or of an unsupported kind.
    """
    from PIL import Image

    data = _decode_base64(encoded)
    size = _check_header(data)
    try:
        image: Any = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.size != size or getattr(image, "n_frames", 1) > 1:
            raise ValueError("an animation, or two sizes in one file")
        image.load()
    except Exception as error:  # Pillow raises nearly every built-in exception on crafted files
        raise InvalidRequest(f"The PNG is damaged and cannot be read ({str(error).rstrip('.')}).") from error
    if "A" in image.getbands() or "transparency" in image.info:
        return _opaque(image)
    if image.mode not in ("L", "P", "RGB"):
        accepted = "8-bit grey labels, with a palette, or as RGB"
        raise InvalidRequest(f"The PNG is a {image.mode} image: save it as {accepted}.")
    return image


def _decode_base64(encoded: Any) -> bytes:
    if not isinstance(encoded, str) or not encoded:
        raise InvalidRequest("No file arrived: choose a PNG file.")
    if len(encoded) > MAX_BYTES * 4 // 3 + 4:
        raise InvalidRequest(f"The file is larger than {MAX_BYTES // 1_000_000} MB: save the mask as an 8-bit PNG.")
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise InvalidRequest("The file arrived incomplete: try again.") from error


def _check_header(data: bytes) -> tuple[int, int]:
    """Width and height that the header states."""
    if not data.startswith(_SIGNATURE) or len(data) < 26 or data[12:16] != b"IHDR":
        kind = "a JPEG, whose compression alters labels" if data.startswith(b"\xff\xd8") else "not a PNG file"
        raise InvalidRequest(f"The file is {kind}: masks are PNG files.")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise InvalidRequest(f"The image is {width:,} x {height:,} pixels; the limit is {MAX_SIDE} x {MAX_SIDE}.")
    if depth > 8 or (depth < 8 and colour != 3):
        raise InvalidRequest(f"The PNG has {depth} bits per channel: save it with 8.")
    return width, height


def _opaque(image: Any) -> Any:
    if image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise InvalidRequest(
            "The PNG has transparent pixels, which have no class: fill them with the background colour."
        )
    return image.convert("L" if image.mode == "LA" else "P" if image.mode == "P" else "RGB")


def to_text(mask: Tensor) -> str:
    """A mask ``(height, width)`` as text."""
    labels, counts = torch.unique_consecutive(mask.flatten(), return_counts=True)
    runs = (f"{label}x{count}" for label, count in zip(labels.tolist(), counts.tolist(), strict=True))
    return f"{mask.shape[0]}x{mask.shape[1]} {','.join(runs)}"


def from_text(text: Any, labels: LabelSet) -> Tensor:
    """The inverse of `to_text`, ``(height, width)`` uint8.

    Raises:
        InvalidRequest: malformed text, a side above `MAX_SIDE`, or a label outside the set.
    """
    if not text:
        raise InvalidRequest("There is no mask yet: paint one, choose an example, or upload one.")
    if not isinstance(text, str) or len(text) > _MAX_TEXT or not _RUNS.fullmatch(text):
        raise InvalidRequest("The mask arrived incomplete: reload the page.")
    first, _, runs = text.partition(" ")
    height, width = (int(side) for side in first.split("x"))
    area = height * width
    fits = 1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and runs.count(",") < area
    pairs = np.fromstring(runs.replace("x", ","), dtype=np.int64, sep=",").reshape(-1, 2) if fits else np.zeros((1, 2))
    values, counts = torch.from_numpy(pairs).T
    if not fits or int(counts.sum()) != area:
        raise InvalidRequest(f"The mask must have all its pixels, and at most {MAX_SIDE} a side; this one does not.")
    if int(values.max()) >= len(labels):
        raise InvalidRequest(f"The mask has label {int(values.max())}; the model's classes are 0 to {len(labels) - 1}.")
    return torch.repeat_interleave(values.to(torch.uint8), counts).view(height, width)


@dataclass(frozen=True)
class Upload:
    """An uploaded mask: labels ``(height, width)`` uint8, and notes on how the file was changed to fit."""

    mask: Tensor
    notes: tuple[str, ...] = ()


def from_upload(encoded: Any, labels: LabelSet, size: tuple[int, int], order: str = "") -> Upload:
    """Mask of a PNG file, brought to the model's size: see `ids_of_upload`.

    A mask of another aspect ratio is cut to its central part, and nearest-neighbour resizing does the rest.

    Args:
        encoded, labels, order: see `ids_of_upload`.
        size: (height, width) of the result in pixels.

    Raises:
        InvalidRequest: see `ids_of_upload`.
    """
    upload = ids_of_upload(encoded, labels, order)
    notes, (height, width) = list(upload.notes), upload.mask.shape
    if height * size[1] != width * size[0]:
        part = "square" if size[0] == size[1] else f"part of the shape {size[1]} x {size[0]}"
        notes.append(f"It was {width} x {height}: only the central {part} was kept.")
    return Upload(center_crop_resize_mask(upload.mask, size), tuple(notes))


def ids_of_upload(encoded: Any, labels: LabelSet, order: str = "") -> Upload:
    """Mask of a PNG file in its own size: class ids as grey values or palette indices, or class colours.

    Colours in between, such as those of antialiased edges, become the nearest class.

    Args:
        encoded: the file in base64.
        labels: label set of the result.
        order: label set of the file, a name in `ssmgen.data.LABEL_SETS`; ``labels`` if empty.

    Raises:
        InvalidRequest: the file is not an accepted PNG (see `decode_png`), or not a mask.
    """
    source = LABEL_SETS.get(order, labels)
    ids, changed = _label_ids(decode_png(encoded), source)
    notes = []
    if changed:
        share = f"{changed:,} of {ids.numel():,} pixels ({100 * changed / ids.numel():.1f} %)"
        notes.append(f"{share} had colours between those of two classes and were given the nearest.")
    try:
        check_labels(ids, len(source), where="the file")
    except ValueError as error:
        message = str(error).partition(". ")[0].capitalize()
        raise InvalidRequest(f"{message}: it is not a mask of {source.name}.") from error
    mask = ids if source == labels else remap(ids, source, labels)
    other = likelier_order(mask, labels)
    if other is not None:
        notes.append(f"Its regions look like the order {other.name}: if the mask looks wrong, upload it in that order.")
    return Upload(mask, tuple(notes))


def _label_ids(image: Any, labels: LabelSet) -> tuple[Tensor, int]:
    """Class ids, and how many pixels were snapped. A palette of class colours takes precedence over its indices."""
    if image.mode == "P":
        used = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=256)}
        if not used <= set(labels.palette):
            return from_pil(image), 0
    return (from_pil(image), 0) if image.mode == "L" else snap_to_palette(from_pil(image.convert("RGB")), labels)


def snap_to_palette(pixels: Tensor, labels: LabelSet) -> tuple[Tensor, int]:
    """The nearest class of each pixel ``(3, height, width)``, and the number of pixels without a class colour.

    An image of grey pixels whose values are all class ids is taken as ids.

    Raises:
        InvalidRequest: the mean distance to the class colours is above `MAX_COLOUR_DISTANCE`.
    """
    palette = torch.tensor(labels.palette, dtype=torch.float32)
    colours, index = pixels.flatten(1).T.unique(dim=0, return_inverse=True)
    if bool((colours == colours[:, :1]).all()) and int(colours.max()) < len(labels):
        return pixels[0], 0
    nearest = [torch.cdist(part, palette).min(1) for part in colours.float().split(65536)]
    distance = torch.cat([each.values for each in nearest])[index]
    if float(distance.mean()) > MAX_COLOUR_DISTANCE:
        raise InvalidRequest(
            "This looks like a photograph, not a mask: its colours are far from every class colour. A mask has the "
            f"flat colours of {labels.name}, or class ids as grey values 0 to {len(labels) - 1}."
        )
    classes = torch.cat([each.indices for each in nearest])[index]
    return classes.view(pixels.shape[1:]).to(torch.uint8), int((distance > 0).sum())
