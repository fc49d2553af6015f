"""Adaptive solvers from torchdiffeq."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmgen.extras import require
from ssmgen.registry import register
from ssmgen.solvers.base import Progress, Solver, Velocity


@register("solver", "dopri5", method="dopri5", order=5)
@register("solver", "dopri8", method="dopri8", order=8)
@register("solver", "bosh3", method="bosh3", order=3)
@register("solver", "adaptive-heun", method="adaptive_heun", order=2)
class Adaptive(Solver):
    """An embedded Runge-Kutta pair that chooses its steps by an error estimate (`torchdiffeq.odeint`).

    Every image is integrated on its own, so its steps do not depend on the rest of the batch; `f` is called with
    batches of one.

    Args:
        method: the name of the method in torchdiffeq.
        order: order of convergence.
        rtol, atol: relative and absolute tolerance of a step, positive.

    Raises:
        ValueError: a tolerance that is not positive.
        ImportError: torchdiffeq is missing; names the extra.
    """

    adaptive = True

    def __init__(self, method: str, order: int, rtol: float = 1e-5, atol: float = 1e-5) -> None:
        if rtol <= 0 or atol <= 0:
            raise ValueError(f"rtol and atol must be positive, got rtol={rtol}, atol={atol}")
        require("torchdiffeq", extra="adaptive")
        self.method = method
        self.order = order
        self.rtol = rtol
        self.atol = atol

    def nfe(self, steps: int) -> None:
        """Not known in advance: read ``evaluations`` after `solve`."""
        return None

    def _integrate(self, f: Velocity, x0: Tensor, ts: Tensor, progress: Progress | None) -> Tensor:
        from torchdiffeq import odeint

        ends = torch.stack([ts[0], ts[-1]]).to(x0.device)
        # A step must end at the last time: by default it would overshoot, evaluate the velocity beyond t = 1, and
        # interpolate.
        options = {"step_t": ends[1:]}

        def integrate(x: Tensor) -> Tensor:
            return odeint(f, x, ends, rtol=self.rtol, atol=self.atol, method=self.method, options=options)[-1]

        return torch.cat([integrate(x) for x in x0.split(1, dim=0)])
