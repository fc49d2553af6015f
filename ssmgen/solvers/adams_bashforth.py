"""Adams-Bashforth methods: one evaluation per step, and earlier slopes are reused."""

import torch
from torch import Tensor

from ssmgen.registry import register
from ssmgen.solvers.base import Progress, Solver, Velocity
from ssmgen.solvers.runge_kutta import midpoint


@register("solver", "ab2", order=2)
@register("solver", "ab3", order=3)
class AdamsBashforth(Solver):
    """Explicit linear multistep method on any grid (Hairer, Norsett, Wanner, Solving ODEs I, section III.5).

    A step integrates the polynomial through the last ``order`` slopes. The first step uses the midpoint method, whose
    error is small enough for order 3; the second step of ``ab3`` has order 2.

    Args:
        order: slopes used, 2 or 3.

    Raises:
        ValueError: another order.
    """

    def __init__(self, order: int) -> None:
        if order not in (2, 3):
            raise ValueError(f"order must be 2 or 3, got {order}")
        self.order = order

    def nfe(self, steps: int) -> int:
        """One per step, and one more in the first."""
        return steps + 1

    def _integrate(self, f: Velocity, x0: Tensor, ts: Tensor, progress: Progress) -> Tensor:
        x, slopes = x0, list[Tensor]()
        for step in range(len(ts) - 1):
            slopes = [f(ts[step], x), *slopes[: self.order - 1]]
            if step == 0:
                x = midpoint().advance(f, x, ts[0], ts[1] - ts[0], slopes[0])
            else:
                weights = _weights(ts[step - len(slopes) + 1 : step + 1].flip(0), ts[step + 1])
                x = x + torch.stack([w * slope for w, slope in zip(weights, slopes, strict=True)]).sum(0)
            progress(step + 1, x)
        return x


def _weights(nodes: Tensor, end: Tensor) -> list[Tensor]:
    """Integrals from ``nodes[0]`` to ``end`` of the Lagrange polynomials of two or three nodes."""
    h = end - nodes[0]
    a = nodes[0] - nodes[1]
    if len(nodes) == 2:
        return [h + h**2 / (2 * a), -(h**2) / (2 * a)]
    b = nodes[0] - nodes[2]
    return [
        h + h**2 * (a + b) / (2 * a * b) + h**3 / (3 * a * b),
        -(h**2 * b / 2 + h**3 / 3) / (a * (b - a)),
        (h**2 * a / 2 + h**3 / 3) / (b * (b - a)),
    ]
