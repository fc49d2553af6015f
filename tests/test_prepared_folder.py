"""The prepared folder: splits, records, fingerprints, and files that are missing or damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from test_images import photo

from ssmgen import build
from ssmgen.atomic import whole_folder
from ssmgen.data import CacheError, hashes
from ssmgen.data.files import pair_files
from ssmgen.data.folder import PreparedFolder, check_target, load_splits, write_pair, write_records
from ssmgen.data.images import write_png
from ssmgen.data.labels import CELEBAMASK19
from ssmgen.reading import sha256_of


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
    with pytest.raises(FileNotFoundError, match="nothing: no such folder; prepare one with: make data$"):
        PreparedFolder(tmp_path / "nothing", "train", hint="prepare one with: make data")
    with pytest.raises(FileNotFoundError, match=r"not a prepared folder \(it has no prepared.json\)$"):
        PreparedFolder(tmp_path, "train")


@pytest.mark.parametrize(
    "record",
    [
        *("{", "[]", "[" * 9_000, '{"format": 99, "files": {}}', '{"format": 1, "files": {}}'),
        '{"format": 1, "files": {"a": 3}, "source": {}}',
        '{"format": 1, "files": {}, "source": "x"}',
    ],
)
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
    matched, problems = pair_files(tmp_path / "images", tmp_path / "masks")
    assert list(matched) == ["a"]
    assert {path.name for path, _ in problems} == {"b.png", "b.jpg", "c.webp", "c.jpg", "d.png"}


def test_a_file_replaced_after_preparation_is_noticed(tmp_path: Path) -> None:
    root = make_prepared(tmp_path / "p")
    pairs, index = PreparedFolder(root, "train"), tmp_path / "index.json"
    pairs.check_files(index)
    for name, item in (("images/a.png", 0), ("masks/b.c.png", 1)):
        before = (root / name).read_bytes()
        write_png(root / name, photo(seed=9) if name.startswith("images") else torch.zeros(16, 16, dtype=torch.uint8))
        with pytest.raises(ValueError, match=rf"{name}: changed after the folder was prepared\. Restore"):
            pairs[item]
        with pytest.raises(ValueError, match=rf"1 file\(s\) changed after the folder was prepared:\n  {name}"):
            pairs.check_files(index)
        (root / name).write_bytes(before)
    pairs.check_files(index)
    assert pairs[1][0].shape == (3, 16, 16)


def test_unchanged_files_are_not_read_again_and_dates_alone_are_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, read = make_prepared(tmp_path / "p"), []
    monkeypatch.setattr(hashes, "_SETTLED", 0)
    monkeypatch.setattr(hashes, "sha256_of", lambda file: read.append(file.name) or sha256_of(file))
    pairs, index = PreparedFolder(root, "train"), tmp_path / "new" / "index.json"
    pairs.check_files(index)
    assert len(read) == 4
    pairs.check_files(index)
    assert len(read) == 4, "what is remembered is not read"
    os.utime(root / "images/a.png", (1, 1))
    pairs.check_files(index)
    assert read[4:] == ["a.png"], "another date leads to another look, not to an error"
    kept, stamp = (root / "masks/a.png").read_bytes(), (root / "masks/a.png").stat()
    (root / "masks/a.png").write_bytes(kept[:-1] + b"\0")
    os.utime(root / "masks/a.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(ValueError, match="masks/a.png"):
        pairs.check_files(index)
    (root / "masks/a.png").write_bytes(kept)
    for damage in ("", "{", "[" * 9_000, '{"images/a.png": 3}', '{"images/a.png": [[1], "00"]}', "null"):
        index.write_text(damage)
        pairs.check_files(index)


def test_a_prepared_folder_of_odd_files_is_refused_by_name(tmp_path: Path) -> None:
    root = make_prepared(tmp_path / "p")
    for name in ("images/a.png", "masks/a.png"):
        (root / name).rename(tmp_path / "kept")
        os.mkfifo(root / name)
        with pytest.raises(ValueError, match=f"{name}: is a FIFO"):
            PreparedFolder(root, "train")[0]
        (root / name).unlink()
        (tmp_path / "kept").rename(root / name)
    for name in ("splits.json", "prepared.json"):  # the latter is read first
        (root / name).unlink()
        (root / name).symlink_to("/dev/zero")
        with pytest.raises(ValueError, match=f"{name}: is a device"):
            PreparedFolder(root, "train")


def test_a_run_notices_replaced_images_and_rebuilds_a_damaged_cache_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")
    from recipes.sisma.pairs import encoded_pairs
    from recipes.sisma.presets import Config

    root, identity = make_prepared(tmp_path / "p"), build("identity")
    config = Config(data=str(root), cache=str(tmp_path / "cache"), image_size=16, crops=2)
    expected = encoded_pairs(config, identity)[2, 0]["data"]
    (shard,) = (tmp_path / "cache").glob("*/shard-00000.safetensors")
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-1])
    with pytest.raises(CacheError, match=r"shard-00000.*: has(.|\n)*or: add rebuild_cache=true"):
        encoded_pairs(config, identity)
    config.rebuild_cache = True
    assert torch.equal(encoded_pairs(config, identity)[2, 0]["data"], expected) and shard.read_bytes() == kept
    assert "shard-00000.safetensors: has" in capsys.readouterr().err
    write_png(root / "images/b.c.png", photo(seed=9))  # with the cache complete, training would not read it
    with pytest.raises(ValueError, match=r"changed after the folder was prepared:\n  images/b.c.png"):
        encoded_pairs(config, identity)
    assert encoded_pairs(config, identity, verify=False)[2, 0]["data"].shape == (3, 16, 16)
