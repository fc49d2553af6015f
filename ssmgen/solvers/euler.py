"""Euler's method."""

from ssmgen.registry import register
from ssmgen.solvers.base import RungeKutta


@register("solver", "euler")
def euler() -> RungeKutta:
    """First order, one evaluation per step: ``x += h f(t, x)``. SISMA's, with 200 steps."""
    return RungeKutta(order=1, nodes=(0.0,), matrix=(), weights=(1.0,))
