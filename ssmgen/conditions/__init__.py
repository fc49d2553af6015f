"""Conditions, the inputs of a model besides image and time: each owns its null, its dropout and its checks."""

from ssmgen.conditions.class_label import ClassLabel
from ssmgen.conditions.condition import Condition
from ssmgen.conditions.dense_map import DenseMap
from ssmgen.conditions.label_map import LabelMap, OneHotMap
from ssmgen.conditions.maps import MapCondition
from ssmgen.conditions.placed_sequence import PlacedSequence
from ssmgen.conditions.style_image import StyleImage
from ssmgen.conditions.token_sequence import TokenSequence
from ssmgen.nn.signal import Signal

__all__ = [
    "ClassLabel",
    "Condition",
    "DenseMap",
    "LabelMap",
    "MapCondition",
    "OneHotMap",
    "PlacedSequence",
    "Signal",
    "StyleImage",
    "TokenSequence",
]
