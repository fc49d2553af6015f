"""Conditions, the inputs of a model besides image and time: each owns its null, its dropout and its checks."""

from ssmgen.conditions.class_label import ClassLabel
from ssmgen.conditions.condition import Condition
from ssmgen.conditions.label_map import LabelMap, OneHotMap
from ssmgen.conditions.style_image import StyleImage
from ssmgen.nn.signal import Signal

__all__ = ["ClassLabel", "Condition", "LabelMap", "OneHotMap", "Signal", "StyleImage"]
