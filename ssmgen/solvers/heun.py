"""Heun's method."""

from ssmgen.registry import register
from ssmgen.solvers.base import RungeKutta


@register("solver", "heun")
def heun() -> RungeKutta:
    """Second order, two evaluations per step: the mean of the slopes at both ends (explicit trapezoid)."""
    return RungeKutta(order=2, nodes=(0.0, 1.0), matrix=((1.0,),), weights=(0.5, 0.5))
