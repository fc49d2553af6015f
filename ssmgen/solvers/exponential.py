"""An exponential multistep method: it extrapolates the predicted data, not the velocity."""

import torch
from torch import Tensor

from ssmgen.registry import register
from ssmgen.solvers.base import Path, Progress, Solver, Velocity

# Gauss-Legendre nodes and weights on [-1, 1], exact for polynomials of degree 15.
_NODES = (0.1834346424956498, 0.5255324099163290, 0.7966664774136267, 0.9602898564975363)
_WEIGHTS = (0.3626837833783620, 0.3137066458778873, 0.2223810344533745, 0.1012285362903763)


@register("solver", "deis2")
class Exponential(Solver):
    """Exponential Adams-Bashforth on the predicted data (the tAB scheme of DEIS, arXiv 2204.13902, section 4.2).

    On a path ``x_t = alpha x_1 + sigma x_0`` the velocity determines the predicted data D, and ``x / sigma`` has the
    derivative ``D d(alpha / sigma)/dt``. A step integrates that for the straight line in t through the last two
    predictions; the first step takes D as constant. The integral is exact on the linear path and a Gauss-Legendre
    quadrature of eight nodes on others. DPM-Solver++ (2M) uses a line in log(alpha / sigma) instead.

    Args:
        path: the objective's path; None is the linear one.
    """

    order = 2
    reversible = False

    def __init__(self, path: Path | None = None) -> None:
        self.path = None if path is None or path.linear else path

    def nfe(self, steps: int) -> int:
        """One per step."""
        return steps

    def _integrate(self, f: Velocity, x0: Tensor, ts: Tensor, progress: Progress) -> Tensor:
        if ts[0] < 0 or ts[-1] > 1:
            raise ValueError(f"deis2 needs times from 0 (noise) up to 1 (data), got {ts[0]:g} to {ts[-1]:g}")
        x, previous = x0, None
        for step in range(len(ts) - 1):
            t, end = ts[step], ts[step + 1]
            data = self._data(f(t, x), x, t)
            scale, constant, slope = _linear_step(t, end) if self.path is None else _step(self.path, t, end)
            x = scale * x + constant * data
            if previous is not None:
                x = x + slope / (t - ts[step - 1]) * (data - previous)
            previous = data
            progress(step + 1, x)
        return x

    def _data(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return x + (1 - t) * velocity if self.path is None else self.path.data_of_velocity(velocity, x, t)


def _linear_step(t: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of x, of constant data and of their slope in t over the step from t to ``end`` on the linear path."""
    h, left, right = end - t, 1 - t, 1 - end
    logarithm = torch.xlogy(right, left) - torch.xlogy(right, right)  # right log(left / right), 0 at t = 1
    return right / left, h / left, h - logarithm


def _step(path: Path, t: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same factors on any path, with r = alpha / sigma and integration by parts of ``(t - start) dr``."""
    h, sigma = end - t, path.sigma(end)
    scale = sigma / path.sigma(t)
    nodes, weights = t.new_tensor([*(-node for node in _NODES), *_NODES]), t.new_tensor([*_WEIGHTS, *_WEIGHTS])
    times = t + h * (1 + nodes) / 2
    integral = h / 2 * (weights * path.alpha(times) / path.sigma(times)).sum()
    return scale, path.alpha(end) - scale * path.alpha(t), h * path.alpha(end) - sigma * integral
