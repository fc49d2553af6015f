"""Check image-mask pairs and write them as one prepared folder: ``python -m recipes.sisma.prepare``."""

from recipes.sisma.prepare.command import main as main
from recipes.sisma.prepare.readers import DataSet as DataSet
from recipes.sisma.prepare.readers import LabelMasks as LabelMasks
from recipes.sisma.prepare.readers import label_masks as label_masks
from recipes.sisma.prepare.readers import merged as merged
from recipes.sisma.prepare.settings import Settings as Settings
