"""Label maps, paired transforms, datasets of image-mask pairs, and drawn faces that need no download."""

from ssmgen.data.labels import BISENET19, CELEBAMASK19, LabelSet, check_labels, remap

__all__ = ["BISENET19", "CELEBAMASK19", "LabelSet", "check_labels", "remap"]
