"""Models built by name: one short file per family, one registered line per size."""

from ssmgen.models import dit, sisma
from ssmgen.models.conditional import ConditionalModel, Conditioning
from ssmgen.models.sdm import SDM, SDMBlock
from ssmgen.models.token_model import TokenModel

__all__ = ["SDM", "ConditionalModel", "Conditioning", "SDMBlock", "TokenModel", "dit", "sisma"]
