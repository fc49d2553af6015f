"""The cache of encoded images."""

import errno
import json
import multiprocessing
import os
import pickle
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from ssmgen import atomic, build
from ssmgen.data import CacheError, LabelSet, latent_cache, shards
from ssmgen.data.cache_files import write_record
from ssmgen.data.latent_cache import LatentCache, cache_record, rebuild_latent_cache, write_latent_cache
from ssmgen.reading import sha256_of

LABELS = LabelSet("toy", ("a", "l", "r"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)), ((1, 2),))


class Pairs:
    labels = LABELS

    def __init__(self, count=5, name="toy-1"):
        self.count, self.name = count, name

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        g = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, 16, 16), generator=g, dtype=torch.uint8)
        return image, torch.randint(0, 3, (16, 16), generator=g, dtype=torch.uint8)

    def fingerprint(self):
        return self.name


def test_cache_holds_latents_masks_and_flips(tiny, tmp_path):
    ae, pairs, target = build("autoencoder-tiny", source=str(tiny)), Pairs(), tmp_path / "cache"
    seen = []
    write_latent_cache(pairs, ae, target, flip=True, batch_size=2, progress=seen.append)
    assert sum(seen) == 5
    cache = LatentCache(target, LABELS, cache_record(pairs, ae, True))
    assert len(cache) == 5
    for index in range(5):
        image, mask = pairs[index]
        x = image.unsqueeze(0).float() / 127.5 - 1
        latent, stored = cache[index].values()
        torch.testing.assert_close(latent, ae.encode(x)[0])
        assert torch.equal(stored, mask)
        mirrored, swapped = cache.flipped(index).values()
        torch.testing.assert_close(mirrored, ae.encode(x.flip(-1))[0])
        assert torch.equal(swapped == 1, mask.flip(-1) == 2) and torch.equal(swapped == 0, mask.flip(-1) == 0)


def test_latents_of_a_network_that_answers_channels_last_are_cached(kl, tmp_path):
    ae = build("autoencoder-kl", source=str(kl))
    x = torch.stack([Pairs()[index][0] for index in range(4)]).float() / 127.5 - 1
    write_latent_cache(Pairs(4), ae, tmp_path / "cache", flip=True, batch_size=4)
    cache = LatentCache(tmp_path / "cache", LABELS)
    torch.testing.assert_close(torch.stack([cache[index]["data"] for index in range(4)]), ae.encode(x))


def test_latents_that_are_no_numbers_are_refused(tiny, tmp_path):
    ae = build("autoencoder-tiny", source=str(tiny))
    next(ae.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="autoencoder-tiny: its latents of the images are not finite"):
        write_latent_cache(Pairs(), ae, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


class Where:
    """Says in its latents how many threads it has, and whether it is in a loader process."""

    def encode(self, x):
        loader = torch.utils.data.get_worker_info() is not None
        return torch.tensor([[[[float(torch.get_num_threads()), float(loader)]]]]).expand(len(x), -1, -1, -1)

    def describe(self):
        return {}


@pytest.mark.parametrize(("workers", "expected"), [(0, [3.0, 0.0]), (2, [1.0, 1.0])])
def test_loader_processes_encode_each_on_one_thread(tmp_path, workers, expected):
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        write_latent_cache(
            Pairs(), Where(), tmp_path / "cache", batch_size=2, num_workers=workers, progress=seen.append
        )
    finally:
        torch.set_num_threads(before)
    cache = LatentCache(tmp_path / "cache", LABELS)
    assert [cache[i]["data"].flatten().tolist() for i in range(5)] == [expected] * 5 and seen == [2, 2, 1]


def test_a_cache_is_the_same_whoever_encodes(tiny, kl, tmp_path):
    for name, source in (("autoencoder-tiny", tiny), ("autoencoder-kl", kl)):
        ae, pairs = build(name, source=str(source)), Pairs(4)  # whole batches: a kl network's are channels last
        for workers in (0, 2):
            target = tmp_path / f"{name}-{workers}"
            write_latent_cache(pairs, ae, target, flip=True, batch_size=2, num_workers=workers)
        one, other = (LatentCache(tmp_path / f"{name}-{workers}", LABELS) for workers in (0, 2))
        for index in range(4):
            for mine, theirs in ((one[index], other[index]), (one.flipped(index), other.flipped(index))):
                torch.testing.assert_close(mine["data"], theirs["data"], rtol=1e-4, atol=1e-5)
                assert torch.equal(mine["mask"], theirs["mask"])


def test_cache_spans_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "_SHARD", 3)
    write_latent_cache(Pairs(8), build("identity"), tmp_path / "cache", batch_size=2)
    cache = LatentCache(tmp_path / "cache", LABELS)
    for index in range(8):
        torch.testing.assert_close(cache[index]["data"], Pairs()[index][0].float() / 127.5 - 1)


def test_cache_of_another_source_or_autoencoder_is_refused(tiny, tmp_path):
    ae, target = build("autoencoder-tiny", source=str(tiny)), tmp_path / "cache"
    write_latent_cache(Pairs(), ae, target)
    scaled = build("autoencoder-tiny", source=str(tiny), scale=0.5)
    with pytest.raises(ValueError, match="was written with autoencoder=.*'scale': 1.0.*'scale': 0.5"):
        LatentCache(target, LABELS, cache_record(Pairs(), scaled, False))
    with pytest.raises(ValueError, match="was written with source=toy-1, but source=toy-2"):
        LatentCache(target, LABELS, cache_record(Pairs(name="toy-2"), ae, False))
    with pytest.raises(FileExistsError, match="exists already"):
        write_latent_cache(Pairs(), ae, target)
    with pytest.raises(ValueError, match="no mirrored latents"):
        LatentCache(target, LABELS).flipped(0)


def test_an_interrupted_cache_leaves_nothing(tmp_path):
    class Broken(Pairs):
        def __getitem__(self, index):
            if index == 3:
                raise OSError("disk gone")
            return super().__getitem__(index)

    with pytest.raises(OSError, match="disk gone"):
        write_latent_cache(Broken(), build("identity"), tmp_path / "cache", batch_size=1)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "cache").mkdir()
    with pytest.raises(FileNotFoundError, match="no complete latent cache"):
        LatentCache(tmp_path / "cache", LABELS)


def test_two_processes_may_make_the_same_cache(tmp_path, monkeypatch):
    class Overtaken(Pairs):
        """While this one encodes, another process finishes the same cache."""

        def __getitem__(self, index):
            if index == 4 and not (tmp_path / "cache").exists():
                with monkeypatch.context() as patch:
                    patch.setattr(atomic.os, "getpid", lambda: 1)
                    write_latent_cache(Pairs(), build("identity"), tmp_path / "cache")
            return super().__getitem__(index)

    write_latent_cache(Overtaken(), build("identity"), tmp_path / "cache", batch_size=1)
    assert len(LatentCache(tmp_path / "cache", LABELS)) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_a_cache_can_be_sent_to_loader_processes(tmp_path):
    write_latent_cache(Pairs(), build("identity"), tmp_path / "cache")
    cache = LatentCache(tmp_path / "cache", LABELS)
    first = cache[0]
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy[0]["data"], first["data"])


def test_record_is_readable(tmp_path):
    write_latent_cache(Pairs(), build("identity"), tmp_path / "cache")
    record = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert record["source"] == "toy-1" and record["autoencoder"]["name"] == "identity" and record["count"] == 5
    assert load_file(tmp_path / "cache" / "shard-00000.safetensors")["masks"].dtype == torch.uint8


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Eight pairs in shards of three, with flips."""
    monkeypatch.setattr(latent_cache, "_SHARD", 3)
    write_latent_cache(Pairs(8), build("identity"), tmp_path / "cache", flip=True, batch_size=2)
    return tmp_path / "cache"


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def flip_bit(file, place):
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 1
    file.write_bytes(content)


def replace_with(file, make):
    file.unlink()
    make(file)


DAMAGE = {
    "a bit": lambda shard: flip_bit(shard, -1),
    "the header": lambda shard: flip_bit(shard, 20),
    "the length of the header": lambda shard: shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:]),
    "cut": lambda shard: os.truncate(shard, shard.stat().st_size - 1),
    "longer": lambda shard: shard.write_bytes(shard.read_bytes() + b"0"),
    "empty": lambda shard: shard.write_bytes(b""),
    "missing": lambda shard: shard.unlink(),
    "another shard": lambda shard: shard.write_bytes((shard.parent / "shard-00000.safetensors").read_bytes()),
    "a FIFO": lambda shard: replace_with(shard, os.mkfifo),
    "a device": lambda shard: replace_with(shard, lambda file: file.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_named_and_rebuilt_to_the_same_bytes(cached, kind, capsys):
    before, seen = contents(cached), []
    DAMAGE[kind](cached / "shard-00001.safetensors")
    fix = f"shard-00001.safetensors: (.|\n)*Delete the cache {cached} so that it is written again, or: rebuild_latent"
    with pytest.raises(CacheError, match=fix):
        LatentCache(cached, LABELS)
    arguments = {"flip": True, "batch_size": 2}
    written = rebuild_latent_cache(Pairs(8), build("identity"), cached, progress=seen.append, **arguments)
    assert [file.name for file in written] == ["shard-00001.safetensors"] and sum(seen) == 3, "the others are kept"
    assert "it is encoded again" in capsys.readouterr().err and contents(cached) == before
    assert len(LatentCache(cached, LABELS)) == 8
    assert rebuild_latent_cache(Pairs(8), build("identity"), cached, **arguments) == []


def test_an_additional_shard_is_named(cached):
    (cached / "shard-00003.safetensors").write_bytes((cached / "shard-00000.safetensors").read_bytes())
    with pytest.raises(CacheError, match=r"shard-00003.safetensors: is not one of the recorded shards"):
        LatentCache(cached, LABELS)
    rebuild_latent_cache(Pairs(8), build("identity"), cached, flip=True)
    assert len(LatentCache(cached, LABELS)) == 8


def test_swapped_shards_are_both_named(cached):
    first, second = (cached / f"shard-0000{number}.safetensors" for number in (0, 1))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    with pytest.raises(CacheError, match=r"2 file\(s\) of the cache(.|\n)*shard-00000(.|\n)*shard-00001"):
        LatentCache(cached, LABELS)


def test_a_damaged_record_is_named_and_everything_rebuilt(cached, capsys):
    before = contents(cached)
    for damage in (b"", b"{", b"[]", b"null", b"[" * 9_000, b"\xff\xfe", b'{"count": 1' + b"0" * 5_000 + b"}"):
        (cached / "cache.json").write_bytes(damage)
        with pytest.raises(CacheError, match=r"cache\.json: .*Delete the cache"):
            LatentCache(cached, LABELS)
    (cached / "cache.json").unlink()
    os.mkfifo(cached / "cache.json")
    with pytest.raises(CacheError, match=r"cache\.json: is a FIFO"):
        LatentCache(cached, LABELS)
    rebuild_latent_cache(Pairs(8), build("identity"), cached, flip=True, batch_size=2)
    assert contents(cached) == before and "all of it is encoded again" in capsys.readouterr().err


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bit_of_a_record_changes_in_silence(cached, place, bit):
    record = cached / "cache.json"
    before = record.read_bytes()
    content = bytearray(before)
    content[place % len(content)] ^= 1 << bit
    record.write_bytes(content)
    try:
        again = LatentCache(cached, LABELS).record
    except CacheError as error:
        assert "cache.json: " in str(error)
    else:
        record.write_bytes(before)
        assert again == LatentCache(cached, LABELS).record, "only white space may differ"
    record.write_bytes(before)


HOSTILE = [
    ("count", -8),
    ("count", 8.0),
    ("count", True),
    ("flip", "yes"),
    ("format", 4),
    ("format", "3"),
    ("shards", {"a": 1}),
    ("shards", [1]),
    *(
        ("shards", [{"file": name, "bytes": 1, "sha256": "0", "count": 8}])
        for name in ("../shard-00000.safetensors", "/etc/passwd", "shard-00000.safetensors\n", "")
    ),
    ("shards", [{"file": "shard-00000.safetensors", "bytes": -1, "sha256": "0", "count": 8}]),
    ("shards", [{"file": "shard-00000.safetensors", "bytes": 1, "sha256": 0, "count": 8}]),
    ("shards", [{"file": "shard-00000.safetensors", "bytes": 1, "sha256": "0", "count": 4}] * 2),
]


@pytest.mark.parametrize(("key", "value"), HOSTILE)
def test_a_record_that_was_written_to_mislead_is_refused(cached, key, value):
    """With a checksum that fits: whoever can write the record can compute it."""
    record = json.loads((cached / "cache.json").read_text())
    del record["sha256"]
    write_record(cached, record | {key: value})
    with pytest.raises(CacheError, match=r"cache\.json: "):
        LatentCache(cached, LABELS)


HEADERS = [
    {},
    {"latents": {"dtype": "F32", "shape": [3, -4], "data_offsets": [0, 48]}},
    {"latents": {"dtype": "F32", "shape": [3, 4], "data_offsets": [-48, 0]}},
    {"latents": {"dtype": "F32", "shape": [3, 2**40], "data_offsets": [0, 3 * 2**42]}},
    {"latents": {"dtype": "object", "shape": [3], "data_offsets": [0, 12]}},
    {"latents": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}},
    {"latents": 3},
    [],
]


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_was_written_to_mislead_is_refused(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "shard").write_bytes(len(text).to_bytes(8, "little") + text + bytes(48))
    with pytest.raises(CacheError, match="shard: "):
        shards.Shard(tmp_path / "shard")


def test_a_shard_that_is_truncated_while_it_is_read_is_named_and_kills_nothing(cached):
    """Through a memory map, this read would end the process by SIGBUS."""
    cache = LatentCache(cached, LABELS)
    expected = cache[4]["data"]
    os.truncate(cached / "shard-00001.safetensors", 4096)
    with pytest.raises(CacheError, match=r"shard-00001.safetensors: has 4,096 bytes.*Delete the cache"):
        cache[4]
    assert cache[0]["data"].shape == expected.shape, "the others are read"


def test_a_shard_that_is_replaced_after_the_opening_is_named_and_a_touched_one_is_read(cached):
    cache, shard = LatentCache(cached, LABELS), cached / "shard-00001.safetensors"
    expected = cache[4]["data"]
    os.utime(shard, (1, 1))
    assert torch.equal(cache[4]["data"], expected), "another date is no fault"
    flip_bit(shard, -1)
    with pytest.raises(CacheError, match="shard-00001.safetensors: its SHA-256"):
        cache[4]


def test_an_error_of_a_loader_process_is_one_sentence(cached):
    without_traceback = pytest.importorskip("ssmgen.training.processes").without_traceback
    cache = LatentCache(cached, LABELS)
    (cached / "shard-00001.safetensors").unlink()
    batches = iter(DataLoader(cache, 2, num_workers=1))
    with pytest.raises(CacheError) as raised:
        list(batches)
    batches._shutdown_workers()  # the error's frames hold it
    assert without_traceback(raised.value).startswith(f"{cached}/shard-00001.safetensors: no such file. Delete")
    assert without_traceback(CacheError("x: y")) == "x: y"


def test_files_are_verified_once_per_opening(cached, monkeypatch):
    hashed = []
    monkeypatch.setattr(shards, "sha256_of", lambda file: hashed.append(file.name) or sha256_of(file))
    cache = LatentCache(cached, LABELS)
    assert sorted(hashed) == [f"shard-0000{number}.safetensors" for number in range(3)]
    copy = pickle.loads(pickle.dumps(cache))  # as loader processes get it
    assert all(torch.equal(copy[index]["data"], cache[index]["data"]) for index in range(8)) and len(hashed) == 3
    assert len(LatentCache(cached, LABELS, verify=False)) == 8 and len(hashed) == 3


def test_few_files_are_open_at_a_time(cached, monkeypatch):
    monkeypatch.setattr(latent_cache, "_MOST_OPEN", 1)
    cache = LatentCache(cached, LABELS)
    before = len(os.listdir("/proc/self/fd"))
    for index in (0, 7, 3, 0):
        cache[index]
        assert len(os.listdir("/proc/self/fd")) == before + 1
    with pytest.raises(IndexError, match="example 8 of 8"):
        cache[8]


def as_format_1(cached):
    record = json.loads((cached / "cache.json").read_text())
    old = {key: record[key] for key in ("autoencoder", "source", "flip", "count")}
    (cached / "cache.json").write_text(json.dumps(old, indent=2) + "\n")


def test_a_cache_of_format_1_is_read_and_gets_hashes(cached, capsys):
    before, expected = contents(cached), LatentCache(cached, LABELS)
    as_format_1(cached)
    cache = LatentCache(cached, LABELS, cache_record(Pairs(8), build("identity"), True))
    assert all(torch.equal(cache[index]["data"], expected[index]["data"]) for index in range(8))
    assert capsys.readouterr().err == (
        f"{cached}: a latent cache of format 1, without hashes: it is hashed now and verified from now on\n"
    )
    assert json.loads((cached / "cache.json").read_text()) == json.loads(before["cache.json"])
    LatentCache(cached, LABELS)
    assert capsys.readouterr().err == ""
    as_format_1(cached)
    (cached / "shard-00002.safetensors").unlink()
    with pytest.raises(CacheError, match="holds 6 examples, 8 are recorded"):
        LatentCache(cached, LABELS)


def test_a_cache_that_will_not_fit_is_refused_before_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "free_space", lambda _: 5_000)
    with pytest.raises(OSError, match=r"cache: needs 16.6 kB, but only 5.0 kB are free") as raised:
        write_latent_cache(Pairs(5), build("identity"), tmp_path / "cache", batch_size=2)
    assert raised.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interruption_leaves_no_files_and_no_processes(tmp_path, workers):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        write_latent_cache(
            Pairs(), build("identity"), tmp_path / "cache", batch_size=1, num_workers=workers, progress=stop
        )
    deadline = time.monotonic() + 5
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert multiprocessing.active_children() == [] and raised.value.__traceback__ is not None
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_gives_other_bits_is_reported(cached, capsys):
    class Drifted:
        def describe(self):
            return build("identity").describe()

        def encode(self, x):
            return x + 1

    flip_bit(cached / "shard-00001.safetensors", -1)
    rebuild_latent_cache(Pairs(8), Drifted(), cached, flip=True)
    assert "shard-00001.safetensors: its bytes differ from the former ones" in capsys.readouterr().err
    assert LatentCache(cached, LABELS)[4]["data"].min() >= 0
    with pytest.raises(ValueError, match="was written with source=toy-1, but source=toy-2"):
        rebuild_latent_cache(Pairs(8, "toy-2"), build("identity"), cached, flip=True)


def test_shards_of_different_lengths_inside_are_refused(tmp_path):
    save_file({"latents": torch.zeros(3, 2), "masks": torch.zeros(2, 2)}, tmp_path / "shard")
    with pytest.raises(CacheError, match="different numbers of rows"):
        shards.Shard(tmp_path / "shard")
