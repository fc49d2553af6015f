"""Tables that merge many labels into few classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssmgen.data import CELEBAMASK19, LabelSet, distinct_colours, flip_pair, read_merge_table

NAMES = ("null", "bag", "boots", "heels", "skin", "t-shirt", "39")
SOURCE = LabelSet("street", NAMES, distinct_colours(len(NAMES)))
GOOD = "background: null\n\n# a comment\nthings #0a0B0c: bag, t-shirt\n shoes : boots,heels , 39\nskin: 4\n"


def table(tmp_path: Path, text: str | bytes, source: LabelSet = SOURCE):
    file = tmp_path / "few.txt"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_merge_table(file, source)


@pytest.mark.parametrize("text", [GOOD, GOOD.replace("\n", "\r\n"), "\ufeff" + GOOD])
def test_a_table_gives_classes_and_a_lookup(tmp_path: Path, text: str) -> None:
    found = table(tmp_path, text)
    assert found.labels.name == "few" and found.labels.classes == ("background", "things", "shoes", "skin")
    assert found.labels.palette[:2] == ((0, 0, 0), (10, 11, 12)) and len(set(found.labels.palette)) == 4
    assert found.labels.mirrored == ()
    lookup = found.lookup()
    assert lookup.shape == (256,) and lookup.dtype == torch.uint8
    assert lookup.tolist() == [0, 1, 2, 2, 3, 1, 2, *[255] * 249]
    mask = torch.arange(7).view(1, 7)
    for dtype in (torch.uint8, torch.int64):
        assert found.merge(mask.to(dtype)).tolist() == [[0, 1, 2, 2, 3, 1, 2]]
    with pytest.raises(ValueError, match="mask.png: .*7"):
        found.merge(mask + 1, "mask.png")


def test_the_palette_is_always_the_same_and_distinct(tmp_path: Path) -> None:
    for count in (1, 20, 59, 256):
        colours = distinct_colours(count)
        assert len(set(colours)) == count and colours == distinct_colours(256)[:count] and colours[0] == (0, 0, 0)
    points = torch.tensor(distinct_colours(20)).double()
    assert torch.pdist(points).min() > 30, "the colours of few classes are told apart by eye"
    given = table(tmp_path, "a: 0\nb #000000: 1,2,3,4,5,6").labels.palette
    assert given[1] == (0, 0, 0) and given[0] != (0, 0, 0)
    with pytest.raises(ValueError, match="up to 256 classes, got 257"):
        distinct_colours(257)


FAULTS = [
    (GOOD.replace("bag, ", ""), r"1 fault\(s\).*\n  left out: 'bag' \(1\)$"),
    (GOOD.replace("skin: 4", "skin: 4, bag"), r"line 6: label 'bag' \(1\) is also in line 4"),
    (GOOD.replace("skin: 4", "skin: 4, 3"), r"line 6: label 'heels' \(3\) is also in line 5"),
    (GOOD.replace("skin: 4", "skin: 4, boot"), "line 6: unknown label 'boot'. Did you mean 'boots'"),
    (GOOD.replace("skin: 4", "skin: 4, 7"), r"line 6: unknown label '7'\. street has the ids 0 to 6"),
    (GOOD.replace("skin: 4", "skin: 4, " + "9" * 5000), "line 6: unknown label '9999"),
    (GOOD.replace("skin: 4", "skin: " + "0" * 5000 + "4"), "line 6: unknown label '0000"),
    (GOOD.replace("skin: 4", "skin: 4, -1"), "line 6: unknown label '-1'"),
    (GOOD + "more:\n", "line 7: class 'more' has no labels"),
    (GOOD + "more: ,\n", "line 7: class 'more' has no labels"),
    (GOOD.replace("skin: 4", "shoes: 4"), "1 fault.*\n  line 6: class 'shoes' is also in line 5: join the lines$"),
    (GOOD.replace("skin: 4", "skin #0A0b0c: 4"), "line 6: colour #0A0b0c is that of another class"),
    (GOOD.replace("skin: 4", "skin 4"), "line 6: expected 'name: label, ...' or .*, got 'skin 4'"),
    (GOOD.replace("skin: 4", "skin #abc: 4"), "line 6: expected .* got 'skin #abc: 4'"),
    (GOOD.replace("skin: 4", ": 4"), "line 6: expected .* got ': 4'"),
    ("", r"left out: 'null' \(0\), 'bag' \(1\), .*'39' \(6\)"),
    (b"a: \xff", "few.txt: is not UTF-8 text"),
]


@pytest.mark.parametrize(("text", "message"), FAULTS)
def test_faults_are_listed_with_file_and_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        table(tmp_path, text)
    assert str(raised.value).startswith(f"{tmp_path}/few.txt: ")


def test_too_many_classes_or_labels_and_no_file_are_refused(tmp_path: Path) -> None:
    names = tuple(f"n{i}" for i in range(257))
    many = LabelSet("many", names, tuple((i % 256, i // 256, 1) for i in range(257)))
    with pytest.raises(ValueError, match="many: has 257 labels, but an 8-bit mask holds 256"):
        table(tmp_path, "a: n0", many)
    with pytest.raises(ValueError, match="257 classes, but an 8-bit mask holds 256"):
        table(tmp_path, "".join(f"c{i}: {i % 7}\n" for i in range(257)))
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        read_merge_table(tmp_path / "none.txt", SOURCE)


def rest(*taken: str) -> str:
    return ", ".join(name for name in CELEBAMASK19.classes if name not in taken)


def test_a_flip_swaps_the_classes_that_left_and_right_become(tmp_path: Path) -> None:
    sides = ("l_eye", "l_brow", "l_ear", "r_eye", "r_brow", "r_ear")
    apart = table(
        tmp_path, f"left: l_eye, l_brow\nears: l_ear, r_ear\nright: r_eye, r_brow\nother: {rest(*sides)}", CELEBAMASK19
    )
    assert apart.labels.mirrored == ((0, 2),)
    image, mask = torch.zeros(3, 1, 4, dtype=torch.uint8), torch.tensor([[4, 8, 9, 5]], dtype=torch.uint8)
    merged_after = apart.merge(flip_pair(image, mask, CELEBAMASK19)[1])
    assert torch.equal(merged_after, flip_pair(image, apart.merge(mask), apart.labels)[1])
    together = table(tmp_path, f"eyes: l_eye, r_eye\nother: {rest('l_eye', 'r_eye')}", CELEBAMASK19)
    assert together.labels.mirrored == ()
    with pytest.raises(
        ValueError, match=r"few\.txt: a mirrored image swaps 'r_eye' and 'l_eye', but the table separates"
    ):
        table(tmp_path, f"eye: l_eye\nother: {rest('l_eye')}", CELEBAMASK19)
