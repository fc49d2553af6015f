"""Models built by name: one file per family, one registered line per size."""

from ssmgen.models.sisma import SISMA, SISMABlock, SISMACondition

__all__ = ["SISMA", "SISMABlock", "SISMACondition"]
