"""Autoencoders in diffusers' and TAESD's layouts."""

import json

import diffusers
import huggingface_hub
import pytest
import torch
from networks import tiny_network
from safetensors.torch import load_file, save_file

from ssmgen import build
from ssmgen.latents import autoencoder_at


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
    with pytest.raises(ValueError, match="config.json: not a configuration of an autoencoder"):
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


def test_a_saved_autoencoder_does_not_tell_where_it_was_read_from(tiny, tmp_path):
    build("autoencoder-tiny", source=str(tiny)).save(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()
