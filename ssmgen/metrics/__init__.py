"""Metrics of generated images."""

from ssmgen.metrics.backbones import (
    FID_PROTOCOLS,
    FIDProtocol,
    InceptionTrunk,
    SqueezeNetTrunk,
    lpips_network,
    published_lpips,
)
from ssmgen.metrics.counted import gather
from ssmgen.metrics.diversity import LPIPSDiversity, pairwise_rms
from ssmgen.metrics.features import FeatureSet, frechet_distance, kernel_distance
from ssmgen.metrics.mask_agreement import MaskAgreement
from ssmgen.metrics.nearest import memorisation, nearest_images

__all__ = [
    "FID_PROTOCOLS",
    "FIDProtocol",
    "FeatureSet",
    "InceptionTrunk",
    "LPIPSDiversity",
    "MaskAgreement",
    "SqueezeNetTrunk",
    "frechet_distance",
    "gather",
    "kernel_distance",
    "lpips_network",
    "memorisation",
    "nearest_images",
    "pairwise_rms",
    "published_lpips",
]
