"""Masks that the demo page receives: run-length text and uploaded files."""

import base64
import io
import struct
import zlib

import pytest
import torch
from PIL import Image

from recipes.sisma.demo.exchange import (
    MAX_BYTES,
    InvalidRequest,
    encode_png,
    from_text,
    from_upload,
    image_from_url,
    snap_to_palette,
    to_text,
)
from ssmgen.data import BISENET19, CELEBAMASK19, draw_face, remap
from ssmgen.data.images import to_pil

SIDE = 32


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def png_of(image: Image.Image, **settings) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **settings)
    return encoded(buffer.getvalue())


def header(width: int, height: int, depth: int = 8) -> bytes:
    """A PNG that says how large it is and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    ihdr = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    parts = chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.fixture(scope="module")
def face():
    return draw_face(2, SIDE)[1]


@pytest.mark.parametrize("seed", range(4))
def test_a_mask_comes_back_from_its_text(seed):
    mask = draw_face(seed, SIDE)[1]
    assert torch.equal(from_text(to_text(mask), CELEBAMASK19), mask)
    assert len(to_text(mask)) < mask.numel() * 2


BAD_TEXTS = [
    ("", "paint one"),
    (None, "paint one"),
    ({"a": 1}, "arrived incomplete"),
    ("/etc/passwd", "arrived incomplete"),
    ("2x2 0x4,", "arrived incomplete"),
    ("2x2 0x5", "all its pixels, and at most 1024 a side"),
    ("0x2 0x0", "at most 1024 a side"),
    ("9999x9999 0x99980001", "arrived incomplete"),
    ("1025x8 0x8200", "at most 1024 a side"),
    ("2x2 0x3,19x1", "label 19"),
    ("2x2 " + "0x1," * 300_000 + "0x1", "at most 1024 a side"),
    ("2x2 " + "0x1," * 3_000_000 + "0x1", "arrived incomplete"),
]


@pytest.mark.parametrize(("text", "message"), BAD_TEXTS, ids=range(len(BAD_TEXTS)))
def test_what_is_no_mask_is_refused(text, message):
    with pytest.raises(InvalidRequest, match=message):
        from_text(text, CELEBAMASK19)


def palette_image(mask, labels):
    image = to_pil(mask).copy()
    image.putpalette([value for colour in labels.palette for value in colour])
    return image


def test_each_kind_of_file_gives_the_same_mask(face):
    theirs = remap(face, CELEBAMASK19, BISENET19)
    grey_as_rgb = to_pil(face).convert("RGB")
    for file, order in [
        (png_of(to_pil(face)), ""),
        (png_of(grey_as_rgb), ""),
        (png_of(to_pil(CELEBAMASK19.colorize(face))), "celebamask19"),
        (png_of(to_pil(CELEBAMASK19.colorize(face)).convert("RGBA")), ""),
        (png_of(palette_image(face, CELEBAMASK19)), ""),
        (png_of(to_pil(theirs)), "bisenet19"),
        (png_of(palette_image(theirs, BISENET19)), "bisenet19"),
        (png_of(to_pil(BISENET19.colorize(theirs))), "bisenet19"),
        (png_of(palette_image(theirs, BISENET19)), "celebamask19"),  # colours say which class, whatever the index
    ]:
        upload = from_upload(file, CELEBAMASK19, (SIDE, SIDE), order)
        assert torch.equal(upload.mask, face), order
        assert upload.notes == ()


def test_ids_of_the_other_order_are_told(face):
    theirs = png_of(to_pil(remap(face, CELEBAMASK19, BISENET19)))
    assert "look like the order bisenet19" in from_upload(theirs, CELEBAMASK19, (SIDE, SIDE)).notes[0]


def test_edges_between_two_colours_go_to_the_nearest(face):
    colours = CELEBAMASK19.colorize(face).clone()
    colours[:, 5, 7] = torch.tensor([200, 12, 9], dtype=torch.uint8)  # skin is (204, 0, 0)
    colours[:, 6, 7] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    mask, moved = snap_to_palette(colours, CELEBAMASK19)
    expected = face.clone()
    expected[5, 7], expected[6, 7] = 1, 0
    assert torch.equal(mask, expected) and moved == 2
    note = from_upload(png_of(to_pil(colours)), CELEBAMASK19, (SIDE, SIDE)).notes[0]
    assert note.startswith("2 of 1,024 pixels (0.2 %)")


def test_what_is_not_square_is_cut_and_told(face):
    wide = torch.cat([torch.zeros(SIDE, 8, dtype=torch.uint8), face, torch.zeros(SIDE, 8, dtype=torch.uint8)], dim=1)
    upload = from_upload(png_of(to_pil(wide)), CELEBAMASK19, (SIDE, SIDE))
    assert torch.equal(upload.mask, face)
    assert upload.notes == ("It was 48 x 32: only the central square was kept.",)


def photo(kind="PNG"):
    buffer = io.BytesIO()
    image = torch.randint(90, 160, (3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    to_pil(image).save(buffer, format=kind)
    return encoded(buffer.getvalue())


def transparent(face):
    image = to_pil(CELEBAMASK19.colorize(face)).convert("RGBA")
    image.putpixel((0, 0), (0, 0, 0, 0))
    return png_of(image)


def animation(face):
    frames = [to_pil(face), to_pil(face.flip(0))]
    return png_of(frames[0], save_all=True, append_images=frames[1:])


BAD_FILES = {
    "no file": (lambda face: "", "choose a PNG"),
    "no text": (lambda face: {"a": 1}, "choose a PNG"),
    "no base64": (lambda face: "<svg>", "arrived incomplete"),
    "svg": (lambda face: encoded(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not a PNG file"),
    "passwords": (lambda face: encoded(b"root:x:0:0:root"), "not a PNG file"),
    "jpeg": (lambda face: photo("JPEG"), "JPEG, whose compression alters labels"),
    "too many bytes": (lambda face: encoded(header(8, 8) + bytes(MAX_BYTES)), "larger than 5 MB"),
    "huge header": (lambda face: encoded(header(60_000, 60_000)), "60,000 x 60,000 pixels; the limit is 1024"),
    "large header": (lambda face: encoded(header(1025, 8)), "1,025 x 8 pixels; the limit is 1024"),
    "no pixels": (lambda face: encoded(header(0, 8)), "0 x 8 pixels"),
    "16 bits": (lambda face: encoded(header(8, 8, 16)), "16 bits per channel"),
    "cut off": (lambda face: encoded(encode_png(face)[:60]), "damaged"),
    "lying header": (lambda face: encoded(header(64, 64)), "damaged"),
    "transparent": (transparent, "transparent pixels"),
    "animation": (animation, "damaged.*animation"),
    "photo": (lambda face: photo(), "looks like a photograph"),
    "label 19": (lambda face: png_of(to_pil(face.clone().fill_(19))), "label 19.*not a mask of celebamask19"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_refused_in_words(face, kind):
    make, message = BAD_FILES[kind]
    with pytest.raises(InvalidRequest, match=message):
        from_upload(make(face), CELEBAMASK19, (SIDE, SIDE))


def test_what_is_too_large_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(InvalidRequest, match="60,000 x 60,000"):
        from_upload(encoded(header(60_000, 60_000)), CELEBAMASK19, (SIDE, SIDE))
    with pytest.raises(InvalidRequest, match="5 MB"):
        from_upload("A" * 7_000_000, CELEBAMASK19, (SIDE, SIDE))


@pytest.mark.parametrize("given", [None, 3, "", "/etc/passwd", "http://127.0.0.1/x.png", {"url": "x"}])
def test_an_image_to_change_is_one_the_page_made(given):
    with pytest.raises(InvalidRequest, match="no picture to change yet"):
        image_from_url(given, (SIDE, SIDE))
