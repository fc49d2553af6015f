"""FID, KID, LPIPS and the proxy of an evaluation."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")
pytest.importorskip("torch_fidelity", reason="distances need ssmgen[metrics]")


from recipes.sisma import evaluate, train
from recipes.sisma.arguments import UsageError
from recipes.sisma.evaluation import distances
from recipes.sisma.evaluation.images import HeldOut
from recipes.sisma.evaluation.results import summary
from recipes.sisma.evaluation.settings import Settings
from ssmgen.data import CELEBAMASK19
from ssmgen.metrics import FeatureSet, InceptionTrunk, kernel_distance

SMALL = [
    *("image_size=64", "drawn_count=10", "batch_size=4", "model_args.dim=64", "model_args.depth=1", "steps=2"),
    *("sample_every=0", "evaluate_masks=6", "solver_steps=1", "warmup=1", "evaluate=false", "parser=none"),
    *("model_args.mask_dropout=0", "guidance_scale=1"),
]


class Colours(torch.nn.Module):
    """Three features an image, in the place of Inception's."""

    protocol, distances = "colours", ("fid", "kid")

    def forward(self, images):
        return images.float().mean(dim=(2, 3))


class Pixels(torch.nn.Module):
    """A distance of two batches, in the place of LPIPS."""

    def forward(self, first, second):
        return (first - second).abs().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distances")
    train.main([f"run={folder / 'run'}", f"cache={folder / 'cache'}", *SMALL])
    return folder / "run"


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(InceptionTrunk, "published", lambda *_, **__: Colours())
    monkeypatch.setattr(distances, "published_lpips", lambda *_, **__: Pixels())


def test_every_protocol_is_printed_with_what_it_was_computed_from(trained, stand_ins):
    settings = Settings(fid="sdm-oasis,train-ref", lpips=True, diversity_masks=2)
    result = evaluate.evaluate_run(trained, settings, command="test")
    oasis, train_ref = result["distances"]["sdm-oasis"], result["distances"]["train-ref"]
    assert oasis["protocol"] == "fid[sdm-oasis,colours,ref=test6,n=6,seed=0]"
    assert "ref=train10" in train_ref["protocol"] and train_ref["frechet"]["reference_n"] == 10
    assert oasis["frechet"]["value"] != train_ref["frechet"]["value"]
    assert oasis["noise_floor"]["n"] == oasis["noise_floor"]["reference_n"] == 3
    assert oasis["kernel"]["subset_size"] == oasis["kernel_noise_floor"]["n"] == 3, "as many as a half has"
    assert "samples=10,pairs=45,masks=2" in result["lpips"]["protocol"], "what the literature counts"
    assert oasis["frechet"]["weights"] == oasis["weights"] and len(oasis["frechet"]["reference_features"]) == 64
    text, page = summary(result), (trained / "report.html").read_text()
    assert f"FID {oasis['frechet']['value']:.2f}" in text and oasis["protocol"] in text and oasis["protocol"] in page
    for kernel in (oasis["kernel"], oasis["kernel_noise_floor"]):
        assert f"{kernel['value']:.5f}" in text and f"{kernel['value']:.5f}" in page
    assert f"LPIPS diversity {result['lpips']['value']:.3f}" in text and result["lpips"]["protocol"] in page
    assert json.loads((trained / "result.json").read_text())["distances"] == result["distances"]


def test_images_are_far_from_other_images_and_not_from_themselves(stand_ins):
    distance = distances.load_distances(Settings(fid="clean"), 8)[0]
    ids, real = [f"{i}" for i in range(8)], torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    done = []
    held_out = HeldOut(ids, real[:, 0], real, CELEBAMASK19)
    same = distances.measure_distance(distance, held_out, real, None, "given", done.append)
    darker = distances.measure_distance(distance, held_out, real // 2, None, "given", [].append)
    assert same["frechet"]["value"] == pytest.approx(0, abs=1e-6) and darker["frechet"]["value"] > 1000
    assert same["noise_floor"]["value"] == darker["noise_floor"]["value"] > 0
    assert sum(done) == distances.image_count(distance, 8, None) == 16, "what the bar of the progress counts to"
    assert same["frechet"]["list"] == same["frechet"]["reference_list"]


def test_the_kernel_distance_of_real_halves_is_its_noise_floor(stand_ins, monkeypatch):
    monkeypatch.setattr(distances, "_KID_SUBSET", 5)
    distance = distances.load_distances(Settings(fid="clean"), 24)[0]
    images = torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8)
    ids = [f"{i:02}" for i in range(24)]
    held_out = HeldOut(ids, images[:, 0], images, CELEBAMASK19)
    found = distances.measure_distance(distance, held_out, images // 2, None, "given", [].append)
    halves = [FeatureSet(distance.trunk, "test") for _ in range(2)]
    for half, which in zip(halves, (0, 1), strict=True):
        half.update(ids[which::2], images[which::2])
    assert found["kernel_noise_floor"]["value"] == kernel_distance(*halves, subset_size=5)["value"]
    assert abs(found["kernel_noise_floor"]["value"]) < found["kernel"]["value"] / 10
    assert found["kernel"]["subset_size"] == 5


def test_the_batch_size_moves_no_distance_by_more_than_a_thousandth(trained, stand_ins):
    found = []
    for batch_size in (1, 3, 8):
        result = evaluate.evaluate_run(
            trained,
            Settings(fid="clean", lpips=True, samples=2, diversity_masks=2, batch_size=batch_size, seed=7),
            command="test",
        )
        found.append((result["distances"]["clean"]["frechet"]["value"], result["lpips"]["value"]))
        for file in trained.glob("evaluation/*/*.png"):
            file.unlink()
    assert found[0] == pytest.approx(found[1], rel=1e-3) and found[0] == pytest.approx(found[2], rel=1e-3)


def test_samples_of_a_mask_do_not_depend_on_how_many_are_asked_for(trained):
    def images(samples):
        evaluate.evaluate_run(trained, Settings(samples=samples, diversity_masks=1, micro_batch=1), command="test")
        (folder,) = (f.parent for f in trained.glob("evaluation/*/record.json") if '"micro_batch": 1' in f.read_text())
        found = {file.name: file.read_bytes() for file in folder.glob("*-[12].png")}
        for file in folder.glob("*.png"):
            file.unlink()
        return found

    assert len(images(2)) == 2 and images(2) == images(4)


@pytest.mark.parametrize(
    ("settings", "masks", "error", "message"),
    [
        (Settings(fid="sdm-oasi"), 6, UsageError, r"unknown protocol fid='sdm-oasi'. Did you mean 'sdm-oasis'"),
        (Settings(fid="clean"), 3, ValueError, "at least 4 unseen masks with real images, got 3"),
        (Settings(fid="clean"), 6, FileNotFoundError, r"pt_inception-2015.*\.pth: not found"),
        (Settings(lpips=True), 6, FileNotFoundError, r"alexnet-owt.*\.pth: not found"),
        (Settings(proxy="no.safetensors"), 6, FileNotFoundError, "no.safetensors: not found"),
    ],
)
def test_what_is_missing_is_said_before_sampling(trained, settings, masks, error, message):
    before = sorted(trained.rglob("*"))
    with pytest.raises(error, match=message):
        evaluate.evaluate_run(trained, replace(settings, masks=masks, solver="heun"), command="test")
    assert sorted(trained.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["solver=flow-matching"], "is of kind objective, not solver"),
        (["shift=-1"], "shift must be a number above 0"),
        (
            ["guidance_start=2"],
            r"guidance_start must be a time in \[0, 1\], 0 noise and 1 data, .* got 2",
        ),
        (["guidance_scale=2"], "needs a model trained with dropout of 'mask'"),
        (["data=drawn"], "data= needs images=FOLDER"),
    ],
)
def test_words_that_cannot_work_are_refused_before_sampling(trained, words, message):
    before = sorted(trained.rglob("*"))
    with pytest.raises(ValueError, match=message):
        evaluate.main([f"run={trained}", *words])
    assert sorted(trained.rglob("*")) == before


@pytest.mark.parametrize("given", [{"samples": 1}, {"diversity_masks": 0}])
def test_diversity_needs_pairs(trained, given):
    with pytest.raises(ValueError, match="at least 1 mask and 2 samples"):
        evaluate.evaluate_run(trained, Settings(**given), command="test")


def test_the_proxy_is_never_called_fid(trained, shared):
    proxy = next((shared / "squeezenet11").glob("*.safetensors"))
    evaluate.main([f"run={trained}", f"proxy={proxy}"])
    result = json.loads((trained / "result.json").read_text())
    found = result["distances"]["squeezenet11"]
    assert found["protocol"].startswith("proxy[squeezenet11,") and found["frechet"]["value"] > 0
    assert "FID" not in summary(result).replace("not FID", "")


def test_a_small_training_set_bounds_the_subsets_too(stand_ins):
    distance = distances.load_distances(Settings(fid="train-ref"), 12)[0]
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    train = [(image, None) for image in images[:4]]
    held_out = HeldOut([f"{i:02}" for i in range(12)], images[:, 0], images, CELEBAMASK19)
    found = distances.measure_distance(distance, held_out, images, train, "given", [].append)
    assert found["kernel"]["subset_size"] == found["kernel"]["reference_n"] == 4
