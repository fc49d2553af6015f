"""Models built by name: one short file per family, one registered line per size."""

from ssmgen.models import dit, sisma
from ssmgen.models.conditional import ConditionalModel, Conditioning
from ssmgen.models.dim import DiM
from ssmgen.models.sdm import SDM, SDMBlock
from ssmgen.models.token_model import TokenModel
from ssmgen.models.u_shape import LongSkips, UShape
from ssmgen.models.zigma import ZigMa

__all__ = ["SDM", "ConditionalModel", "Conditioning", "DiM", "LongSkips", "SDMBlock", "TokenModel", "UShape", "ZigMa"]
__all__ += ["dit", "sisma"]
