"""The cache of encoded images."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ssmgen import build
from ssmgen.data import LabelSet
from ssmgen.data.latent_cache import LatentCache, cache_record, write_latent_cache

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
    from ssmgen.data import latent_cache

    monkeypatch.setattr(latent_cache, "_SHARD", 3)
    write_latent_cache(Pairs(8), build("identity"), tmp_path / "cache", batch_size=2)
    cache = LatentCache(tmp_path / "cache", LABELS)
    for index in range(8):
        torch.testing.assert_close(cache[index]["data"], Pairs()[index][0].float() / 127.5 - 1)


def test_cache_of_another_source_or_autoencoder_is_refused(tiny, tmp_path):
    ae, target = build("autoencoder-tiny", source=str(tiny)), tmp_path / "cache"
    write_latent_cache(Pairs(), ae, target)
    scaled = build("autoencoder-tiny", source=str(tiny), scale=0.5)
    with pytest.raises(ValueError, match="made with autoencoder .*'scale': 1.0.*'scale': 0.5"):
        LatentCache(target, LABELS, cache_record(Pairs(), scaled, False))
    with pytest.raises(ValueError, match="made with source toy-1, but toy-2"):
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
    from ssmgen import atomic

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
    import pickle

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
