"""Paths from noise to data: x_t = alpha(t) x_1 + sigma(t) x_0, with noise x_0 at t = 0 and data x_1 at t = 1."""

from typing import Protocol

import torch
from torch import Tensor


class Path(Protocol):
    """An affine path; a subclass gives alpha, sigma and their derivatives, and inherits the conversions.

    The conversions solve ``x_t = alpha x_1 + sigma x_0`` and ``v = alpha' x_1 + sigma' x_0`` for the unknown parts
    (affine paths in arXiv 2412.06264). They take images ``(batch, ...)`` and one time ``()`` or one per image
    ``(batch,)``.

    Attributes:
        linear: whether alpha = t and sigma = 1 - t, for solvers that have closed forms for that path.
    """

    linear: bool = False

    def alpha(self, t: Tensor) -> Tensor:
        """Factor of the data, of the shape of t: 0 at t = 0 and 1 at t = 1."""

    def sigma(self, t: Tensor) -> Tensor:
        """Factor of the noise, of the shape of t: 1 at t = 0 and 0 at t = 1."""

    def alpha_rate(self, t: Tensor) -> Tensor:
        """Derivative of alpha, of the shape of t."""

    def sigma_rate(self, t: Tensor) -> Tensor:
        """Derivative of sigma, of the shape of t."""

    def interpolate(self, noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """The point x_t between noise and data."""
        t = broadcast_time(t, data)
        return self.alpha(t) * data + self.sigma(t) * noise

    def velocity(self, noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """The velocity dx_t/dt of the line through noise and data."""
        t = broadcast_time(t, data)
        return self.alpha_rate(t) * data + self.sigma_rate(t) * noise

    def determinant(self, t: Tensor) -> Tensor:
        """``alpha' sigma - alpha sigma'``: positive as long as the share of the data grows; 1 on the linear path."""
        return self.alpha_rate(t) * self.sigma(t) - self.alpha(t) * self.sigma_rate(t)

    def data_of_velocity(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The data x_1 that a velocity at x_t points to."""
        t = broadcast_time(t, x_t)
        return (self.sigma(t) * velocity - self.sigma_rate(t) * x_t) / self.determinant(t)

    def noise_of_velocity(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise x_0 that a velocity at x_t comes from."""
        t = broadcast_time(t, x_t)
        return (self.alpha_rate(t) * x_t - self.alpha(t) * velocity) / self.determinant(t)

    def data_of_noise(self, noise: Tensor, x_t: Tensor, t: Tensor, smallest: float) -> Tensor:
        """The data for a given noise. Alpha is 0 at t = 0; below ``smallest`` it is replaced by that."""
        t = broadcast_time(t, x_t)
        return (x_t - self.sigma(t) * noise) / self.alpha(t).clamp(min=smallest)

    def noise_of_data(self, data: Tensor, x_t: Tensor, t: Tensor, smallest: float) -> Tensor:
        """The noise for given data. Sigma is 0 at t = 1; below ``smallest`` it is replaced by that."""
        t = broadcast_time(t, x_t)
        return (x_t - self.alpha(t) * data) / self.sigma(t).clamp(min=smallest)


class LinearPath(Path):
    """Straight lines: alpha = t, sigma = 1 - t, t of any shape (SISMA eq. 1; rectified flow, arXiv 2209.03003)."""

    linear = True

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def alpha_rate(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)


def broadcast_time(t: Tensor, x: Tensor) -> Tensor:
    """Times ``()`` or ``(batch,)`` in the dtype of x ``(batch, ...)``, shaped to be multiplied with it."""
    t = t.to(x.dtype)
    return t if t.dim() == 0 else t.view(-1, *[1] * (x.dim() - 1))
