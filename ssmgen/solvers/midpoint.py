"""The explicit midpoint method."""

from ssmgen.registry import register
from ssmgen.solvers.base import RungeKutta


@register("solver", "midpoint")
def midpoint() -> RungeKutta:
    """Second order, two evaluations per step, none at t = 1: ``x += h f(t + h/2, x + h/2 f(t, x))``."""
    return RungeKutta(order=2, nodes=(0.0, 0.5), matrix=((0.5,),), weights=(0.0, 1.0))
