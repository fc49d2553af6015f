"""A trained model with its autoencoder, labels and settings as one object, and what can be done with it."""

from ssmgen.pipeline.card import model_card
from ssmgen.pipeline.diffusers import MaskToImagePipeline, SchedulerSolver, dynamic_shift
from ssmgen.pipeline.editing import STARTS, edit, interpolate, variations
from ssmgen.pipeline.folder import SAVED_DTYPES, Recipe, packaged
from ssmgen.pipeline.mask_to_image import MaskToImage

__all__ = [
    "SAVED_DTYPES",
    "STARTS",
    "MaskToImage",
    "MaskToImagePipeline",
    "Recipe",
    "SchedulerSolver",
    "dynamic_shift",
    "edit",
    "interpolate",
    "model_card",
    "packaged",
    "variations",
]
