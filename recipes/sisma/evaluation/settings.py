"""The settings of an evaluation."""

from dataclasses import dataclass

from recipes.sisma.runs import SamplingKeys


@dataclass
class Settings(SamplingKeys):
    """Keys of ``python -m recipes.sisma.evaluate``; 0, empty or None means the run's own value.

    Attributes:
        run: the run's folder, or ``hf://OWNER/NAME`` for a run on the hub.
        images: a folder of existing images to measure instead of a run: see `evaluate_images`.
        data: for ``images``: the prepared folder whose test masks they were made from, or ``drawn``.
        out: for ``images``: the folder of the result; ``FOLDER-evaluation`` beside the images where empty.
        masks: number of held-out masks.
        parser: ``drawn``, ``none`` or a file.
        diversity_masks: number of masks, from the first on, that are sampled several times for the diversity.
        samples: images of each of them; 0 means 4, and 10 with ``lpips``.
        seed: of the noise of all images; figures can be trusted only as far as they agree between seeds.
        batch_size: images in a call of the model; another one changes images only by rounding.
        micro_batch: images in a call of the model whatever ``batch_size`` is, so that machines with different memory
            agree to the last digit; 0 uses ``batch_size``.
        fid: FID protocols by their names in `ssmgen.metrics.FID_PROTOCOLS`, separated by commas; empty means none.
        lpips: measure LPIPS diversity.
        proxy: a SqueezeNet 1.1 file: the Frechet distance over its features, which is not FID.
        nearest: find the nearest training image of each generated one, to see copies, in the features of ``proxy`` or
            else of the first ``fid``.
        weights: the folder of Inception's and AlexNet's published weights.
        download: download missing weights.
    """

    run: str = "runs/quick"
    images: str = ""
    data: str = ""
    out: str = ""
    masks: int = 0
    parser: str = ""
    diversity_masks: int = 16
    samples: int = 0
    seed: int = 0
    batch_size: int = 16
    micro_batch: int = 0
    fid: str = ""
    lpips: bool = False
    proxy: str = ""
    nearest: bool = False
    weights: str = "weights"
    download: bool = False
