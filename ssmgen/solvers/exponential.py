"""An exponential multistep method for straight paths: what is extrapolated is the predicted data, not the velocity."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmgen.registry import register
from ssmgen.solvers.base import Progress, Solver, Velocity


@register("solver", "deis2")
class Exponential(Solver):
    """Exponential Adams-Bashforth on the predicted data (the tAB scheme of DEIS, arXiv 2204.13902, section 4.2).

    On the path ``x_t = t x_1 + (1 - t) x_0`` a velocity v stands for the data ``D = x + (1 - t) v``, and the equation
    ``dx/dt = (D - x) / (1 - t)`` is solved exactly for the straight line through the last two predictions. The first
    step has one and takes it for constant. DPM-Solver++ (2M) rests on the same idea, with a line in log((1 - t) / t).
    """

    order = 2

    def nfe(self, steps: int) -> int:
        """One a step."""
        return steps

    def _integrate(self, f: Velocity, x0: Tensor, ts: Tensor, progress: Progress | None) -> Tensor:
        if ts[0] < 0 or ts[-1] > 1 or ts[0] > ts[-1]:
            raise ValueError(f"this solver needs times from 0 (noise) up to 1 (data), got {ts[0]:g} to {ts[-1]:g}")
        x, previous = x0, None
        for step in range(len(ts) - 1):
            t, h = ts[step], ts[step + 1] - ts[step]
            left, right = 1 - t, 1 - ts[step + 1]
            data = x + left * f(t, x)
            x = (right / left) * x + (h / left) * data
            if previous is not None:
                logarithm = torch.xlogy(right, left) - torch.xlogy(right, right)  # right log(left / right), 0 at t = 1
                x = x + (h - logarithm) / (t - ts[step - 1]) * (data - previous)
            previous = data
            if progress is not None:
                progress(step + 1, x)
        return x
