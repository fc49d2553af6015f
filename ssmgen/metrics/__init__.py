"""What is measured of generated images."""

from ssmgen.metrics.diversity import pairwise_rms
from ssmgen.metrics.mask_agreement import MaskAgreement

__all__ = ["MaskAgreement", "pairwise_rms"]
