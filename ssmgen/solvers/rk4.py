"""The classical Runge-Kutta method."""

from ssmgen.registry import register
from ssmgen.solvers.base import RungeKutta


@register("solver", "rk4")
def rk4() -> RungeKutta:
    """Fourth order, four evaluations per step (Kutta 1901)."""
    return RungeKutta(
        order=4,
        nodes=(0.0, 0.5, 0.5, 1.0),
        matrix=((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        weights=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    )
