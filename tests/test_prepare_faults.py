"""`python -m recipes.sisma.prepare`: faults are listed, and nothing is half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prepare_sources import IMAGES, PARTS, ROOT, Capture, face_mask, make_folder, make_official, run, splits_of

from recipes.clothes import prepare as clothes
from recipes.sisma.prepare import Settings, checks, command, main
from recipes.sisma.prepare.settings import check_settings
from ssmgen.data.folder import PreparedFolder
from ssmgen.data.images import to_pil, write_png


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


def test_sources_without_pairs_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in it; it holds nothing. Expected"):
        run(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "half/images").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="masks: no such folder, but "):
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


def test_the_keys_of_another_data_set_are_compared_with_its_own_defaults() -> None:
    for words, message in (
        (["source=drawn", "target=y"], "source=drawn: this recipe prepares folders alone"),
        (["target=y"], r"source= is missing: write source=DIR target=DIR$"),
        (
            ["source=nowhere", "target=y"],
            "labels=labels.json: no such file, neither in nowhere nor in the working dire",
        ),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            clothes.main(words)
    defaults = Settings(merge="few.txt", test_share=0.3, seed=3)
    drawing = Settings(source="drawn", target="y", merge="few.txt", test_share=0.3, layout="official")
    check_settings(drawing, defaults, drawn_faces=True)
    with pytest.raises(ValueError, match="merge= has no effect with source=drawn: leave it out"):
        check_settings(replace(drawing, merge="other.txt"), defaults, drawn_faces=True)


def test_classes_and_tables_are_files_of_the_source_or_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder(tmp_path / "src")
    monkeypatch.chdir(tmp_path)
    names = [f"class {id}" for id in range(19)]
    for place, name in ((tmp_path, "here"), (source, "there")):
        (place / f"{name}.json").write_text(json.dumps(names))
        (place / f"{name}.txt").write_text(f"{name}: {', '.join(names)}\n")
        run(source, tmp_path / name, f"labels={name}.json", f"merge={name}.txt")
        assert PreparedFolder(tmp_path / name, "train").labels.classes == (name,)
    (tmp_path / "there.txt").write_text("none of this is read")
    run(source, tmp_path / "again", "labels=there.json", "merge=there.txt")
    assert PreparedFolder(tmp_path / "again", "train").labels.classes == ("there",)


@pytest.mark.parametrize(
    ("names", "table", "empty"),
    [
        (["sky", "road", "tree"], "", set()),
        (["sky", "Background", "none"], "", {"b", "c", "bc"}),
        (["sky", "road", "tree"], "background: tree\nrest: sky, road\n", {"c"}),
        (["sky", "null", "tree"], "rest: sky, null\ntree: tree\n", {"b"}),
    ],
)
def test_only_a_mask_of_classes_that_show_nothing_is_empty(
    tmp_path: Path, capsys: Capture, names: list[str], table: str, empty: set[str]
) -> None:
    source = make_folder(tmp_path / "src", ("a", "b", "c", "bc", "abc"))
    for file in source.glob("masks/*.png"):
        rows = torch.tensor(["abc".index(letter) for letter in file.stem], dtype=torch.uint8).repeat(16)[:16]
        write_png(file, rows[:, None].expand(16, 16))
    (source / "names.json").write_text(json.dumps(names))
    (source / "few.txt").write_text(table)
    merge = ["merge=few.txt"] if table else []
    run(source, tmp_path / "out", "labels=names.json", "on_bad=skip", *merge)
    assert {"a", "b", "c", "bc", "abc"} - {id for ids in splits_of(tmp_path / "out").values() for id in ids} == empty
    assert (" only" in capsys.readouterr().err) == bool(empty)


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
        patch.setattr(checks, "write_pair", full)
        with pytest.raises(OSError, match=r"out: writing failed \(.*No space left.*nothing of it was kept"):
            run(source, tmp_path / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5, "total": 10}))
    with pytest.raises(OSError, match="needs .*, but only .* are free on its disk"):
        run(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_ctrl_c_leaves_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "write_records", stop)
    assert main([f"source={make_folder(tmp_path / 'source')}", f"target={tmp_path / 'target'}"]) == 130
    assert capsys.readouterr().err.endswith("stopped; nothing was written\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_command_ends_with_one_message_and_status_2(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "recipes.sisma.prepare", f"source={tmp_path}", f"target={tmp_path / 'out'}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
