"""Distances between sets of images: against their reference libraries, and in the direction they should move."""

import hashlib
import io

import pytest
import torch
from torch import nn

from ssmgen.metrics import (
    FID_PROTOCOLS,
    FeatureSet,
    InceptionTrunk,
    LPIPSDiversity,
    SqueezeNetTrunk,
    frechet_distance,
    kernel_distance,
    lpips_network,
)
from ssmgen.metrics.backbones import INCEPTION, Weights, published_lpips

pytest.importorskip("torch_fidelity")
pytest.importorskip("lpips")


class Pool(nn.Module):
    """A tiny seeded trunk: pooled random convolutions."""

    def __init__(self, size=6):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, size, 5)

    @torch.no_grad()
    def forward(self, images):
        return self.conv(images.float() / 255).abs().mean(dim=(2, 3))


def images(count, seed, side=24):
    return torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def smooth(count, seed, side=24):
    """Images with structure: random colours, blown up."""
    small = images(count, seed, 4).float()
    return nn.functional.interpolate(small, (side, side), mode="bicubic").clamp(0, 255).to(torch.uint8)


def featured(trunk, batch, prefix="i"):
    features = FeatureSet(trunk)
    features.update([f"{prefix}{k:05d}" for k in range(len(batch))], batch)
    return features


@pytest.fixture(scope="module")
def random_inception():
    """State of the Inception network with seeded random weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    class Bare(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    torch.manual_seed(0)
    buffer = io.BytesIO()
    torch.save({}, buffer)
    buffer.seek(0)
    state = Bare("random", ["2048"], feature_extractor_weights_path=buffer).state_dict()
    for name, value in state.items():
        if name.endswith("weight") and value.dim() == 4:
            nn.init.kaiming_normal_(value)
    return state


@pytest.mark.slow
def test_fid_and_kid_are_torch_fidelitys_on_the_same_files(random_inception, tmp_path):
    from PIL import Image
    from torch_fidelity import calculate_metrics

    sets = {"generated": smooth(14, 1, 40), "real": smooth(12, 2, 40)}
    for name, batch in sets.items():
        (tmp_path / name).mkdir()
        for k, image in enumerate(batch):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{k:03d}.png")
    torch.save(random_inception, tmp_path / "trunk.pth")
    theirs = calculate_metrics(
        input1=str(tmp_path / "generated"), input2=str(tmp_path / "real"), fid=True, kid=True, kid_subset_size=10,
        feature_extractor_weights_path=str(tmp_path / "trunk.pth"), cuda=False, cache=False, verbose=False,
        save_cpu_ram=True,
    )  # fmt: skip
    trunk = InceptionTrunk(random_inception, "tf1")
    ours = [featured(trunk, batch) for batch in sets.values()]
    fid, kid = frechet_distance(*ours), kernel_distance(*ours, subset_size=10)
    assert fid["value"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert kid["value"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert (fid["n"], fid["reference_n"]) == (14, 12)


@pytest.mark.slow
def test_the_resizings_differ_and_agree_at_the_networks_own_size(random_inception):
    trunks = {resize: InceptionTrunk(random_inception, resize) for resize in ("tf1", "torch", "antialias")}
    features = {name: trunk(smooth(1, 3, 64)) for name, trunk in trunks.items()}
    assert (features["tf1"] - features["antialias"]).norm() > 1e-3 * features["tf1"].norm()
    native = {name: trunk(smooth(1, 3, 299)) for name, trunk in trunks.items()}
    torch.testing.assert_close(native["antialias"], native["tf1"], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="resize must be"):
        InceptionTrunk(random_inception, "nearest")


def test_lpips_diversity_is_the_packages_mean_over_all_pairs(monkeypatch):
    import warnings

    import lpips
    import torchvision

    torch.manual_seed(0)
    state = {f"features.{key}": value for key, value in torchvision.models.alexnet().features.state_dict().items()}
    network = lpips_network(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    reference.net.load_state_dict(network.net.state_dict())
    assert any((a == state["features.0.weight"]).all() for a in reference.net.state_dict().values() if a.dim() == 4)
    batch = smooth(4, 5, 64).float() / 127.5 - 1
    expected = torch.stack([reference(batch[i : i + 1], batch[j : j + 1]) for i in range(4) for j in range(i)]).mean()
    for pairs in (2, 15):
        diversity = LPIPSDiversity(network, pairs)
        diversity.update("m", batch)
        assert diversity.result()["value"] == pytest.approx(expected.item(), rel=1e-4)
    same = LPIPSDiversity(network)
    same.update("m", batch[:1].expand(3, -1, -1, -1))
    assert same.result()["value"] < 1e-6
    with pytest.raises(ValueError, match="mask m was counted already"):
        same.update("m", batch)
    with pytest.raises(ValueError, match="count >= 2"):
        same.update("n", batch[:1])


def test_batches_order_and_processes_do_not_matter():
    batch, trunk = smooth(9, 1), Pool()
    whole, real = featured(trunk, batch), featured(trunk, smooth(9, 2))
    halves = [FeatureSet(trunk), FeatureSet(trunk)]
    for k in reversed(range(9)):
        halves[k % 2].update([f"i{k:05d}"], batch[k : k + 1])
    halves[0].merge(halves[1])
    torch.testing.assert_close(halves[0].matrix(), whole.matrix())
    assert halves[0].list_hash() == whole.list_hash()
    assert frechet_distance(halves[0], real)["value"] == pytest.approx(frechet_distance(whole, real)["value"], abs=1e-6)
    with pytest.raises(ValueError, match="images given twice: i00001"):
        halves[0].merge(halves[1])


def test_known_changes_move_the_distances_the_right_way():
    trunk = Pool(8)
    real, again = featured(trunk, smooth(300, 1)), smooth(300, 2)
    noisy = (again.float() + 60 * torch.randn(again.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    sets = {
        "fresh": again,
        "noisy": noisy.to(torch.uint8),
        "dark": again // 2,
        "collapsed": again[:2].repeat(150, 1, 1, 1),
    }
    fid = {name: frechet_distance(featured(trunk, batch), real)["value"] for name, batch in sets.items()}
    kid = {name: kernel_distance(featured(trunk, b), real, subset_size=200)["value"] for name, b in sets.items()}
    for name in ("noisy", "dark", "collapsed"):
        assert fid[name] > 3 * fid["fresh"], name
        assert kid[name] > kid["fresh"], name
    assert frechet_distance(real, real)["value"] == pytest.approx(0, abs=1e-5)


def test_the_proxy_orders_degradations(shared):
    file = shared / "squeezenet11" / "squeezenet11_features_from_keras.safetensors"
    if not file.exists():
        pytest.skip(f"{file} is absent")
    from PIL import Image
    from torchvision.transforms.functional import gaussian_blur, pil_to_tensor

    files = sorted((shared / "faces" / "images").glob("*.jpg"))[:40]
    faces = torch.stack([pil_to_tensor(Image.open(f).convert("RGB").resize((128, 128))) for f in files])
    trunk = SqueezeNetTrunk(file)
    real = featured(trunk, faces[:20])
    distance = [
        frechet_distance(featured(trunk, batch), real)["value"]
        for batch in (faces[20:], gaussian_blur(faces[20:], 9, 2.0), gaussian_blur(faces[20:], 25, 6.0))
    ]
    assert distance == sorted(distance)


def test_too_few_or_wrong_images_are_named():
    trunk = Pool()
    one, many = featured(trunk, smooth(1, 1)), featured(trunk, smooth(9, 1))
    with pytest.raises(ValueError, match="the generated set has 1 images, at least 2"):
        frechet_distance(one, many)
    with pytest.raises(ValueError, match="the real set has 1 images, at least 9"):
        kernel_distance(many, one, subset_size=9)
    with pytest.raises(ValueError, match="got 2 ids and 9 images"):
        FeatureSet(trunk).update(["a", "b"], smooth(9, 1))
    with pytest.raises(ValueError, match="images given twice: a"):
        FeatureSet(trunk).update(["a", "a"], smooth(2, 1))


@pytest.mark.parametrize("wrong", [torch.zeros(1, 4, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8)])
def test_grey_alpha_or_float_images_are_refused(random_inception, wrong):
    with pytest.raises(ValueError, match="images must be uint8"):
        InceptionTrunk(random_inception)(wrong)


def test_missing_and_damaged_weights_name_the_file_and_nothing_is_fetched(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"pt_inception-2015-12-05-6726825d.pth: not found. Put https://.*there"
    ):
        InceptionTrunk.published(tmp_path)
    with pytest.raises(FileNotFoundError, match="alexnet-owt-7be5be79.pth: not found"):
        published_lpips(tmp_path)
    (tmp_path / INCEPTION.file).write_bytes(b"something else")
    with pytest.raises(ValueError, match="SHA-256 is .*Fetch https://"):
        InceptionTrunk.published(tmp_path)


def test_a_download_that_was_asked_for_is_checked_and_kept(tmp_path):
    source = tmp_path / "published.bin"
    source.write_bytes(b"weights")
    good = hashlib.sha256(b"weights").hexdigest()
    weights = Weights("kept.bin", source.as_uri(), good)
    assert weights.find(tmp_path / "new", download=True).read_bytes() == b"weights"
    source.unlink()
    assert weights.find(tmp_path / "new")  # the second time it is there
    with pytest.raises(ValueError, match="SHA-256"):
        Weights("kept.bin", source.as_uri(), "0" * 64).find(tmp_path / "new")


def test_protocols_say_what_they_did():
    pytest.importorskip("skimage")
    oasis, clean = FID_PROTOCOLS["sdm-oasis"], FID_PROTOCOLS["clean"]
    batch = smooth(2, 1, 64)
    assert oasis.prepare(batch).shape == (2, 3, 256, 256)
    assert clean.prepare(batch) is batch
    assert oasis.prepare(smooth(1, 1, 256)).shape == (1, 3, 256, 256)
    text = oasis.string(2000, 2000, 0)
    assert text == "fid[sdm-oasis,inception-tf-2015,pool3-2048,resize=skimage256+torch299,ref=test2000,n=2000,seed=0]"
    assert FID_PROTOCOLS["train-ref"].reference == "train"
