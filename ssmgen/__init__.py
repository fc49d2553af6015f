"""Conditional image generation with state-space models: blocks, objectives, solvers and models built by name."""

from ssmgen import conditions, latents, models, nn, objectives, ops, solvers
from ssmgen.likelihood import log_likelihood
from ssmgen.noise import initial_noise
from ssmgen.pipeline import MaskToImage
from ssmgen.registry import build, list_models, names, register
from ssmgen.sampling import Sampler, Sampling, sample

__version__ = "0.1.0"

__all__ = [
    "MaskToImage",
    "Sampler",
    "Sampling",
    "build",
    "conditions",
    "initial_noise",
    "latents",
    "list_models",
    "log_likelihood",
    "models",
    "names",
    "nn",
    "objectives",
    "ops",
    "register",
    "sample",
    "solvers",
]
