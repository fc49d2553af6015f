"""Diversity of samples, and their agreement with masks."""

import pytest
import torch
from metric_inputs import Pixels, published_folder, smooth

from ssmgen.metrics import (
    LPIPSDiversity,
    MaskAgreement,
    lpips_network,
    pairwise_rms,
)
from ssmgen.metrics.backbones import weights_hash

pytest.importorskip("lpips")


@pytest.fixture(params=["random", "published"])
def alexnet(request):
    """The state of torchvision's AlexNet: seeded random weights, and the published ones where they are given."""
    import torchvision

    from ssmgen.metrics.backbones import alexnet_weights

    if request.param == "random":
        torch.manual_seed(0)
        return {f"features.{key}": v for key, v in torchvision.models.alexnet().features.state_dict().items()}
    return torch.load(alexnet_weights().find(published_folder()), weights_only=True)


def test_lpips_diversity_is_the_packages_mean_over_all_45_pairs(alexnet):
    import warnings

    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    layers = [value for name, value in alexnet.items() if name.startswith("features.")]
    for parameter, value in zip(reference.net.parameters(), layers, strict=True):
        parameter.data.copy_(value)
    batch = smooth(10, 5, 64).float() / 127.5 - 1
    pairs = [(i, j) for i in range(10) for j in range(i)]
    assert len(pairs) == 45
    expected = torch.stack([reference(batch[i : i + 1], batch[j : j + 1]) for i, j in pairs]).mean().item()
    network = lpips_network(alexnet)
    for at_once in (2, 15):
        diversity = LPIPSDiversity(network, at_once)
        diversity.update("m", batch)
        assert diversity.result()["value"] == pytest.approx(expected, rel=1e-4)
    result = diversity.result()
    assert result["protocol"] == "lpips[alex-0.1,diversity,size=64x64,samples=10,pairs=45,masks=1]"
    assert result["weights"] == weights_hash(reference) and len(result["list"]) == 64


def test_a_trunk_of_lpips_without_a_layer_is_refused():
    with pytest.raises(ValueError, match="not torchvision's AlexNet"):
        lpips_network({"features.0.weight": torch.zeros(64, 3, 11, 11)})


def test_the_rms_distance_is_the_mean_over_pairs():
    flat = torch.tensor([0.0, 0.5, -0.25]).view(3, 1, 1, 1).expand(-1, 3, 4, 5)
    assert pairwise_rms(flat) == pytest.approx((0.5 + 0.25 + 0.75) / 3)
    ends = torch.stack([torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)])
    ends[0, :, :, 0] = 1  # a quarter of the pixels differ by 1
    assert pairwise_rms(ends) == pytest.approx(0.5)


def test_diversity_falls_where_samples_collapse_and_rises_with_noise():
    batch = smooth(6, 5).float() / 127.5 - 1
    near = batch[:1] + 0.1 * batch
    noisy = batch + torch.randn(batch.shape, generator=torch.Generator().manual_seed(0))
    for measured in (pairwise_rms, lambda images: diversity_of(images)["value"]):
        values = [measured(images) for images in (batch[:1].expand(6, -1, -1, -1), near, batch, noisy)]
        assert values == sorted(values) and values[0] < 1e-6 and values[1] < 0.2 * values[2]


def diversity_of(images):
    diversity = LPIPSDiversity(Pixels())
    diversity.update("m", images)
    return diversity.result()


def test_diversity_says_what_it_cannot_count():
    batch = smooth(3, 5).float() / 127.5 - 1
    diversity = LPIPSDiversity(Pixels())
    with pytest.raises(ValueError, match="no masks were counted"):
        diversity.result()
    diversity.update("m", batch)
    with pytest.raises(ValueError, match="mask m was counted already"):
        diversity.update("m", batch)
    with pytest.raises(ValueError, match="count >= 2"):
        diversity.update("n", batch[:1])
    with pytest.raises(ValueError, match=r"mask n: images are \(2, 3, 24, 24\), those of other masks \(3, 3, 24, 24\)"):
        diversity.update("n", batch[:2])
    other = LPIPSDiversity(Pixels())
    other.update("n", batch[:2])
    other.merge(diversity)
    with pytest.raises(ValueError, match=r"some masks are \(2, 3, 24, 24\), those of others \(3, 3, 24, 24\)"):
        other.result()


def test_diversity_is_the_mean_over_masks():
    first, second = smooth(3, 5).float(), smooth(3, 6).float() / 3
    diversity = LPIPSDiversity(Pixels())
    diversity.update("m", first)
    diversity.update("n", second)
    each = [diversity_of(images)["value"] for images in (first, second)]
    assert diversity.result()["value"] == pytest.approx(sum(each) / 2) and each[0] > 2 * each[1]


def test_a_process_without_masks_reports_those_of_others():
    idle, busy = LPIPSDiversity(Pixels()), LPIPSDiversity(Pixels())
    busy.update("m", smooth(3, 5).float())
    idle.merge(busy)
    assert idle.result() == busy.result()


def test_agreement_counts_what_can_be_counted_by_hand():
    true = torch.tensor([[[0, 0, 1, 1, 3]], [[0, 1, 1, 1, 1]]])
    seen = torch.tensor([[[0, 1, 1, 1, 3]], [[0, 1, 1, 2, 1]]])
    agreement = MaskAgreement(("a", "b", "c", "d"), "by hand", "0" * 64)
    agreement.update(seen, true, ["x", "y"])
    result = agreement.result()
    assert result["iou"] == pytest.approx({"a": 2 / 3, "b": 5 / 7, "d": 1})  # no true c: it is left out of the mean
    assert result["miou"] == pytest.approx((2 / 3 + 5 / 7 + 1) / 3) and result["pixel_accuracy"] == pytest.approx(0.8)
    assert result["protocol"] == "agreement[parser=by hand,classes=3 of 4,n=2]" and result["weights"] == "0" * 64


def test_agreement_is_full_falls_with_other_masks_and_does_not_depend_on_batches():
    masks = torch.randint(0, 5, (8, 12, 12), generator=torch.Generator().manual_seed(0))
    seen = torch.where(torch.rand(masks.shape, generator=torch.Generator().manual_seed(1)) < 0.2, 0, masks)

    def agree(predicted, true):
        agreement = MaskAgreement("abcde")
        agreement.update(predicted, true)
        return agreement.result()

    whole = agree(seen, masks)
    assert agree(masks, masks)["miou"] == 1 > whole["miou"] > 2 * agree(seen, masks.roll(1, 0))["miou"]
    parts = [MaskAgreement("abcde"), MaskAgreement("abcde")]
    for index in reversed(range(8)):
        parts[index % 2].update(seen[index : index + 1], masks[index : index + 1], [f"{index:08d}"])
    parts[0].merge(parts[1])
    assert parts[0].result() == whole
    with pytest.raises(ValueError, match="images given twice: 00000001"):
        parts[0].merge(parts[1])


def test_agreement_says_what_it_cannot_count():
    agreement, mask = MaskAgreement("abc"), torch.zeros(1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="no images were counted"):
        agreement.result()
    with pytest.raises(ValueError, match="must have one shape"):
        agreement.update(mask, mask[:, :2])
    with pytest.raises(ValueError, match=r"labels must be in 0..2: parser and masks must have the same 3 classes"):
        agreement.update(mask + 3, mask)
    with pytest.raises(ValueError, match="got 2 ids and 1 images"):
        agreement.update(mask, mask, ["a", "b"])
