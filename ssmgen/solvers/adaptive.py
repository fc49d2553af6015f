"""Adaptive solvers from torchdiffeq."""

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
    """An embedded Runge-Kutta pair with adaptive steps (Hairer et al., Solving ODEs I, II.4; `torchdiffeq.odeint`).

    Every image is integrated alone, so its steps do not depend on the rest of the batch.

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
        self.method, self.order = method, order
        self.rtol, self.atol = rtol, atol

    def nfe(self, steps: int) -> None:
        """Not known in advance: read ``evaluations`` after `solve`."""
        return None

    def _integrate(self, f: Velocity, x0: Tensor, ts: Tensor, progress: Progress) -> Tensor:
        from torchdiffeq import odeint

        ends = torch.stack([ts[0], ts[-1]]).to(x0.device)
        # A step must end at the last time: by default it would evaluate the velocity beyond t = 1 and interpolate.
        settings = {"rtol": self.rtol, "atol": self.atol, "method": self.method, "options": {"step_t": ends[1:]}}
        return torch.cat([odeint(f, x, ends, **settings)[-1] for x in x0.split(1, dim=0)])
