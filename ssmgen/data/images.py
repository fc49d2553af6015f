"""Image and mask files: decoded in full or rejected by name; nothing is padded, truncated, rescaled or guessed."""

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmgen.atomic import whole_file
from ssmgen.data.files import IMAGE_SUFFIXES
from ssmgen.data.labels import LabelSet, check_labels
from ssmgen.reading import open_regular, read_bytes


def read_image(path: str | Path) -> Tensor:
    """Read a photo as ``(3, height, width)`` uint8 RGB, rotated as its EXIF data says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a regular file (a FIFO, a device, a folder), not a JPEG, PNG, WebP or BMP image, damaged,
            truncated, animated, too large (Pillow's limit against decompression bombs), or without an exact 8-bit RGB
            form (16-bit, CMYK, transparent).
    """
    return decode_image(path, _content(path))


def decode_image(path: str | Path, data: bytes) -> Tensor:
    """`read_image` of the content of a file, ``(3, height, width)`` uint8; ``path`` names it in messages."""
    from PIL import ImageOps

    image = _decode(path, data, sorted(set(IMAGE_SUFFIXES.values())))
    return from_pil(ImageOps.exif_transpose(image).convert("RGB"))


def read_mask(path: str | Path, labels: LabelSet) -> Tensor:
    """Read a mask as ``(height, width)`` uint8 class ids.

    8-bit grey values, palette indices and three equal channels are the ids themselves. RGB colours are looked up in
    ``labels.palette`` and must match exactly.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable PNG of these kinds, a colour that is not in the palette, or a label outside the set;
            the message gives the value, the number of its pixels and the first position.
    """
    return decode_mask(path, _content(path), labels)


def decode_mask(path: str | Path, data: bytes, labels: LabelSet) -> Tensor:
    """`read_mask` of the content of a file, ``(height, width)`` uint8; ``path`` names it in messages."""
    if data.startswith(b"\xff\xd8"):
        raise ValueError(f"{path}: is a JPEG, whose compression alters labels; masks must be PNG files")
    image = _decode(path, data, ["PNG"])
    if image.mode in ("P", "RGB"):
        mask = pil_to_labels(path, image, labels)
    else:  # Pillow stretches 1-, 2- and 4-bit grey to 0..255, which would turn label 1 into 17
        mask = from_pil(image.convert("L")) // (255 // (2 ** _png_depth(data) - 1))
    check_labels(mask, len(labels), where=str(path))
    return mask


def mask_shape(path: str | Path) -> tuple[int, int]:
    """(height, width) of a mask, from the header of its file alone.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a regular file, or not a PNG file; names it.
    """
    from PIL import Image

    try:
        with open_regular(Path(path).expanduser()) as stream:
            image = Image.open(stream, formats=["PNG"])
            return image.height, image.width
    except FileNotFoundError:
        raise
    except Exception as error:  # on crafted files Pillow raises nearly every built-in exception
        reason = str(error) if str(path) in str(error) else f"{path}: is not a readable PNG file"
        raise ValueError(reason) from error


def write_png(path: str | Path, pixels: Tensor) -> None:
    """Write ``(height, width)`` labels or a ``(3, height, width)`` RGB image, uint8, as a PNG file.

    The file appears under its name only when it is complete; an existing file is replaced.

    Raises:
        TypeError: not uint8.
        ValueError: another shape.
        OSError: the disk is full or not writable; the message names the file.
    """
    with whole_file(Path(path).expanduser(), durable=False) as partial:
        to_pil(pixels).save(partial, format="PNG")


def to_pil(pixels: Tensor) -> Any:
    """A PIL image of ``(height, width)`` labels or a ``(3, height, width)`` RGB image, uint8, without numpy.

    Raises:
        TypeError: not uint8.
        ValueError: another shape.
    """
    from PIL import Image

    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels must be uint8 (0..255), got {pixels.dtype}")
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[0] != 3) or 0 in pixels.shape:
        raise ValueError(f"expected (height, width) or (3, height, width), got {tuple(pixels.shape)}")
    mode, last = ("L", pixels) if pixels.ndim == 2 else ("RGB", pixels.movedim(0, -1))
    buffer = bytearray(last.numel())
    torch.frombuffer(buffer, dtype=torch.uint8).copy_(last.flatten())
    return Image.frombytes(mode, (pixels.shape[-1], pixels.shape[-2]), bytes(buffer))


def from_pil(image: Any) -> Tensor:
    """The inverse of `to_pil`: ``(height, width)`` of an ``L`` or ``P`` image, ``(3, height, width)`` of ``RGB``."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    if image.mode == "RGB":
        return flat.view(image.height, image.width, 3).movedim(-1, 0).contiguous()
    return flat.view(image.height, image.width)


def _content(path: str | Path) -> bytes:
    file = Path(path).expanduser()
    try:
        return read_bytes(file)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(str(error)) from error


def _decode(path: str | Path, data: bytes, formats: list[str]) -> Any:
    """Decode to mode ``1``, ``L``, ``P`` or ``RGB`` in full: a damaged file fails here, not in a worker later."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ValueError(f"{path}: is empty (0 bytes)")
    try:
        image: Any = Image.open(BytesIO(data), formats=formats)
        limit = Image.MAX_IMAGE_PIXELS
        # Up to twice the limit Pillow only warns, which is lost in a worker.
        if limit is not None and image.width * image.height > limit:
            raise ValueError(f"{image.width} x {image.height} pixels exceed PIL.Image.MAX_IMAGE_PIXELS = {limit}")
        # A phone's JPEG may carry a preview as a second frame (Pillow calls that MPO): its first frame is the photo.
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"has {image.n_frames} frames; expected a still image")
        image.load()
    except UnidentifiedImageError:
        expected = " or ".join(", ".join(formats).rsplit(", ", 1))
        raise ValueError(
            f"{path}: is not a {expected} image, or its header is damaged (starts with {data[:8]!r})"
        ) from None
    # On crafted files Pillow raises nearly every built-in exception; all of them mean the same here.
    except Exception as error:
        reason = (str(error) or type(error).__name__).rstrip(".")
        raise ValueError(f"{path}: cannot be decoded ({reason})") from error
    if image.mode.startswith(("I", "F")) or _png_depth(data) > 8:
        raise ValueError(f"{path}: has 16 or more bits per channel; save it with 8")
    image = without_opaque_alpha(image)
    if image.mode in ("LA", "RGBA"):
        raise ValueError(f"{path}: has transparent pixels; save it without an alpha channel")
    if image.mode not in ("1", "L", "P", "RGB"):
        raise ValueError(f"{path}: is a {image.mode} image; save it as RGB")
    return image


def _png_depth(data: bytes) -> int:
    """Bits per channel in the header of a PNG file, which Pillow does not keep; 0 for other formats."""
    return data[24] if data.startswith(b"\x89PNG\r\n\x1a\n") else 0


def without_opaque_alpha(image: Any) -> Any:
    """The image without its alpha channel if that is opaque, else the image unchanged."""
    opaque = image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema() == (255, 255)
    return image.convert(image.mode.removesuffix("A")) if opaque else image


def pil_to_labels(name: str | Path, image: Any, labels: LabelSet) -> Tensor:
    """Class ids ``(height, width)`` of an ``L``, ``P`` or ``RGB`` image.

    Raises:
        ValueError: a colour that is not in the palette, or an image palette that contradicts its indices; names it.
    """
    pixels = from_pil(image)
    if image.mode == "RGB":
        return colours_to_labels(name, pixels, labels)
    if image.mode == "P":
        _check_palette(name, image, pixels, labels)
    return pixels


def _check_palette(path: str | Path, image: Any, mask: Tensor, labels: LabelSet) -> None:
    """Reject a palette that holds the colours of the classes at other indices: one of the two is wrong."""
    flat = image.getpalette("RGB") or []
    colours = {i: tuple(flat[3 * i : 3 * i + 3]) for i in mask.unique().tolist()}
    if not set(colours.values()) <= set(labels.palette):
        return
    for index, colour in colours.items():
        id = labels.palette.index(colour)
        if id != index:
            raise ValueError(
                f"{path}: index {index} has the colour of class {id} ({labels.classes[id]}) in {labels.name}; "
                "the two disagree. Read it with the label set it was made with, or save it as 8-bit grey "
                "labels, or as RGB if the colours are right."
            )


def colours_to_labels(path: str | Path, pixels: Tensor, labels: LabelSet) -> Tensor:
    """Class ids ``(height, width)`` of colours ``(3, height, width)`` uint8; grey outside the palette is read as ids.

    Raises:
        ValueError: a colour that is not in the palette; the message names ``path``.
    """
    codes = _colour_codes(pixels)
    known, order = _colour_codes(torch.tensor(labels.palette).T).sort()
    place = torch.searchsorted(known, codes).clamp(max=len(known) - 1)
    matched = known[place] == codes
    if bool(matched.all()):
        return order[place].to(torch.uint8)
    if torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2]):
        return pixels[0]
    row, column = (~matched).nonzero()[0].tolist()
    raise ValueError(
        f"{path}: colour {tuple(pixels[:, row, column].tolist())} is not in the palette of {labels.name}; "
        f"{int((~matched).sum())} pixel(s) have such colours, the first at (row, column) = ({row}, {column}). "
        "Save the mask as 8-bit grey labels."
    )


def _colour_codes(pixels: Tensor) -> Tensor:
    red, green, blue = pixels.int()
    return red * 65536 + green * 256 + blue
