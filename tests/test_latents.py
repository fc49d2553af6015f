"""Autoencoders in diffusers' and TAESD's layouts, and the cache of encoded images."""

import json

import diffusers
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from ssmgen import build
from ssmgen.data import LabelSet
from ssmgen.data.latent_cache import LatentCache, cache_record, write_latent_cache
from ssmgen.latents import autoencoder_at

LABELS = LabelSet("toy", ("a", "l", "r"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)), ((1, 2),))


def tiny_network():
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )


@pytest.fixture
def tiny(tmp_path):
    tiny_network().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def kl(tmp_path):
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.18215,
        shift_factor=0.25,
    ).save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


def images(count=2, size=32):
    return torch.rand(count, 3, size, size) * 2 - 1


def test_identity_is_the_identity():
    ae, x = build("identity"), images()
    assert torch.equal(ae.decode(ae.encode(x)), x) and ae.factor == 1 and ae.channels == 3


@pytest.mark.parametrize("name", ["autoencoder-tiny", "autoencoder-kl"])
def test_shapes_scale_and_shift(name, request):
    folder = request.getfixturevalue("tiny" if name.endswith("tiny") else "kl")
    plain = build(name, source=str(folder), scale=1.0, shift=0.0)
    ae = build(name, source=str(folder))
    z = ae.encode(images())
    assert z.shape == (2, 4, 4, 4) and ae.factor == 8 and ae.channels == 4
    if name == "autoencoder-kl":
        assert (ae.scale, ae.shift) == (0.18215, 0.25)
    torch.manual_seed(0)
    x = images()
    torch.testing.assert_close(ae.encode(x), (plain.encode(x) - ae.shift) * ae.scale)
    torch.testing.assert_close(ae.decode(ae.encode(x)), plain.decode(plain.encode(x)), rtol=1e-3, atol=1e-4)
    assert ae.decode(z).abs().max() <= 1
    assert not any(p.requires_grad for p in ae.parameters())


@pytest.mark.parametrize("name", ["autoencoder-tiny", "autoencoder-kl"])
def test_latents_and_images_are_contiguous_and_do_not_depend_on_the_batch(name, request):
    ae = build(name, source=str(request.getfixturevalue("tiny" if name.endswith("tiny") else "kl")))
    x = images(5)
    latents, decoded = ae.encode(x), ae.decode(ae.encode(x))
    assert latents.is_contiguous() and decoded.is_contiguous()
    torch.testing.assert_close(torch.cat([ae.encode(one) for one in x.split(1)]), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([ae.decode(one) for one in latents.split(1)]), decoded, rtol=1e-4, atol=1e-5)


def test_a_cpu_computes_channels_last_a_few_images_at_a_time(tiny, tmp_path):
    ae = build("autoencoder-tiny", source=str(tiny))
    plain = diffusers.AutoencoderTiny.from_pretrained(tiny, low_cpu_mem_usage=False)
    seen, x = [], images(5, size=128)
    layers = [m for m in ae.network.modules() if isinstance(m, torch.nn.Conv2d)]
    for layer in layers:
        layer.register_forward_hook(lambda _, given, out: seen.append((len(out), out.is_contiguous())))
    latents = ae.encode(x)
    ae.decode(latents)
    assert {count for count, _ in seen} == {4, 1} and len(seen) == 2 * len(layers)
    assert not any(contiguous for count, contiguous in seen if count > 1)
    torch.testing.assert_close(latents, plain.encode(x).latents, rtol=1e-4, atol=1e-5)
    before = ae.describe()
    ae.to("cpu").save(tmp_path / "saved")  # contiguous in the file, whatever the layout in memory
    assert build("autoencoder-tiny", source=str(tmp_path / "saved")).describe() == before


def test_description_tells_weights_and_scale_apart(tiny, tmp_path):
    same = build("autoencoder-tiny", source=str(tiny)).describe()
    assert same == build("autoencoder-tiny", source=str(tiny)).describe()
    assert same != build("autoencoder-tiny", source=str(tiny), scale=2.0).describe()
    tiny_network().save_pretrained(tmp_path / "other")
    assert same["weights"] != build("autoencoder-tiny", source=str(tmp_path / "other")).describe()["weights"]


def test_taesds_own_files_are_read(tmp_path):
    network = diffusers.AutoencoderTiny(latent_channels=16)
    weights = network.state_dict()
    encoder = {k.removeprefix("encoder.layers."): v for k, v in weights.items() if k.startswith("encoder.")}
    decoder = {}
    for key, value in weights.items():
        if key.startswith("decoder."):
            index, _, rest = key.removeprefix("decoder.layers.").partition(".")
            decoder[f"{int(index) + 1}.{rest}"] = value
    save_file(encoder, tmp_path / "taesd_encoder.safetensors")
    save_file(decoder, tmp_path / "taesd_decoder.safetensors")
    ae = build("autoencoder-tiny", source=str(tmp_path))
    assert ae.channels == 16
    x = images()
    torch.testing.assert_close(ae.encode(x), network.encode(x).latents)
    torch.testing.assert_close(ae.decode(ae.encode(x)), network.decode(ae.encode(x)).sample.clamp(-1, 1))


@pytest.mark.parametrize(("folder", "least"), [("taesd", 26.0), ("taesd3", 30.0)])
def test_real_autoencoders_on_real_faces(shared, folder, least):
    from ssmgen.data.images import read_image
    from ssmgen.data.transforms import center_crop_resize

    ae = build("autoencoder-tiny", source=str(shared / "autoencoders" / folder))
    files = sorted((shared / "faces" / "images").glob("*.jpg"))[:4]
    x = (
        torch.stack(
            [center_crop_resize(read_image(f), torch.zeros(256, 256, dtype=torch.uint8), 256)[0] for f in files]
        ).float()
        / 127.5
        - 1
    )
    error = (ae.decode(ae.encode(x)) - x).square().mean()
    psnr = -10 * torch.log10(error / 4)
    assert psnr > least


def test_the_class_of_a_source_is_found_and_another_is_refused(tiny, kl, tmp_path):
    assert autoencoder_at(str(tiny)) == "autoencoder-tiny" and autoencoder_at(str(kl)) == "autoencoder-kl"
    with pytest.raises(
        ValueError, match="kl: its config.json names the class AutoencoderKL, .*: give autoencoder=autoenc"
    ):
        build("autoencoder-tiny", source=str(kl))
    with pytest.raises(
        ValueError, match="tiny: its config.json names the class AutoencoderTiny, .*: give autoencoder=auto"
    ):
        build("autoencoder-kl", source=str(tiny))
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"_class_name": "VQModel"}), encoding="utf-8-sig")
    with pytest.raises(ValueError, match="names the class VQModel; there are autoencoders for AutoencoderTiny, Auto"):
        autoencoder_at(str(tiny))
    with pytest.raises(ValueError, match="names the class VQModel, .*: autoencoder-tiny cannot read it"):
        build("autoencoder-tiny", source=str(tiny))
    (tiny / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json: is no configuration of an autoencoder"):
        autoencoder_at(str(tiny))


@pytest.mark.parametrize("name", ["autoencoder-tiny", "autoencoder-kl"])
def test_every_weight_is_read_and_none_made_up(name, request):
    folder = request.getfixturevalue("tiny" if name.endswith("tiny") else "kl")
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    first = min(weights)
    for changed, message in (
        ({key: value for key, value in weights.items() if key != first}, f"lacks 1 weight.* the first {first}"),
        (weights | {"zz.weight": torch.zeros(1)}, r"holds 1 weight\(s\) too many, the first zz.weight"),
        (weights | {first: torch.zeros(3)}, "cannot be loaded into"),
    ):
        save_file(changed, file)
        with pytest.raises(ValueError, match=f"diffusion_pytorch_model.safetensors: {message}"):
            build(name, source=str(folder))
    file.write_bytes(b"damaged")
    with pytest.raises((ValueError, OSError), match="diffusion_pytorch_model.safetensors"):
        build(name, source=str(folder))


def write_taesd(folder, name="taesd"):
    """TAESD's own pair of files, which its authors ship."""
    weights = diffusers.AutoencoderTiny(latent_channels=4).state_dict()
    parts = {"encoder": {}, "decoder": {}}
    for key, value in weights.items():
        part, _, index, rest = key.split(".", 3)
        parts[part][f"{int(index) + (part == 'decoder')}.{rest}"] = value
    for part, content in parts.items():
        save_file(content, folder / f"{name}_{part}.safetensors")
    return parts


def test_taesds_own_files_are_read_whole_or_refused(tmp_path):
    parts = write_taesd(tmp_path)
    for part in parts:
        (tmp_path / f"._taesd_{part}.safetensors").write_bytes(b"left by macOS")
    assert autoencoder_at(str(tmp_path)) == "autoencoder-tiny"
    build("autoencoder-tiny", source=str(tmp_path))
    for part, content in parts.items():
        file = tmp_path / f"taesd_{part}.safetensors"
        first = min(content)
        for changed, message in (
            ({key: value for key, value in content.items() if key != first}, r"1 tensor\(s\) do not fit"),
            (content | {"0.extra": torch.zeros(1)}, r"1 tensor\(s\) do not fit the model, the first layers..*extra"),
            (content | {"extra": torch.zeros(1)}, "holds 'extra'; TAESD's own files hold names such as"),
            ({}, r"(has no bias|67 tensor\(s\) do not fit)"),
        ):
            save_file(changed, file)
            with pytest.raises(ValueError, match=f"taesd_{part}.safetensors: (its last layer )?{message}"):
                build("autoencoder-tiny", source=str(tmp_path))
        save_file(content, file)
    write_taesd(tmp_path, "taesd3")
    with pytest.raises(ValueError, match="holds 2 autoencoders .taesd3_encoder.safetensors, taesd_enc"):
        build("autoencoder-tiny", source=str(tmp_path))


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\./nowhere: no such folder"):
        build("autoencoder-tiny", source="./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: expected config.json.*_encoder"):
        build("autoencoder-tiny", source=str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"empty: expected config.json and \*.safetensors as"):
        build("autoencoder-kl", source=str(tmp_path / "empty"))


def test_a_hub_id_goes_to_the_hub(tiny, monkeypatch):
    asked = []

    def from_pretrained(source, **options):
        asked.append((source, options))
        return tiny_network(), {"missing_keys": [], "unexpected_keys": []}

    def download(source, name):
        if source != "madebyollin/taesd":
            raise OSError("no network")
        return str(tiny / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(diffusers.AutoencoderTiny, "from_pretrained", from_pretrained)
    assert autoencoder_at("madebyollin/taesd") == "autoencoder-tiny"
    build("autoencoder-tiny", source="madebyollin/taesd")
    settings = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    assert asked == [("madebyollin/taesd", settings)]
    with pytest.raises(ValueError, match="names the class AutoencoderTiny, and autoencoder-kl reads AutoencoderKL"):
        build("autoencoder-kl", source="madebyollin/taesd")
    with pytest.raises(FileNotFoundError, match="no/one: no such folder here, .* from the hub: no network"):
        autoencoder_at("no/one")


def test_bad_images_are_explained(tiny):
    ae = build("autoencoder-tiny", source=str(tiny))
    with pytest.raises(ValueError, match=r"images must be \(batch, 3"):
        ae.encode(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match="multiples of 8"):
        ae.encode(torch.zeros(2, 3, 30, 32))
    with pytest.raises(ValueError, match=r"latents must be \(batch, 4"):
        ae.decode(torch.zeros(2, 3, 4, 4))


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


def test_a_saved_autoencoder_does_not_tell_where_it_was_read_from(tiny, tmp_path):
    build("autoencoder-tiny", source=str(tiny)).save(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()
