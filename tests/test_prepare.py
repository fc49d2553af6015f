"""`python -m recipes.sisma.prepare`: layouts, splits, checks, and that nothing is half-written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recipes.sisma import prepare
from recipes.sisma.arguments import UsageError
from recipes.sisma.prepare import main, paint_parts, read_mapping
from ssmgen.data.drawn_faces import draw_face
from ssmgen.data.folder import PreparedFolder
from ssmgen.data.images import read_image, read_mask, to_pil, write_png
from ssmgen.data.labels import BISENET19, CELEBAMASK19, remap

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SSMGEN_SHARED", ROOT.parent / "shared"))
IMAGES, PARTS = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno"

needs_faces = pytest.mark.skipif(
    not (SHARED / "data/celebamask_official").is_dir(), reason="real faces may not be shipped: set SSMGEN_SHARED to try"
)


def face_mask(size: int = 16) -> Tensor:
    """Mostly hair, some skin and an eye."""
    mask = torch.full((size, size), 13, dtype=torch.uint8)
    mask[size // 2 :, : size // 2] = 1
    mask[0, 0] = 4
    return mask


def write_parts(root: Path, id: int, mask: Tensor) -> None:
    folder = root / PARTS / str(id // 2000)
    folder.mkdir(parents=True, exist_ok=True)
    for label in mask.unique().tolist():
        if label:
            white = (mask == label).to(torch.uint8) * 255
            write_png(folder / f"{id:05d}_{CELEBAMASK19.classes[label]}.png", white.expand(3, -1, -1))


def make_official(root: Path, ids: tuple[int, ...] = (0, 1999, 2000, 28000)) -> Path:
    (root / IMAGES).mkdir(parents=True)
    for number, id in enumerate(ids):
        to_pil(torch.full((3, 32, 32), number % 256, dtype=torch.uint8)).save(root / IMAGES / f"{id}.jpg")
        write_parts(root, id, face_mask())
    limits = (162_770, 162_771, 182_637, 182_638)
    lines = ["idx  orig_idx  orig_file", *(f"{id}  {limits[n % 4]}  {n:06d}.jpg" for n, id in enumerate(ids))]
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(lines))
    return root


def make_folder(root: Path, names: tuple[str, ...] = ("ann", "bob", "cy")) -> Path:
    for number, name in enumerate(names):
        (root / "images").mkdir(parents=True, exist_ok=True)
        (root / "masks").mkdir(exist_ok=True)
        to_pil(torch.full((3, 16, 16), number % 256, dtype=torch.uint8)).save(root / f"images/{name}.jpg")
        write_png(root / f"masks/{name}.png", face_mask())
    return root


def run(source: Path | str, target: Path, *more: str) -> None:
    main([f"source={source}", f"target={target}", *more])


def splits_of(target: Path) -> dict[str, list[str]]:
    return json.loads((target / "splits.json").read_text())


# --- layouts and splits ---


def test_the_official_layout_is_merged_and_split_by_number(tmp_path: Path, capsys: Capture) -> None:
    source = make_official(tmp_path / "CelebAMask-HQ")
    run(tmp_path, tmp_path / "out")
    assert splits_of(tmp_path / "out") == {"train": ["0", "1999", "2000"], "test": ["28000"]}
    for id in ("0", "1999", "2000", "28000"):
        assert torch.equal(read_mask(tmp_path / f"out/masks/{id}.png", CELEBAMASK19), face_mask())
        copied, original = tmp_path / f"out/images/{id}.jpg", source / IMAGES / f"{id}.jpg"
        assert copied.read_bytes() == original.read_bytes()
    printed = capsys.readouterr().out
    assert "4 of its 30000 pairs" in printed and "train 3, test 1" in printed
    assert f"python -m recipes.sisma.train faces data={tmp_path / 'out'}" in printed


def test_the_celeba_split_has_the_limits_of_the_datasets_script(tmp_path: Path) -> None:
    run(make_official(tmp_path / "src"), tmp_path / "out", "split=celeba")
    assert splits_of(tmp_path / "out") == {"train": ["0"], "val": ["1999", "2000"], "test": ["28000"]}


def test_later_parts_are_painted_over_earlier_ones(tmp_path: Path) -> None:
    whole = torch.full((4, 4), 255, dtype=torch.uint8)
    corner = torch.zeros(4, 4, dtype=torch.uint8)
    corner[0, 0] = 255
    for name, pixels in {"hair": corner, "skin": whole, "l_ear": corner}.items():
        write_png(tmp_path / f"{name}.png", pixels)
    mask = paint_parts({name: tmp_path / f"{name}.png" for name in ("hair", "l_ear", "skin")})
    assert mask[0, 0] == 13 and mask[1, 1] == 1


def test_parts_of_different_sizes_are_refused_by_name(tmp_path: Path) -> None:
    for name, size in (("skin", 4), ("hair", 5)):
        write_png(tmp_path / f"{name}.png", torch.full((size, size), 255, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"hair\.png: is \(5, 5\), other parts of this mask are \(4, 4\)"):
        paint_parts({name: tmp_path / f"{name}.png" for name in ("skin", "hair")})


def test_a_folder_is_paired_by_name_and_its_split_is_stable(tmp_path: Path) -> None:
    names = tuple(f"face-{number}" for number in range(40))
    run(make_folder(tmp_path / "few", names[:20]), tmp_path / "a")
    run(make_folder(tmp_path / "many", names), tmp_path / "b")
    few, many = splits_of(tmp_path / "a"), splits_of(tmp_path / "b")
    assert set(few["test"]) <= set(many["test"]) and set(few["train"]) <= set(many["train"])
    assert 0 < len(many["test"]) < 10


def test_pairs_beside_each_other_need_no_subfolders(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "src")
    for file in (*source.glob("images/*"), *source.glob("masks/*")):
        file.rename(source / file.name)
    for name in ("images", "masks"):
        (source / name).rmdir()
    run(source, tmp_path / "out")
    assert len(PreparedFolder(tmp_path / "out", "train")) == 3


def test_a_split_file_decides_and_must_fit(tmp_path: Path, capsys: Capture) -> None:
    source, file = make_folder(tmp_path / "src"), tmp_path / "mine.json"
    file.write_text('{"train": ["bob"], "test": ["ann"]}')
    run(source, tmp_path / "out", f"split={file}")
    assert splits_of(tmp_path / "out") == {"train": ["bob"], "test": ["ann"]}
    assert not (tmp_path / "out/images/cy.jpg").exists()
    assert "1 pair(s) are in no split of mine.json" in capsys.readouterr().out
    file.write_text('{"train": ["bob", "zoe", "yan"]}')
    with pytest.raises(ValueError, match=r"2 id\(s\) are not in .*: zoe, yan"):
        run(source, tmp_path / "new", f"split={file}")


def test_a_part_of_the_archive_on_one_side_of_28000_is_split_by_name(tmp_path: Path, capsys: Capture) -> None:
    """Split by number its test split would be empty, and no training that evaluates could follow."""
    source = make_official(tmp_path / "src", tuple(range(12)))
    run(source, tmp_path / "out", "test_share=0.4")
    printed = capsys.readouterr().out
    assert "all its ids are below 28000, so that it is split by name, not by number" in printed
    splits = splits_of(tmp_path / "out")
    assert len(splits["test"]) >= 2 and sorted(sum(splits.values(), []), key=int) == [str(id) for id in range(12)]
    about = json.loads((tmp_path / "out/prepared.json").read_text())["source"]
    assert (about["split"], about["test_share"]) == ("by-name", 0.4)


def test_a_split_by_number_without_its_numbers_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    source = make_official(tmp_path / "src", (1, 2))
    (source / IMAGES / "1.jpg").write_bytes(b"not read")
    with pytest.raises(ValueError, match="split=first28k leaves no pair for test: this part .* Use split=by-name"):
        run(source, tmp_path / "out", "split=first28k")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_too_few_pairs_are_told_what_to_do_and_not_to_train(tmp_path: Path, capsys: Capture, count: int) -> None:
    """What is advised works: either to prepare again in that way, or to train without an evaluation."""
    source = make_folder(tmp_path / "src", tuple(f"p{number}" for number in range(count)))
    run(source, tmp_path / "out")
    printed = capsys.readouterr().out
    assert splits_of(tmp_path / "out")["test"] == [] and "Next:" not in printed
    assert "Before training: there is no test pair, and an evaluation needs 2." in printed
    assert f"data={tmp_path / 'out'} evaluate=false sample_every=0" in printed
    if count < 3:
        assert "Add pairs and prepare again: it takes 3, one to train on and 2 to evaluate." in printed
        return
    (advised,) = re.findall(
        rf"Prepare again with (split=by-name test_share=\S+): (?:\d) test pairs of {count}", printed
    )
    run(source, tmp_path / "again", *advised.split())
    assert len(splits_of(tmp_path / "again")["test"]) >= 2 and splits_of(tmp_path / "again")["train"]
    assert "Next: python -m recipes.sisma.train" in capsys.readouterr().out


def test_a_file_of_splits_that_are_too_small_is_named(tmp_path: Path, capsys: Capture) -> None:
    source, file = make_folder(tmp_path / "src"), tmp_path / "mine.json"
    file.write_text('{"train": ["bob", "cy"], "test": ["ann"]}')
    run(source, tmp_path / "out", f"split={file}")
    printed = capsys.readouterr().out
    assert "there is 1 test pair, and an evaluation needs 2. Name some in" in printed and "sample_every" not in printed
    file.write_text('{"test": ["ann", "bob", "cy"]}')
    run(source, tmp_path / "none", f"split={file}")
    printed = capsys.readouterr().out
    assert "Before training: there is no pair to train on." in printed and "recipes.sisma.train" not in printed


def test_size_stores_both_at_that_size(tmp_path: Path) -> None:
    run(make_official(tmp_path / "src"), tmp_path / "out", "size=8")
    assert read_image(tmp_path / "out/images/0.png").shape == (3, 8, 8)
    assert read_mask(tmp_path / "out/masks/0.png", CELEBAMASK19).shape == (8, 8)


def test_the_other_class_order_is_remapped_and_a_wrong_one_is_suspected(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "src")
    for file in source.glob("masks/*"):
        write_png(file, remap(face_mask(), CELEBAMASK19, BISENET19))
    run(source, tmp_path / "right", "labels=bisenet19")
    assert torch.equal(read_mask(tmp_path / "right/masks/ann.png", CELEBAMASK19), face_mask())
    assert "WARNING" not in capsys.readouterr().out
    run(source, tmp_path / "wrong")
    assert "WARNING: neck covers 75% of the masks and hair 0%" in (printed := capsys.readouterr().out)
    assert "prepare them with labels=bisenet19" in printed


def test_drawn_faces_take_both_ways_to_the_same_masks(tmp_path: Path) -> None:
    run("drawn", tmp_path / "a", "count=3", "size=32")
    run("drawn", tmp_path / "official", "count=3", "size=32", "layout=official")
    run(tmp_path / "official", tmp_path / "b")
    for index in range(3):
        expected = draw_face(index, 32, 0)[1]
        assert torch.equal(read_mask(tmp_path / f"a/masks/{index:05d}.png", CELEBAMASK19), expected)
        assert torch.equal(read_mask(tmp_path / f"b/masks/{index}.png", CELEBAMASK19), expected)


# --- faults of the source ---


def damage(source: Path) -> dict[str, str]:
    """Spoil a folder in every way; the file and what its line must say."""
    (source / "images/ann.jpg").write_bytes((source / "images/ann.jpg").read_bytes()[:300])
    (source / "masks/bob.png").write_text("hello")
    (source / "masks/cy.png").rename(source / "masks/sy.png")
    bad_label = face_mask()
    bad_label[3, 7] = 200
    write_png(source / "masks/dan.png", bad_label)
    write_png(source / "masks/eve.png", torch.zeros(16, 16, dtype=torch.uint8))
    write_png(source / "masks/flo.png", face_mask()[:12])
    return {
        "images/ann.jpg": "cannot be decoded",
        "masks/bob.png": "is not a PNG image",
        "images/cy.jpg": "has no mask cy.png",
        "masks/sy.png": "has no image sy",
        "masks/dan.png": "label 200 is outside 0..18; it covers 1 pixel(s), the first at (row, column) = (3, 7)",
        "masks/eve.png": "the mask is empty",
        "images/flo.jpg": "image is 16 x 16 and mask 12 x 16",
    }


NAMES = ("ann", "bob", "cy", "dan", "eve", "flo", "good")


def test_every_fault_is_listed_and_nothing_is_written(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "src", NAMES)
    faults = damage(source)
    with pytest.raises(ValueError) as raised:
        run(source, tmp_path / "out")
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("7 problem(s) found") and "on_bad=skip" in lines[-1]
    for file, reason in faults.items():
        assert any(line.startswith(f"  {file}: {reason}") for line in lines), file
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_bad_pairs_are_left_out_and_named_on_request(tmp_path: Path, capsys: Capture) -> None:
    source = make_folder(tmp_path / "src", NAMES)
    faults = damage(source)
    run(source, tmp_path / "out", "on_bad=skip")
    assert [id for ids in splits_of(tmp_path / "out").values() for id in ids] == ["good"]
    assert [file.name for file in (tmp_path / "out/images").iterdir()] == ["good.jpg"]
    warned = capsys.readouterr().err
    assert all(file in warned for file in faults)
    recorded = json.loads((tmp_path / "out/prepared.json").read_text())["source"]["left_out"]
    assert {entry["file"] for entry in recorded} == faults.keys()


def test_a_reason_many_files_share_is_said_once(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "src", NAMES)
    for file in source.glob("masks/*"):
        write_png(file, torch.zeros(16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError) as raised:
        run(source, tmp_path / "out")
    assert str(raised.value).count("the mask is empty") == 1
    assert all(f"masks/{name}.png" in str(raised.value) for name in NAMES)


def test_faults_of_the_official_layout_are_all_named(tmp_path: Path) -> None:
    source = make_official(tmp_path / "src")
    parts = source / PARTS / "0"
    (parts / "00000_hair.png").write_text("hello")
    for name in ("00000_moustache.png", "skin.png", "02000_hat.png"):
        write_png(parts / name, torch.zeros(16, 16, dtype=torch.uint8))
    for name in ("7.jpg", "4000.jpg", "4001.jpg", "me.jpg"):
        to_pil(torch.zeros(3, 32, 32, dtype=torch.uint8)).save(source / IMAGES / name)
    with pytest.raises(ValueError) as raised:
        run(source, tmp_path / "out")
    for expected in (
        f"{PARTS}/0/00000_hair.png: is not a",
        f"{PARTS}/0/00000_moustache.png: unknown part 'moustache'",
        f"{PARTS}/0/skin.png: is not named",
        f"{PARTS}/0/02000_hat.png: is in the wrong folder, expected {PARTS}/1",
        f"{IMAGES}/7.jpg: has no parts in {PARTS}/0",
        f"{PARTS}/2: no such folder, but 2 image(s) need it: 4000 to 4001",
        f"{IMAGES}/me.jpg: is not named <id>.jpg",
    ):
        assert expected in str(raised.value)


def test_a_renamed_mask_folder_is_named_and_not_read_as_blank_masks(tmp_path: Path) -> None:
    source = make_official(tmp_path / "src")
    (source / PARTS).rename(source / "mask-anno")
    with pytest.raises(FileNotFoundError, match=f"{PARTS}: no such folder; .*mask-anno/"):
        run(source, tmp_path / "out")


def test_known_faults_and_identical_images_are_reported_and_kept(tmp_path: Path, capsys: Capture) -> None:
    source = make_official(tmp_path / "src", (3, 404, 28001))
    (source / IMAGES / "28001.jpg").write_bytes((source / IMAGES / "3.jpg").read_bytes())
    run(source, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "404 (mouth and lips are not labelled)" in printed
    assert "identical images in 1 group(s), 1 of them across splits, kept: 3 = 28001" in printed
    assert splits_of(tmp_path / "out")["train"] == ["3", "404"]


@pytest.mark.parametrize("line", ["1 2", "one 2 3.jpg", "1 2 3 4"])
def test_a_broken_mapping_names_the_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "m.txt"
    file.write_text(f"idx orig_idx orig_file\n0 5 000006.jpg\n{line}\n")
    with pytest.raises(ValueError, match=r"m\.txt, line 3: expected idx, orig_idx, orig_file"):
        read_mapping(file)


def test_a_mapping_is_needed_in_full_for_the_celeba_split(tmp_path: Path) -> None:
    source = make_official(tmp_path / "src")
    mapping = source / "CelebA-HQ-to-CelebA-mapping.txt"
    mapping.write_text("\n".join(mapping.read_text().splitlines()[:3]))
    with pytest.raises(ValueError, match=r"no line for 2 image\(s\): 2000, 28000"):
        run(source, tmp_path / "out", "split=celeba")
    mapping.unlink()
    with pytest.raises(FileNotFoundError, match="split=celeba needs it"):
        run(source, tmp_path / "out", "split=celeba")


def test_a_share_of_test_pairs_is_for_a_split_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="test_share= has no effect with split=first28k: leave it out, or give split="):
        run(make_official(tmp_path / "src"), tmp_path / "out", "test_share=0.5")


def test_a_split_by_number_refuses_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 of 3 pairs have other names, e.g. 'ann'"):
        run(make_folder(tmp_path / "src"), tmp_path / "out", "split=first28k")


# --- faults of the command and of the target ---


def test_sources_without_pairs_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in it; it holds nothing. Expected"):
        run(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "half/images").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="masks: no such folder, though there is"):
        run(tmp_path / "half", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["source=x"], "target= is missing"),
        (["source=x", "target=y", "splits=z"], "unknown key 'splits'. Did you mean 'split'"),
        (["source=x", "target=y", "split=first28"], "Did you mean 'first28k'"),
        (["source=x", "target=y", "labels=bisenet"], "Did you mean 'bisenet19'"),
        (["source=x", "target=y", "size=0"], "size=0: expected at least 1"),
        (["source=x", "target=y", "count=3"], "count= has no effect with source=x"),
        (["source=drawn", "target=y", "on_bad=skip"], "on_bad= has no effect with source=drawn"),
        (["source=x", "target=y", "test_share=8"], "test_share=8.0: expected a number between 0 and 1"),
        (["source=drawn", "target=y", "layout=official", "test_share=0.5"], "test_share= has no effect with layout="),
    ],
)
def test_mistaken_settings_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(words)


def test_a_target_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    target = make_folder(tmp_path / "out")
    before = {file: file.read_bytes() for file in target.rglob("*.*")}
    with pytest.raises(FileExistsError, match="not empty"):
        run(make_folder(tmp_path / "src"), target)
    assert {file: file.read_bytes() for file in target.rglob("*.*")} == before


def test_an_empty_target_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run(make_folder(tmp_path / "src"), tmp_path / "out")
    assert len(PreparedFolder(tmp_path / "out", "train")) == 3


def test_a_full_disk_is_noticed_before_and_during_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path / "src")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_pair", full)
        with pytest.raises(OSError, match=r"out: writing failed \(.*No space left.*nothing of it was kept"):
            run(source, tmp_path / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5}))
    with pytest.raises(OSError, match="MB free, but the images need"):
        run(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_ctrl_c_leaves_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write_records", stop)
    assert main([f"source={make_folder(tmp_path / 'source')}", f"target={tmp_path / 'target'}"]) == 130
    assert capsys.readouterr().err.endswith("stopped; nothing was written\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_command_ends_with_one_message_and_status_2(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "recipes.sisma.prepare", f"source={tmp_path}", f"target={tmp_path / 'out'}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


# --- real data, where it is ---


@needs_faces
def test_the_official_samples_are_read_unchanged(tmp_path: Path) -> None:
    source = SHARED / "data/celebamask_official"
    run(source, tmp_path / "out")
    for id in ("0", "1", "3"):
        written, original = (read_mask(at / f"{id}.png", CELEBAMASK19) for at in (tmp_path / "out/masks", source))
        assert torch.equal(written, original)
    image, mask = PreparedFolder(tmp_path / "out", "train", 256)[0]
    assert image.shape == (3, 256, 256) and mask.shape == (256, 256)


@needs_faces
def test_real_masks_survive_being_taken_apart_and_merged(tmp_path: Path) -> None:
    for id in (0, 1, 3):
        mask = read_mask(SHARED / f"data/celebamask_official/{id}.png", CELEBAMASK19)
        write_parts(tmp_path, id, mask)
        parts = {file.stem[6:]: file for file in (tmp_path / PARTS / "0").glob(f"{id:05d}_*.png")}
        assert torch.equal(paint_parts(parts), mask)
