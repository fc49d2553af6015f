"""Conditional image generation with state-space models: blocks, objectives, solvers and models built by name."""

from ssmgen import latents, models, nn, objectives, ops, solvers
from ssmgen.pipeline import MaskToImage
from ssmgen.registry import build, list_models, names, register
from ssmgen.sampling import Sampler, initial_noise, sample

__version__ = "0.1.0"

__all__ = [
    "MaskToImage",
    "Sampler",
    "build",
    "initial_noise",
    "latents",
    "list_models",
    "models",
    "names",
    "nn",
    "objectives",
    "ops",
    "register",
    "sample",
    "solvers",
]
