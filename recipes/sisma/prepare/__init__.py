"""Check image-mask pairs and write them as one prepared folder: ``python -m recipes.sisma.prepare``."""

from recipes.sisma.prepare.command import main as main
from recipes.sisma.prepare.settings import Settings as Settings
