"""Sampling by a stochastic differential equation with the marginals of the probability-flow ODE."""

import hashlib
import math

import torch
from torch import Tensor

from ssmgen.noise import hashed_seed, initial_noise
from ssmgen.registry import register
from ssmgen.solvers.base import Path, Progress, Solver, Velocity


@register("solver", "euler-maruyama")
class EulerMaruyama(Solver):
    """Euler-Maruyama for ``dx = (v + w/2 s) dt + sqrt(w) dW``, with score s and ``w = diffusion sigma(t)``.

    This is the reverse SDE of SiT (arXiv 2401.08740, eq. 5 and section 2.4) in our time. Its states have the same
    distribution at each t as those of the ODE. Fresh noise corrects errors of earlier steps, at the price of smaller
    steps. The score is ``-x_0 / sigma`` for the noise x_0 that the velocity points to, so the drift is
    ``v - diffusion/2 x_0`` and finite at all t.

    A step of length h to t' uses at most ``diffusion = 2 sigma(t') / h``, which removes all the noise that is left at
    t'; more would overshoot. So a step that ends in the data is one of the ODE. A diffusion above 2 is limited in the
    step before it too on a uniform grid, and a large one in many of the last steps.

    The noise of an image is drawn on the CPU from a hash of its start, so it depends neither on the batch nor on the
    device, and equal starts give equal images.

    Args:
        path: the objective's path; None is the linear one.
        diffusion: strength of the noise, at least 0; 0 is Euler's method for the ODE, to the bit.

    Raises:
        ValueError: ``diffusion`` is negative or not finite.
    """

    order = 1
    stochastic = True
    reversible = False

    def __init__(self, path: Path | None = None, diffusion: float = 1.0) -> None:
        if not 0 <= diffusion < math.inf:
            raise ValueError(f"diffusion must be a number of at least 0, got {diffusion}")
        self.path = None if path is None or path.linear else path
        self.diffusion = diffusion

    def nfe(self, steps: int) -> int:
        """One per step."""
        return steps

    def _integrate(self, f: Velocity, x0: Tensor, ts: Tensor, progress: Progress) -> Tensor:
        if ts[0] < 0 or ts[-1] > 1:
            raise ValueError(f"euler-maruyama needs times from 0 (noise) up to 1 (data), got {ts[0]:g} to {ts[-1]:g}")
        x, starts = x0, _digests(x0) if self.diffusion else []
        for step in range(len(ts) - 1):
            t, h = ts[step], ts[step + 1] - ts[step]
            velocity = f(t, x)
            moved = x + h * velocity
            diffusion = self._diffusion(ts[step + 1], h)
            if diffusion > 0:
                moved = moved - h * diffusion / 2 * self._noise(velocity, x, t)
                moved = moved + (diffusion * h * self._sigma(t)).sqrt() * _drawn(starts, step, x)
            x = moved
            progress(step + 1, x)
        return x

    def _diffusion(self, end: Tensor, h: Tensor) -> float:
        """The diffusion of a step of length h that ends at a time."""
        return min(self.diffusion, 2 * float(self._sigma(end) / h)) if self.diffusion else 0.0

    def _noise(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return x - t * velocity if self.path is None else self.path.noise_of_velocity(velocity, x, t)

    def _sigma(self, t: Tensor) -> Tensor:
        return 1 - t if self.path is None else self.path.sigma(t)


def _digests(x: Tensor) -> list[bytes]:
    """A hash of each item of ``(batch, ...)``."""
    items = (item.cpu().contiguous().view(-1).view(torch.uint8) for item in x.detach())  # numpy has no bfloat16
    return [hashlib.sha256(item.numpy().tobytes()).digest() for item in items]


def _drawn(starts: list[bytes], step: int, x: Tensor) -> Tensor:
    """Standard normal noise of the shape of x, which depends on the starts and the step alone."""
    seeds = [hashed_seed(start + step.to_bytes(8, "little")) for start in starts]
    noise = initial_noise(seeds, x.shape[1:])
    return noise.to(x.device, x.dtype)
