"""Models built by name: one file per family, one registered line per size."""

from ssmgen.models.conditioned import MaskCondition, MaskConditioned
from ssmgen.models.dit import DiT, DiTBlock
from ssmgen.models.sdm import SDM, SDMBlock
from ssmgen.models.sisma import SISMA, SISMABlock
from ssmgen.models.sisma_attention import SISMAAttention, SISMAAttentionBlock

__all__ = [
    "DiT",
    "DiTBlock",
    "MaskCondition",
    "MaskConditioned",
    "SDM",
    "SDMBlock",
    "SISMA",
    "SISMAAttention",
    "SISMAAttentionBlock",
    "SISMABlock",
]
