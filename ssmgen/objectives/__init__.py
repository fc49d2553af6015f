"""What is learned: interpolant, target, loss, and how a prediction becomes a velocity."""

from ssmgen.objectives.flow_matching import FlowMatching

__all__ = ["FlowMatching"]
