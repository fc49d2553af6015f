"""Distances between sets of images: against their reference libraries, and in the direction they should move."""

import hashlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from metric_inputs import Pixels, Pool, featured, published_folder, smooth
from torch import nn

from ssmgen.metrics import (
    FID_PROTOCOLS,
    FeatureSet,
    InceptionTrunk,
    LPIPSDiversity,
    MaskAgreement,
    SqueezeNetTrunk,
    frechet_distance,
    gather,
    kernel_distance,
)
from ssmgen.metrics.backbones import INCEPTION, Weights, published_lpips, weights_hash

pytest.importorskip("torch_fidelity")
pytest.importorskip("lpips")


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


@pytest.fixture(params=["random", "published"])
def inception(request, random_inception):
    """The state of both networks: seeded random weights, and the published ones where they are given."""
    if request.param == "random":
        return random_inception
    return torch.load(INCEPTION.find(published_folder()), weights_only=True)


@pytest.mark.slow
def test_fid_and_kid_are_torch_fidelitys_on_the_same_files(inception, tmp_path):
    from PIL import Image
    from torch_fidelity import calculate_metrics

    sets = {"generated": smooth(8, 1, 40), "real": smooth(7, 2, 40)}
    for name, batch in sets.items():
        (tmp_path / name).mkdir()
        for k, image in enumerate(batch):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{k:03d}.png")
    torch.save(inception, tmp_path / "trunk.pth")
    theirs = calculate_metrics(
        input1=str(tmp_path / "generated"), input2=str(tmp_path / "real"), fid=True, kid=True, kid_subset_size=6,
        feature_extractor_weights_path=str(tmp_path / "trunk.pth"), cuda=False, cache=False, verbose=False,
        save_cpu_ram=True,
    )  # fmt: skip
    trunk = InceptionTrunk(inception, "tf1")
    ours = [featured(trunk, batch) for batch in sets.values()]
    fid, kid = frechet_distance(*ours), kernel_distance(*ours, subset_size=6)
    assert fid["value"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert kid["value"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert (fid["n"], fid["reference_n"]) == (8, 7)


@pytest.fixture
def reference_inception(random_inception, monkeypatch):
    """pytorch-fid's network with the same weights: ``reference_inception(**its arguments)``."""
    module = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: random_inception)

    def make(**arguments):
        network = module.InceptionV3([3], **arguments).eval()
        return lambda images: network(images)[0].flatten(1)

    return make


@pytest.mark.slow
@torch.no_grad()
def test_sdm_oasis_is_the_published_code_on_pytorch_fids_network(random_inception, reference_inception):
    """OASIS and SDM: scikit-image to 256 in floats that are not rounded, divided by 255, then pytorch-fid's network."""
    resize = pytest.importorskip("skimage.transform").resize
    batch = torch.randint(0, 256, (2, 3, 300, 300), dtype=torch.uint8)  # fine detail, which resizing takes away
    theirs = [resize(image.movedim(0, -1).float().numpy(), (256, 256, 3)) / 255 for image in batch]
    expected = reference_inception()(torch.stack([torch.from_numpy(image).movedim(-1, 0) for image in theirs]).float())
    for name in ("sdm-oasis", "train-ref"):
        trunk = FID_PROTOCOLS[name].trunk(random_inception)
        assert (trunk(batch) - expected).norm() < 1e-4 * expected.norm()
    other = InceptionTrunk(random_inception, "torch")(batch)
    assert (other - expected).norm() > 1e-2 * expected.norm(), "the resizing to 256 makes a difference"


@pytest.mark.slow
@torch.no_grad()
def test_clean_is_clean_fids_resizing_before_the_same_network(random_inception, reference_inception):
    resizer = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    batch = smooth(2, 4, 340)
    theirs = torch.stack([torch.from_numpy(resizer(i.movedim(0, -1).numpy())).movedim(-1, 0) for i in batch])
    expected = reference_inception(resize_input=False, normalize_input=False)((theirs - 128) / 128)
    ours = FID_PROTOCOLS["clean"].trunk(random_inception)(batch)
    assert (ours - expected).norm() < 1e-4 * expected.norm()


def test_the_frechet_distance_is_pytorch_fids():
    theirs = pytest.importorskip("pytorch_fid.fid_score").calculate_frechet_distance
    sets = [featured(Pool(), smooth(40, seed)) for seed in (1, 2)]
    rows = [features.matrix().double().numpy() for features in sets]
    import numpy

    first, second = ((r.mean(axis=0), numpy.cov(r, rowvar=False)) for r in rows)
    assert frechet_distance(*sets)["value"] == pytest.approx(theirs(*first, *second), rel=1e-6)


def test_the_trunk_says_which_resizings_there_are(random_inception):
    with pytest.raises(ValueError, match="resize must be"):
        InceptionTrunk(random_inception, "nearest")
    with pytest.raises(ValueError, match="side must be 0 for resize='tf1'"):
        InceptionTrunk(random_inception, "tf1", 256)


RANKS = """
import sys
sys.path.insert(0, "tests")
import torch
from metric_inputs import Pixels, Pool, smooth
from ssmgen.metrics import FeatureSet, LPIPSDiversity, MaskAgreement, frechet_distance, gather

rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
features, diversity, agreement = FeatureSet(Pool()), LPIPSDiversity(Pixels()), MaskAgreement("ab")
for k in range(rank, 7, 2):
    features.update([f"i{k:05d}"], smooth(7, 1)[k : k + 1])
    diversity.update(f"m{k}", smooth(7, 1)[k : k + 1].float() * torch.linspace(0, 1, 3).view(3, 1, 1, 1))
    agreement.update(smooth(7, 1)[k : k + 1, 0] // 128, smooth(7, 1)[k : k + 1, 1] // 128, [f"a{k}"])
for metric in (features, diversity, agreement):
    gather(metric)
torch.save([features.counted, diversity.result(), agreement.result()], f"{sys.argv[2]}-{rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # a process that only ends may abort in a thread of the group
"""


def test_two_processes_count_as_one(tmp_path):
    root = Path(__file__).parents[1]
    words = [sys.executable, "-c", RANKS]
    ranks = [
        subprocess.Popen([*words, str(rank), str(tmp_path / "store")], cwd=root, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        assert rank.wait(600) == 0, rank.stderr.read()
    whole, diversity, agreement = featured(Pool(), smooth(7, 1)), LPIPSDiversity(Pixels()), MaskAgreement("ab")
    for k, image in enumerate(smooth(7, 1)):
        diversity.update(f"m{k}", image[None].float() * torch.linspace(0, 1, 3).view(3, 1, 1, 1))
    agreement.update(smooth(7, 1)[:, 0] // 128, smooth(7, 1)[:, 1] // 128, [f"a{k}" for k in range(7)])
    for rank in range(2):
        rows, theirs, agreed = torch.load(tmp_path / f"store-{rank}.pt", weights_only=True)
        joined = FeatureSet(Pool())
        joined.counted = rows
        torch.testing.assert_close(joined.matrix(), whole.matrix())
        assert joined.list_hash() == whole.list_hash()
        assert theirs.pop("value") == pytest.approx(diversity.result()["value"], rel=1e-6)
        assert theirs.items() < diversity.result().items() and agreed == agreement.result()


def test_gathering_alone_changes_nothing():
    features = featured(Pool(), smooth(3, 1))
    before = dict(features.counted)
    gather(features)
    assert features.counted == before


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
        "blurred": nn.functional.avg_pool2d(again.float(), 9, 1, 4).to(torch.uint8),
        "dark": again // 2,
        "collapsed": again[:2].repeat(150, 1, 1, 1),
    }
    fid = {name: frechet_distance(featured(trunk, batch), real)["value"] for name, batch in sets.items()}
    kid = {name: kernel_distance(featured(trunk, b), real, subset_size=200)["value"] for name, b in sets.items()}
    for name in ("noisy", "blurred", "dark", "collapsed"):
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
    other = featured(Pool(8), smooth(9, 1))
    with pytest.raises(ValueError, match="features of different networks"):
        frechet_distance(many, other)
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
    with pytest.raises(ValueError, match="SHA-256 is .*Put https://.* there"):
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


def test_a_download_that_fails_names_the_file_and_leaves_nothing(tmp_path):
    source = tmp_path / "published.bin"
    missing = Weights("kept.bin", source.as_uri(), "0" * 64)
    with pytest.raises(FileNotFoundError, match=r"kept.bin: could not be fetched \(.*Put file:.*published.bin there"):
        missing.find(tmp_path / "new", download=True)
    source.write_bytes(b"another page")
    with pytest.raises(ValueError, match="kept.bin: SHA-256 is"):
        missing.find(tmp_path / "new", download=True)
    assert not list((tmp_path / "new").iterdir())


def test_results_say_what_they_were_computed_from(random_inception):
    text = "fid[sdm-oasis,inception-tf-2015,pool3-2048,resize=skimage256+torch299,ref=test9,n=8,seed=0]"
    trunk = FID_PROTOCOLS["sdm-oasis"].trunk(random_inception)
    weights = trunk.weights
    assert weights == weights_hash(trunk.network) != weights_hash(Pool())
    trunk.forward = Pool().forward  # the numbers are another test's
    sets = [FeatureSet(trunk, "seed=0"), FeatureSet(trunk, "test")]
    for features, count in zip(sets, (8, 9), strict=True):
        features.update([f"{k}" for k in range(count)], smooth(count, count))
    fid, kid = frechet_distance(*sets), kernel_distance(*sets, subset_size=4)
    assert fid["protocol"] == text and kid["protocol"].startswith("kid[sdm-oasis,") and "100x4" in kid["protocol"]
    for result in (fid, kid):
        assert result["weights"] == weights and (result["n"], result["reference_n"]) == (8, 9)
        assert result["list"] == sets[0].list_hash() != result["reference_list"] == sets[1].list_hash()
        assert result["reference_features"] == sets[1].feature_hash() != sets[0].feature_hash()
    assert FID_PROTOCOLS["train-ref"].reference == "train"
    assert frechet_distance(*(featured(Pool(), smooth(4, k)) for k in (1, 2)))["protocol"] == "frechet[Pool,ref=4,n=4]"
