"""Reading and writing images and masks, also damaged ones."""

from __future__ import annotations

import io
import os
import socket
import struct
import time
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ssmgen.data.files import files_with, pair_files, unreadable
from ssmgen.data.images import read_image, read_mask, to_pil, write_png
from ssmgen.data.labels import BISENET19, CELEBAMASK19


@st.composite
def label_maps(draw: st.DrawFn) -> Tensor:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    values = draw(st.lists(st.integers(0, 18), min_size=height * width, max_size=height * width))
    return torch.tensor(values, dtype=torch.uint8).view(height, width)


def photo(height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def png(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, format="PNG", **options)
    return path


def raw_png(path: Path, width: int, height: int, bits: int, pixels: bytes) -> Path:
    """A grey PNG from its parts: Pillow cannot write 2 or 4 bits, 16-bit data, or a false size."""
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    return path


def grey_png(path: Path, rows: list[list[int]], bits: int) -> Path:
    lines = [b"\0" + int("".join(f"{v:0{bits}b}" for v in row), 2).to_bytes(len(row) * bits // 8) for row in rows]
    return raw_png(path, len(rows[0]), len(rows), bits, b"".join(lines))


@given(mask=label_maps())
@settings(max_examples=40, deadline=None)
def test_every_valid_mask_survives_writing_and_reading_in_every_encoding(
    mask: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("masks")
    write_png(folder / "grey.png", mask)
    write_png(folder / "colours.png", CELEBAMASK19.colorize(mask))
    write_png(folder / "three-grey.png", mask.expand(3, -1, -1))
    indexed = to_pil(mask)
    indexed.putpalette([value for colour in CELEBAMASK19.palette for value in colour])
    png(indexed, folder / "palette.png")
    for file in folder.iterdir():
        assert torch.equal(read_mask(file, CELEBAMASK19), mask), file.name


@given(mask=label_maps(), bad=st.integers(19, 255), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_label_out_of_range_is_refused_with_value_count_position_and_file(
    mask: Tensor, bad: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    row = data.draw(st.integers(0, mask.shape[0] - 1))
    column = data.draw(st.integers(0, mask.shape[1] - 1))
    mask[row, column] = bad
    file = tmp_path_factory.mktemp("masks") / "m.png"
    write_png(file, mask)
    with pytest.raises(ValueError) as raised:
        read_mask(file, CELEBAMASK19)
    message = str(raised.value)
    assert message.startswith(f"{file}: label {bad} ")
    assert "covers 1 pixel(s)" in message and f"({row}, {column})" in message


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_keeps_its_labels(tmp_path: Path, bits: int) -> None:
    rows = [[0, 1] * 4, [1, 0] * 4]
    read = read_mask(grey_png(tmp_path / "m.png", rows, bits), CELEBAMASK19)
    assert read.tolist() == rows, "Pillow stretches low-depth grey: label 1 of 4 bits would be 17, a valid class"


def test_a_palette_that_contradicts_its_indices_is_refused(tmp_path: Path) -> None:
    indexed = Image.new("P", (4, 4), 2)
    indexed.putpalette([value for colour in BISENET19.palette for value in colour])
    file = png(indexed, tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"m\.png: index 2 has the colour of class 6 \(l_brow\) in celebamask19"):
        read_mask(file, CELEBAMASK19)
    assert read_mask(file, BISENET19).unique().tolist() == [2]


def test_a_colour_outside_the_palette_is_named_with_its_place(tmp_path: Path) -> None:
    image = Image.new("RGB", (5, 4), CELEBAMASK19.palette[1])
    image.putpixel((3, 2), (204, 1, 0))
    with pytest.raises(ValueError, match=r"colour \(204, 1, 0\) is not in the palette.* 1 pixel.*\(2, 3\)"):
        read_mask(png(image, tmp_path / "m.png"), CELEBAMASK19)


def test_opaque_alpha_is_ignored_and_transparency_refused(tmp_path: Path) -> None:
    opaque = Image.new("RGBA", (4, 4), (*CELEBAMASK19.palette[5], 255))
    assert read_mask(png(opaque, tmp_path / "a.png"), CELEBAMASK19).unique().tolist() == [5]
    opaque.putpixel((0, 0), (0, 0, 0, 0))
    with pytest.raises(ValueError, match=r"b\.png: has transparent pixels"):
        read_mask(png(opaque, tmp_path / "b.png"), CELEBAMASK19)


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Damaged or unsuitable files, each with what its message must say."""
    folder.mkdir(exist_ok=True)
    whole = io.BytesIO()
    to_pil(photo(64, 64)).save(whole, "PNG")
    jpeg = io.BytesIO()
    to_pil(photo(64, 64)).save(jpeg, "JPEG")
    frames = [Image.new("L", (4, 4), value) for value in (1, 2)]
    contents = {
        "empty.png": (b"", "is empty"),
        "text.png": (b"hello world", "starts with b'hello wo'"),
        "cut.png": (whole.getvalue()[:5000], "cannot be decoded"),
        "header.png": (whole.getvalue()[:20], "cannot be decoded"),
        "cut.jpg": (jpeg.getvalue()[:1500], "cannot be decoded|is a JPEG"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    files = {name: (folder / name, reason) for name, (_, reason) in contents.items()}
    files["folder.png"] = (folder / "folder.png", "is a folder, not a regular file")
    files["folder.png"][0].mkdir()
    # Pillow rejects twice its limit of 89 million pixels and only warns below that: we reject both.
    files["bomb.png"] = (raw_png(folder / "bomb.png", 60_000, 60_000, 8, b""), "decompression bomb")
    files["large.png"] = (raw_png(folder / "large.png", 10_000, 10_000, 8, b""), "10000 x 10000 pixels exceed")
    files["deep.png"] = (grey_png(folder / "deep.png", [[1, 2], [3, 4]], 16), "16 or more bits")
    files["moving.png"] = (
        png(frames[0], folder / "moving.png", save_all=True, append_images=frames[1:]),
        "has 2 frames",
    )
    return files


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    for name, (file, reason) in bad_files(tmp_path).items():
        for read in (read_image, lambda path: read_mask(path, CELEBAMASK19)):
            with pytest.raises(ValueError, match=f"(?s){name}: .*({reason})"):
                read(file)


@given(cut=st.integers(0, 399), flips=st.lists(st.tuples(st.integers(0, 399), st.integers(1, 255)), max_size=4))
@settings(max_examples=60, deadline=None)
def test_corrupt_bytes_never_leave_as_anything_but_a_value_error(
    cut: int, flips: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    buffer = io.BytesIO()
    to_pil(photo(10, 12)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    for place, change in flips:
        content[place % len(content)] ^= change
    file = tmp_path_factory.mktemp("corrupt") / "x.png"
    file.write_bytes(content[: len(content) - cut])
    try:
        assert read_image(file).dtype == torch.uint8
    except ValueError as error:
        assert str(error).startswith(f"{file}: ")


def test_an_image_survives_writing_and_reading(tmp_path: Path) -> None:
    write_png(tmp_path / "x.png", photo(5, 7))
    assert torch.equal(read_image(tmp_path / "x.png"), photo(5, 7))
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"], "no temporary file is left"


def test_grey_and_palette_photos_become_rgb_and_others_are_refused(tmp_path: Path) -> None:
    for mode in ("1", "L", "P", "RGB"):
        assert read_image(png(Image.new(mode, (6, 4), 1), tmp_path / f"{mode}.png")).shape == (3, 4, 6)
    Image.new("CMYK", (4, 4)).save(tmp_path / "cmyk.jpg")
    with pytest.raises(ValueError, match=r"cmyk\.jpg: is a CMYK image; save it as RGB"):
        read_image(tmp_path / "cmyk.jpg")


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").shape == (3, 6, 4)


def test_a_missing_file_is_a_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.png: no such file"):
        read_image(tmp_path / "x.png")


def test_writing_refuses_other_types_and_shapes(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be uint8"):
        write_png(tmp_path / "x.png", torch.rand(3, 4, 4))
    with pytest.raises(ValueError, match=r"got \(4, 4, 3\)"):
        write_png(tmp_path / "x.png", torch.zeros(4, 4, 3, dtype=torch.uint8))
    assert not any(tmp_path.iterdir())


def odd_entries(folder: Path) -> dict[str, str]:
    """Entries named like images that are no files, by name, with what a message must say; one link that is one."""
    folder.mkdir(parents=True, exist_ok=True)
    os.mkfifo(folder / "fifo.png")
    (folder / "folder.png").mkdir()
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(folder / "socket.png"))  # a short name: the limit is 108 bytes
    kinds = {"fifo": "is a FIFO", "folder": "is a folder", "device": "is a device", "socket": "is a socket"}
    return {f"{name}.png": f"{kind}, not a regular file" for name, kind in kinds.items()}


def test_fifos_devices_and_sockets_are_refused_by_name_and_nothing_waits_for_them(tmp_path: Path) -> None:
    odd = odd_entries(tmp_path)
    for name, reason in odd.items():
        for read in (read_image, lambda path: read_mask(path, CELEBAMASK19)):
            with pytest.raises(ValueError, match=f"{name}: {reason}"):
                read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"gone\.png: no such file"):
        read_image(tmp_path / "gone.png")
    assert files_with(tmp_path, {".png"}) == []
    listed = {path.name: reason for path, reason in unreadable(tmp_path, {".png"})}
    assert listed == odd | {"gone.png": "is a link to a missing file"}
    problems = dict(pair_files(tmp_path, tmp_path)[1])
    assert {path.name for path in problems} == set(listed)
    write_png(tmp_path / "real.png", photo())
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    assert torch.equal(read_image(tmp_path / "link.png"), photo()), "a link to a file is a file"


def test_a_fifo_that_takes_the_place_of_a_file_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_png(tmp_path / "x.png", photo())
    regular = (tmp_path / "x.png").stat()
    (tmp_path / "x.png").unlink()
    os.mkfifo(tmp_path / "x.png")
    monkeypatch.setattr(Path, "stat", lambda *_, **__: regular)  # what was seen before
    with pytest.raises(ValueError, match=r"x\.png: is a FIFO, not a regular file"):
        read_image(tmp_path / "x.png")


def test_a_header_of_absurd_size_is_refused_at_once(tmp_path: Path) -> None:
    file = raw_png(tmp_path / "bomb.png", 60_000, 60_000, 8, b"")
    started = time.process_time()
    with pytest.raises(ValueError, match="decompression bomb"):
        read_image(file)
    assert time.process_time() - started < 1
