"""Flow matching with straight paths (rectified flow)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmgen.registry import closest, register

_T_SAMPLINGS = ("uniform", "logit-normal")


@register("objective", "flow-matching")
class FlowMatching:
    """Learn the velocity of straight lines from noise to data (SISMA eqs. 1 to 3).

    ``x_t = t x_1 + (1 - t) x_0`` with noise x_0 at t = 0 and data x_1 at t = 1; the model regresses ``x_1 - x_0``.

    Args:
        t_sampling: ``"uniform"`` on [0, 1], or ``"logit-normal"``: the logistic function of a standard normal, which
            dwells on the middle of the path.
    """

    def __init__(self, t_sampling: str = "uniform") -> None:
        if t_sampling not in _T_SAMPLINGS:
            near = closest(t_sampling, _T_SAMPLINGS)
            raise ValueError(f"t_sampling must be 'uniform' or 'logit-normal', got {t_sampling!r}{near}")
        self.t_sampling = t_sampling

    def loss(
        self,
        model: Callable[..., Tensor],
        data: Tensor,
        noise: Tensor | None = None,
        t: Tensor | None = None,
        generator: torch.Generator | None = None,
        **condition: Any,
    ) -> Tensor:
        """Mean squared error of the predicted velocity (SISMA eq. 3), a scalar.

        Args:
            model: called as ``model(x_t, t, **condition)``.
            data: x_1, ``(batch, channels, height, width)``.
            noise: x_0 of the same shape; drawn where None.
            t: ``(batch,)`` in [0, 1]; drawn where None.
            generator: where noise and t are drawn from, on the device of ``data``.
            **condition: passed to the model, e.g. ``mask=...``.

        Raises:
            ValueError: noise or t of another shape than data asks for.
        """
        if noise is None:
            noise = torch.randn(data.shape, dtype=data.dtype, device=data.device, generator=generator)
        if t is None:
            t = self.sample_t(data.shape[0], data.device, generator)
        if noise.shape != data.shape or t.shape != data.shape[:1]:
            raise ValueError(
                f"noise must be {tuple(data.shape)} and t ({data.shape[0]},) to go with data, "
                f"got {tuple(noise.shape)} and {tuple(t.shape)}"
            )
        prediction = model(self.interpolate(noise, data, t), t, **condition)
        return (prediction.float() - (data - noise).float()).square().mean()

    def interpolate(self, noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """The point at time t of the line from noise to data (SISMA eq. 1)."""
        t = t.view(-1, *[1] * (data.dim() - 1)).to(data.dtype)
        return t * data + (1 - t) * noise

    def sample_t(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """``(count,)`` times for training."""
        if self.t_sampling == "uniform":
            return torch.rand(count, device=device, generator=generator)
        return torch.randn(count, device=device, generator=generator).sigmoid()

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity dx/dt that a prediction stands for: itself (SISMA eq. 2)."""
        return prediction
