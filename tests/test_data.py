"""Reading and writing images and masks, paired transforms, and the prepared folder."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ssmgen.atomic import whole_folder
from ssmgen.data.balance import class_weights, repeats
from ssmgen.data.crops import Crops
from ssmgen.data.folder import (
    PreparedFolder,
    check_target,
    load_splits,
    match_stems,
    write_pair,
    write_records,
)
from ssmgen.data.images import read_image, read_mask, to_pil, write_png
from ssmgen.data.labels import BISENET19, CELEBAMASK19
from ssmgen.data.transforms import (
    center_crop_resize,
    center_crop_resize_mask,
    check_same_shape,
    crop_resize,
    flip_pair,
)


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
    """A grey PNG from its parts: Pillow writes none of 1, 2 or 4 bits, nor one that lies about its size."""
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    return path


def grey_png(path: Path, rows: list[list[int]], bits: int) -> Path:
    lines = [b"\0" + int("".join(f"{v:0{bits}b}" for v in row), 2).to_bytes(len(row) * bits // 8) for row in rows]
    return raw_png(path, len(rows[0]), len(rows), bits, b"".join(lines))


# --- masks ---


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
    made = {name: (folder / name, reason) for name, (_, reason) in contents.items()}
    made["folder.png"] = (folder / "folder.png", "cannot be read")
    made["folder.png"][0].mkdir()
    # Pillow refuses twice its limit of 89 million pixels, and between the two it only warns: we refuse both.
    made["bomb.png"] = (raw_png(folder / "bomb.png", 60_000, 60_000, 8, b""), "decompression bomb")
    made["large.png"] = (raw_png(folder / "large.png", 10_000, 10_000, 8, b""), "10000 x 10000 pixels exceed")
    made["deep.png"] = (grey_png(folder / "deep.png", [[1, 2], [3, 4]], 16), "16 or more bits")
    made["moving.png"] = (
        png(frames[0], folder / "moving.png", save_all=True, append_images=frames[1:]),
        "has 2 frames",
    )
    return made


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


# --- images ---


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


# --- transforms ---


def test_crop_and_resize_keep_image_and_mask_aligned_across_resolutions() -> None:
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[10:30, 20:40] = 1
    image = (mask * 255).repeat_interleave(2, 0).repeat_interleave(2, 1).expand(3, -1, -1)
    for size in (20, 40, 33, (20, 30), (16, 40)):
        small_image, small_mask = center_crop_resize(image, mask, size)
        assert small_image.shape[-2:] == small_mask.shape == (size if isinstance(size, tuple) else (size, size))
        apart = (small_image[0] > 127) != (small_mask == 1)
        assert int(apart.sum()) <= sum(small_mask.shape), f"only edge pixels may differ at {size}"
        assert set(small_mask.unique().tolist()) <= {0, 1}


def test_no_size_takes_the_largest_square_both_have_pixels_for() -> None:
    image, mask = center_crop_resize(photo(80, 120), torch.zeros(40, 60, dtype=torch.uint8), None)
    assert image.shape == (3, 40, 40) and mask.shape == (40, 40)


def test_a_pair_of_the_right_size_is_untouched() -> None:
    mask = torch.randint(0, 19, (16, 16), dtype=torch.uint8)
    image, same = center_crop_resize(photo(), mask, 16)
    assert torch.equal(image, photo()) and torch.equal(same, mask)


@pytest.mark.parametrize("shape", [(16, 15), (15, 16), (32, 16), (8, 6)])
def test_other_aspect_ratios_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"image is 16 x 16 and mask {shape[0]} x {shape[1]}"):
        check_same_shape(photo(), torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize(("image", "mask"), [((1024, 1024), (512, 512)), ((667, 1000), (341, 512)), ((9, 9), (9, 9))])
def test_another_scale_and_its_rounding_are_accepted(image: tuple[int, int], mask: tuple[int, int]) -> None:
    check_same_shape(torch.empty(3, *image), torch.empty(mask))


class Squares:
    """Three grey pictures with a square that image and mask share, at two resolutions."""

    labels = CELEBAMASK19

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        mask = torch.zeros(60, 60, dtype=torch.uint8)
        mask[20 + index : 40, 15:45] = 1
        return (mask * 255).repeat_interleave(2, 0).repeat_interleave(2, 1).expand(3, -1, -1), mask

    def fingerprint(self) -> str:
        return "squares"


def test_crops_are_the_centre_and_then_parts_cut_alike_from_image_and_mask() -> None:
    crops = Crops(Squares(), 30, 4, smallest=0.7, seed=1)
    assert len(crops) == 12
    areas = []
    for index in range(12):
        image, mask = crops[index]
        assert image.shape == (3, 30, 30) and mask.shape == (30, 30)
        assert int(((image[0] > 127) != (mask == 1)).sum()) <= 60, "only edge pixels may differ"
        assert torch.equal(Crops(Squares(), 30, 4, smallest=0.7, seed=1)[index][0], image)
        areas.append(int(mask.sum()))
    centre = center_crop_resize(*Squares()[0], 30)
    assert torch.equal(crops[0][0], centre[0]) and torch.equal(crops[0][1], centre[1])
    assert len(set(areas[1:4])) > 1 and min(areas[1:4]) >= areas[0]  # parts are enlarged, each by another factor
    assert len({Crops(Squares(), 30, count, 0.7, seed).fingerprint() for count in (1, 2) for seed in (0, 1)}) == 4


def test_impossible_crops_are_refused() -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        Crops(Squares(), 30, 0)
    with pytest.raises(ValueError, match="smallest must be in"):
        Crops(Squares(), 30, 2, smallest=0)
    with pytest.raises(ValueError, match="share must be in"):
        crop_resize(*Squares()[0], 30, share=1.5)
    with pytest.raises(IndexError, match="crop 12 of 12"):
        Crops(Squares(), 30, 4)[12]


def test_a_size_below_one_pixel_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        center_crop_resize_mask(torch.zeros(4, 4, dtype=torch.uint8), 0)


@given(mask=label_maps())
@settings(max_examples=25, deadline=None)
def test_flipping_swaps_left_and_right_and_twice_is_nothing(mask: Tensor) -> None:
    image = photo(*mask.shape)
    flipped_image, flipped = flip_pair(image, mask, CELEBAMASK19)
    swapped = {4: 5, 5: 4, 6: 7, 7: 6, 8: 9, 9: 8}
    assert flipped.tolist() == [[swapped.get(value, value) for value in row[::-1]] for row in mask.tolist()]
    assert torch.equal(flipped_image, image.flip(-1))
    assert torch.equal(flip_pair(flipped_image, flipped, CELEBAMASK19)[1], mask)


# --- pairs and the prepared folder ---


def make_prepared(root: Path, ids: tuple[str, ...] = ("a", "b.c", "10")) -> Path:
    with whole_folder(root) as folder:
        hashes = {}
        for number, id in enumerate(ids):
            mask = torch.full((16, 16), number + 1, dtype=torch.uint8)
            hashes |= write_pair(folder, id, photo(seed=number), mask)
        splits = {"train": list(ids[:-1]), "test": list(ids[-1:]), "val": []}
        write_records(folder, CELEBAMASK19, splits, hashes, {"layout": "test"})
    return root


def test_a_prepared_folder_reads_back_what_was_written(tmp_path: Path) -> None:
    pairs = PreparedFolder(make_prepared(tmp_path / "p"), "train")
    assert pairs.labels == CELEBAMASK19 and pairs.ids == ["a", "b.c"] and len(pairs) == 2
    image, mask = pairs[1]
    assert torch.equal(image, photo(seed=1)) and mask.unique().tolist() == [2]
    assert PreparedFolder(tmp_path / "p", "test", size=(4, 8))[0][0].shape == (3, 4, 8)


def test_the_fingerprint_tells_data_split_and_size_apart(tmp_path: Path) -> None:
    root, moved, other = (make_prepared(tmp_path / name) for name in ("p", "moved", "q"))
    make_prepared(tmp_path / "r", ("x", "y", "z"))
    prints = [
        PreparedFolder(root, "train").fingerprint(),
        PreparedFolder(root, "test").fingerprint(),
        PreparedFolder(root, "train", 8).fingerprint(),
        PreparedFolder(tmp_path / "r", "train").fingerprint(),
    ]
    assert len(set(prints)) == 4
    assert PreparedFolder(moved, "train").fingerprint() == PreparedFolder(other, "train").fingerprint() == prints[0]
    assert str(tmp_path) not in (root / "prepared.json").read_text()


def test_unknown_and_empty_splits_are_refused_with_the_list(tmp_path: Path) -> None:
    root = make_prepared(tmp_path / "p")
    with pytest.raises(
        ValueError, match=r"no split 'trian'. Did you mean 'train'.*train \(2 pairs\), test \(1 pairs\)"
    ):
        PreparedFolder(root, "trian")
    with pytest.raises(ValueError, match="split 'val' of .* is empty"):
        PreparedFolder(root, "val")


def test_all_missing_files_are_listed(tmp_path: Path) -> None:
    root = make_prepared(tmp_path / "p")
    (root / "images/a.png").unlink()
    (root / "masks/b.c.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)2 file\(s\).*images/a\.png: missing.*masks/b\.c\.png: missing"):
        PreparedFolder(root, "train")


def test_a_split_file_cannot_reach_outside_the_folder(tmp_path: Path) -> None:
    root = make_prepared(tmp_path / "p")
    write_png(tmp_path / "secret.png", photo())
    (root / "splits.json").write_text(json.dumps({"train": ["../../secret"]}))
    with pytest.raises(FileNotFoundError, match="not as prepared"):
        PreparedFolder(root, "train")


def test_no_prepared_folder_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder .*python -m recipes\.sisma\.prepare"):
        PreparedFolder(tmp_path / "nothing", "train")
    with pytest.raises(FileNotFoundError, match="is not a prepared folder"):
        PreparedFolder(tmp_path, "train")


@pytest.mark.parametrize("record", ["{", "[]", '{"format": 99, "files": {}}', '{"format": 1, "files": {}}'])
def test_damaged_records_are_refused(tmp_path: Path, record: str) -> None:
    root = make_prepared(tmp_path / "p")
    (root / "prepared.json").write_text(record)
    with pytest.raises(ValueError, match=r"prepared\.json: "):
        PreparedFolder(root, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "expected names with lists"),
        ('{"a": ["1"], "b": [1]}', "id '1' is in 'a' and again in 'b'"),
        ("x", "JSON"),
    ],
)
def test_split_files_are_checked(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "s.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_splits(file)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "p") as folder:
        write_pair(folder, "a", photo(), torch.zeros(16, 16, dtype=torch.uint8))
        raise KeyboardInterrupt
    assert not any(tmp_path.iterdir())


def test_targets_that_cannot_be_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        check_target(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="is a file"):
        check_target(tmp_path / "file" / "below" / "it")
    with pytest.raises(FileExistsError, match="not empty"):
        check_target(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="no permission to write"):
        check_target(tmp_path / "new")


def test_files_are_paired_by_stem_and_every_single_one_is_named(tmp_path: Path) -> None:
    for name in ("images/a.jpg", "images/b.png", "images/b.jpg", "images/c.webp", "masks/a.png", "masks/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "masks/c.jpg").touch()
    matched, problems = match_stems(tmp_path / "images", tmp_path / "masks")
    assert list(matched) == ["a"]
    assert {path.name for path, _ in problems} == {"b.png", "b.jpg", "c.webp", "c.jpg", "d.png"}


def test_rare_classes_are_repeated_by_the_root_of_their_rarity():
    common, rare = torch.tensor([[0, 1]]), torch.tensor([[0, 2]])
    masks = [rare, *[common] * 24]  # class 2 in 4 % of the masks: sqrt(0.64 / 0.04) = 4 times
    shown = repeats(masks, 0.64)
    assert [pair for pair in shown if pair[0] == 0] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert len(shown) == 28
    assert repeats(masks, 0.0) == [(i, 0) for i in range(25)]
    many = repeats([rare] * 100 + [common] * 900, 0.225, seed=1)  # sqrt(2.25) = 1.5: half of them twice
    assert 35 < len(many) - 1000 < 65
    assert many == repeats([rare] * 100 + [common] * 900, 0.225, seed=1)
    assert {index for index, _ in many} == set(range(1000))
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got 5"):
        repeats(masks, 5)


def test_class_weights_rise_with_rarity_and_average_one_over_the_pixels() -> None:
    mask = torch.zeros(10, 10, dtype=torch.uint8)
    mask[0, :4] = 1
    assert class_weights([mask], 3, 0.0) == [1.0, 1.0, 1.0]
    half = class_weights([mask], 3, 0.5, largest=100)
    assert half[1] / half[0] == pytest.approx((96 / 4) ** 0.5)
    assert 0.96 * half[0] + 0.04 * half[1] == pytest.approx(1)
    assert class_weights([mask], 3, 1.0)[1:] == [10.0, 10.0]  # the cap
    with pytest.raises(ValueError, match="power must be at least 0"):
        class_weights([mask], 3, -1)
