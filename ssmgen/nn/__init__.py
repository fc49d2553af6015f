"""Blocks: modules with flat arguments, each usable alone and buildable by its registered name."""

from ssmgen.nn.adaln import AdaLNSingle, AdaLNZero, Modulation, PlainNorm
from ssmgen.nn.attention import AttentionCondition, CrossAttention, SelfAttention
from ssmgen.nn.block import Block
from ssmgen.nn.causal import CausalSSM, Mamba
from ssmgen.nn.class_ordered_mamba import ClassOrderedMamba, ClassOrderedState
from ssmgen.nn.conditioned_mamba import ConditionedMamba, ConditionedState
from ssmgen.nn.convolution import Convolution
from ssmgen.nn.embed import PositionEmbedding, TimeEmbedding, sincos_position
from ssmgen.nn.feedforward import FeedForward
from ssmgen.nn.joint_mamba import JointMamba, JointState
from ssmgen.nn.kept_states import KeptStates
from ssmgen.nn.linear_attention import GatedDelta
from ssmgen.nn.mamba import CrossCondition, CrossMamba, ScanConstants, SelectiveSSM, SelfMamba
from ssmgen.nn.mamba2 import Mamba2
from ssmgen.nn.mask_encoder import MaskEncoder
from ssmgen.nn.patch import Patchify, Unpatchify
from ssmgen.nn.region_attention import RegionAttention, Regions
from ssmgen.nn.sequence_mamba import SequenceCrossMamba, SequenceState
from ssmgen.nn.signal import Signal
from ssmgen.nn.spade import SPADE, SPADECondition
from ssmgen.nn.token_modulation import TokenModulation, TokenShift

__all__ = [
    "AdaLNSingle",
    "AdaLNZero",
    "AttentionCondition",
    "Block",
    "ClassOrderedMamba",
    "ClassOrderedState",
    "ConditionedMamba",
    "ConditionedState",
    "CausalSSM",
    "Convolution",
    "CrossAttention",
    "CrossCondition",
    "CrossMamba",
    "FeedForward",
    "JointMamba",
    "JointState",
    "KeptStates",
    "Mamba",
    "GatedDelta",
    "Mamba2",
    "MaskEncoder",
    "Modulation",
    "Patchify",
    "PlainNorm",
    "PositionEmbedding",
    "RegionAttention",
    "Regions",
    "SPADE",
    "SPADECondition",
    "ScanConstants",
    "SelectiveSSM",
    "SequenceCrossMamba",
    "SequenceState",
    "Signal",
    "SelfAttention",
    "SelfMamba",
    "TimeEmbedding",
    "TokenModulation",
    "TokenShift",
    "Unpatchify",
    "sincos_position",
]
