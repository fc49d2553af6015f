"""Latent caches of several shapes, and of more than latents and masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssmgen import build
from ssmgen.data import CacheError, LabelSet, latent_cache
from ssmgen.data.cache_files import examples_of, runs_of, write_record
from ssmgen.data.latent_cache import LatentCache, cache_record, rebuild_latent_cache, write_latent_cache
from ssmgen.data.shards import DTYPES

LABELS = LabelSet("toy", ("a", "l", "r"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)), ((1, 2),))
SHAPES = ((16, 16), (24, 8), (8, 24))


class Pairs:
    """Ten pairs of three shapes, with a text of another length each, a class, and edges that have a left and right."""

    labels = LABELS

    def __len__(self) -> int:
        return 10

    def bucket_of(self, index: int) -> int:
        return index * index % 3  # 0 1 1 0 1 1 0 1 1 0

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[str, Tensor | int]]:
        g = torch.Generator().manual_seed(index)
        height, width = SHAPES[self.bucket_of(index)]
        image = torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8)
        mask = torch.randint(0, 3, (height, width), generator=g, dtype=torch.uint8)
        edges = torch.rand(1, height, width, generator=g).to(torch.float16)
        text = torch.randn(index % 4, 5, generator=g)
        return image, mask, {"text": text, "kind": index, "edges": edges, "edges.mirrored": edges.flip(-1)}

    def fingerprint(self) -> str:
        return "toy"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In shards of three."""
    monkeypatch.setattr(latent_cache, "_SHARD", 3)
    write_latent_cache(Pairs(), build("identity"), tmp_path / "cache", flip=True, batch_size=2)  # type: ignore[arg-type]
    return tmp_path / "cache"


def entries(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "cache.json").read_text())["shards"]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_example_comes_back_with_its_own_shape_and_extras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(latent_cache, "_SHARD", 3)
    pairs: Any = Pairs()
    arguments: dict[str, Any] = {"flip": True, "batch_size": 2, "num_workers": workers}
    write_latent_cache(pairs, build("identity"), tmp_path / "cache", **arguments)
    cache = LatentCache(tmp_path / "cache", LABELS, cache_record(pairs, build("identity"), True))
    assert cache.extras == ("edges", "kind", "text")
    for index in range(10):
        image, mask, extras = Pairs()[index]
        example, mirrored = cache[index], cache.flipped(index)
        assert example.keys() == mirrored.keys() == {"data", "mask", "edges", "kind", "text"}
        torch.testing.assert_close(example["data"], image.float() / 127.5 - 1)
        torch.testing.assert_close(mirrored["data"], example["data"].flip(-1))
        assert torch.equal(example["mask"], mask)
        for found in (example, mirrored):
            assert torch.equal(found["text"], extras["text"]) and found["text"].dtype == torch.float32
            assert found["kind"].shape == () and int(found["kind"]) == index
        assert torch.equal(example["edges"], extras["edges"])
        assert torch.equal(mirrored["edges"], extras["edges.mirrored"])


def test_a_shard_holds_one_shape_and_the_record_says_which(cached: Path) -> None:
    found = [(entry["shape"], entry["examples"]) for entry in entries(cached)]
    square, tall = [3, 16, 16], [3, 24, 8]
    assert found == [(square, "0 3 6"), (square, "9"), (tall, "1-2 4"), (tall, "5 7-8")]
    cache = LatentCache(cached, LABELS)
    groups = [cache.bucket_of(index) for index in range(10)]
    assert groups == [Pairs().bucket_of(index) for index in range(10)]
    assert load_file(cached / "shard-00003.safetensors")["extra.text.ends"].tolist() == [1, 4, 4]


def test_a_damaged_shard_of_a_bucket_is_rebuilt_to_the_same_bytes(cached: Path) -> None:
    before = {file.name: file.read_bytes() for file in cached.iterdir()}
    victim = cached / "shard-00002.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    with pytest.raises(CacheError, match=r"shard-00002.safetensors: its SHA-256"):
        LatentCache(cached, LABELS)
    pairs: Any = Pairs()
    written = rebuild_latent_cache(pairs, build("identity"), cached, flip=True, batch_size=2)
    assert written == [victim] and {file.name: file.read_bytes() for file in cached.iterdir()} == before


def test_a_shard_is_not_rebuilt_with_other_extras(cached: Path) -> None:
    class Bare(Pairs):
        """Has the fingerprint of pairs with extras."""

        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index)[:2]

    (cached / "shard-00002.safetensors").unlink()
    pairs: Any = Bare()
    with pytest.raises(ValueError, match=r"pairs have different extras, \['edges', .*'text'\] and \[\]"):
        rebuild_latent_cache(pairs, build("identity"), cached, flip=True)
    assert not (cached / "shard-00002.safetensors").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("examples", "0-2 3"),  # more than its rows
        ("examples", "0 3 7"),  # one of another shard
        ("examples", "0-999999999999999999"),
        ("examples", "2-0"),
        ("examples", "0,3,6"),
        ("examples", 3),
        ("shape", "16"),
        ("shape", [3, 24, 8]),
    ],
)
def test_a_record_with_wrong_shapes_or_examples_is_refused(cached: Path, key: str, value: Any) -> None:
    record = json.loads((cached / "cache.json").read_text())
    del record["sha256"]
    record["shards"][0][key] = value
    write_record(cached, record)
    with pytest.raises(CacheError, match=r"cache\.json: is damaged|not latents of the recorded shape"):
        LatentCache(cached, LABELS)


@pytest.mark.parametrize("value", [[1], "text", {"text": 1}, ["words"]])
def test_a_record_with_extras_that_are_not_there_is_refused(cached: Path, value: Any) -> None:
    record = json.loads((cached / "cache.json").read_text())
    del record["sha256"]
    write_record(cached, record | {"extras": value})
    with pytest.raises(CacheError, match=r"its list of extras is malformed|rows of .*'extra\.words'"):
        LatentCache(cached, LABELS)


@pytest.mark.parametrize("ends", [[1, 9, 3], [2, 1, 3], [-1, 2, 3]])
def test_parts_outside_their_tensor_are_refused(tmp_path: Path, ends: list[int]) -> None:
    tensors = {"extra.text": torch.zeros(3, 2), "extra.text.ends": torch.tensor(ends), "masks": torch.zeros(3, 1)}
    save_file(tensors, tmp_path / "shard")
    shard = latent_cache.Shard(tmp_path / "shard")
    with pytest.raises(CacheError, match=r"shard: part \d of extra.text lies outside it"):
        [shard.row("extra.text", index) for index in range(3)]


def test_a_cache_of_format_2_is_read_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ssmgen wrote it before caches had several shapes: neither shapes nor examples nor extras in the record."""

    class Squares(Pairs):
        def bucket_of(self, index: int) -> int:
            return 0  # Pairs.__getitem__ then makes squares

        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index)[:2]

    monkeypatch.setattr(latent_cache, "_SHARD", 4)
    pairs: Any = Squares()
    cached = tmp_path / "cache"
    write_latent_cache(pairs, build("identity"), cached)
    record = json.loads((cached / "cache.json").read_text())
    shards = [{key: entry[key] for key in ("file", "bytes", "sha256", "count")} for entry in record["shards"]]
    old = {key: record[key] for key in ("autoencoder", "source", "flip", "count")}
    write_record(cached, {"format": 2} | old | {"shards": shards})
    before = (cached / "cache.json").read_bytes()
    cache = LatentCache(cached, LABELS, cache_record(pairs, build("identity"), False))
    assert all(torch.equal(cache.mask(index), pairs[index][1]) for index in range(10)) and cache.bucket_of(9) == 0
    (cached / "shard-00001.safetensors").unlink()
    assert [file.name for file in rebuild_latent_cache(pairs, build("identity"), cached)] == ["shard-00001.safetensors"]
    assert (cached / "cache.json").read_bytes() == before
    assert torch.equal(LatentCache(cached, LABELS)[5]["mask"], pairs[5][1])


def test_a_shard_of_format_1_without_latents_is_named(cached: Path) -> None:
    record = json.loads((cached / "cache.json").read_text())
    old = {key: record[key] for key in ("autoencoder", "source", "flip")} | {"count": 3}
    (cached / "cache.json").write_text(json.dumps(old))
    for file in cached.glob("shard-*"):
        file.unlink()
    save_file({"masks": torch.zeros(3, 4, 4, dtype=torch.uint8)}, cached / "shard-00000.safetensors")
    with pytest.raises(CacheError, match=r"shard-00000.safetensors: holds .*, not 3 rows of .*'latents'"):
        LatentCache(cached, LABELS)


FAULTS: list[tuple[Any, str]] = [
    (lambda i, x: x if i else {**x, "more": 1}, r"pairs have different extras, .*'more'"),
    (lambda i, x: x if i != 9 else {}, "pairs have different extras"),
    (lambda i, x: {**x, "mask": 1}, "an extra cannot be called 'mask': expected an identifier other than data"),
    (lambda i, x: {**x, "a.b": 1}, r"an extra cannot be called 'a\.b'"),
    (lambda i, x: {**x, "b.mirrored": 1}, r"an extra cannot be called 'b\.mirrored'"),
    (lambda i, x: {**x, "text": torch.full((2, 5), float("nan"))}, "extra 'text': has values that are not finite"),
    (lambda i, x: {**x, "text": torch.zeros(2, 5 + i)}, r"extra 'text': pairs .*\(2, 5\) and torch.float32 \(2, 8\)"),
    (lambda i, x: {**x, "kind": i if i else 0.5}, r"extra 'kind': .*one dtype.*found torch.float32 \(\)"),
    (lambda i, x: {**x, "text": torch.zeros(2, 0)}, r"extra 'text': .*without empty ones.*\(2, 0\)"),
]
# Each of these can be written to a shard, but not read from it.
UNREADABLE: list[tuple[Any, str]] = [
    ({"ends": torch.zeros(3)}, "an extra cannot be called 'ends': expected an identifier other than data, mask and"),
    ({"ends": 1, "ends.mirrored": 2}, "an extra cannot be called 'ends'"),
    *(
        ({"x": torch.zeros(2).to(dtype)}, rf"extra 'x': has the dtype {dtype}; convert it to .* of float32, float16")
        for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e4m3fn)
    ),
    ({"x": torch.eye(3).to_sparse()}, "extra 'x': has the dtype torch.float32 and the layout torch.sparse_coo"),
    ({"x": "words"}, "extra 'x': cannot become a tensor .*: give numbers"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_extras_that_do_not_agree_are_named(tmp_path: Path, change: Any, message: str) -> None:
    class Changed(Pairs):
        def __getitem__(self, index: int) -> Any:
            image, mask, extras = super().__getitem__(index)
            return image, mask, change(index, extras)

    pairs: Any = Changed()
    with pytest.raises(ValueError, match=message):
        write_latent_cache(pairs, build("identity"), tmp_path / "cache", batch_size=1)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("extras", "message"), UNREADABLE)
def test_extras_that_could_not_be_read_again_are_refused_at_the_first_batch(
    tmp_path: Path, extras: dict[str, Any], message: str
) -> None:
    done: list[int] = []

    class Changed(Pairs):
        def __getitem__(self, index: int) -> Any:
            return *super().__getitem__(index)[:2], extras

    pairs: Any = Changed()
    with pytest.raises(ValueError, match=message):
        write_latent_cache(pairs, build("identity"), tmp_path / "cache", batch_size=1, progress=done.append)
    assert not done and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_extras_of_every_dtype_that_is_accepted_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    class Changed(Pairs):
        def __getitem__(self, index: int) -> Any:
            value = torch.arange(index * 2).to(dtype)
            return *super().__getitem__(index)[:2], {"ragged": value, "one": value.new_ones(2)}

    pairs: Any = Changed()
    write_latent_cache(pairs, build("identity"), tmp_path / "cache")
    cache = LatentCache(tmp_path / "cache", LABELS)
    for index in range(10):
        assert cache[index]["ragged"].dtype == dtype and torch.equal(cache[index]["ragged"], pairs[index][2]["ragged"])
        assert torch.equal(cache[index]["one"], torch.ones(2, dtype=dtype))


def test_masks_that_could_not_be_read_again_are_refused(tmp_path: Path) -> None:
    def pairs(shape: tuple[int, int], dtype: torch.dtype) -> Any:
        class Changed(Pairs):
            def __getitem__(self, index: int) -> Any:
                return Pairs()[0][0], torch.zeros(shape, dtype=dtype)

        return Changed()

    for shape, dtype, message in (
        ((4, 4), torch.uint16, "masks: has the dtype torch.uint16"),
        ((0, 4), torch.uint8, r"a pair has the shape \(0, 4\): expected at least one pixel"),
    ):
        with pytest.raises(ValueError, match=message):
            write_latent_cache(pairs(shape, dtype), build("identity"), tmp_path / "cache")
        assert not (tmp_path / "cache").exists()


def test_a_pair_that_does_not_fit_is_found_when_it_is_read(tmp_path: Path) -> None:
    """Not after the other pairs of its shard were encoded."""
    done: list[int] = []

    class Changed(Pairs):
        def bucket_of(self, index: int) -> int:
            return 0

        def __getitem__(self, index: int) -> Any:
            return *super().__getitem__(0)[:2], {"x": torch.zeros(2, 4 if index == 2 else 3)}

    pairs: Any = Changed()
    with pytest.raises(ValueError, match=r"extra 'x': .*\(2, 3\) and torch.float32 \(2, 4\)"):
        write_latent_cache(pairs, build("identity"), tmp_path / "cache", batch_size=1, progress=done.append)
    assert len(done) <= 3


@pytest.mark.parametrize("batch_size", [1, 4])
def test_several_shapes_in_one_bucket_are_explained(tmp_path: Path, batch_size: int) -> None:
    class Toy(Pairs):
        def bucket_of(self, index: int) -> int:
            return 0

        def __getitem__(self, index: int) -> Any:
            return Pairs()[index]

    pairs: Any = Toy()
    with pytest.raises(ValueError, match=r"pairs of one bucket have the shapes \(3, 16, 16\) and \(3, 24, 8\)"):
        write_latent_cache(pairs, build("identity"), tmp_path / "cache", batch_size=batch_size)


def test_runs_of_numbers_are_read_as_they_are_written(tmp_path: Path) -> None:
    parts = [[0, 1, 2, 7], [3], [4, 6, 8], [5]]
    shards = [{"file": "", "count": len(part), "examples": runs_of(part)} for part in parts]
    assert [shard["examples"] for shard in shards] == ["0-2 7", "3", "4 6 8", "5"]
    assert [list(found) for found in examples_of(tmp_path, {"count": 9, "shards": shards})] == parts
