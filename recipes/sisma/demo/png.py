"""PNG files between browser and server: size limits, checked decoding, encoding."""

from __future__ import annotations

import base64
import binascii
import io
import struct
from typing import Any

from torch import Tensor

from recipes.sisma.demo.errors import InvalidRequest
from ssmgen.data import LabelSet
from ssmgen.data.images import from_pil, to_pil

#: Largest accepted side in pixels and file size in bytes.
MAX_SIDE, MAX_BYTES = 1024, 5_000_000
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


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


def image_from_url(url: Any, side: int) -> Tensor:
    """Image ``(3, side, side)`` uint8 of a data URL that the page made.

    Raises:
        InvalidRequest: not a data URL of a PNG, or an image of another size.
    """
    if not isinstance(url, str) or not url.startswith("data:image/png;base64,"):
        raise InvalidRequest("There is no picture to change yet: generate one, or choose one of the results.")
    image = decode_png(url.partition(",")[2])
    if image.mode != "RGB" or image.size != (side, side):
        raise InvalidRequest(f"The picture to change must be {side} x {side} pixels; this one is not. Reload the page.")
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
        raise InvalidRequest(
            f"The PNG is a {image.mode} image: save it as 8-bit grey labels, with a palette, or as RGB."
        )
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
