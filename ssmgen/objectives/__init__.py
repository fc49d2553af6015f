"""What is learned: a path from noise to data, what the network predicts about it, and the loss."""

from ssmgen.objectives.gaussian import GaussianObjective
from ssmgen.objectives.path import LinearPath, Path

__all__ = ["GaussianObjective", "LinearPath", "Path"]
