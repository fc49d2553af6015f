"""Check image-mask pairs and write them as one prepared folder: ``python -m recipes.sisma.prepare``."""

from recipes.sisma.prepare.command import main
from recipes.sisma.prepare.settings import Settings

__all__ = ["Settings", "main"]
