"""Flow matching with straight paths (rectified flow)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
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
        class_weights: how much the error counts where the mask has each class, one positive number per class; a
            latent that covers several counts as the largest of them. Small parts then do not drown in large ones. The
            best velocity is the same for any weights: each place is an average of its own. None counts all alike.
    """

    def __init__(self, t_sampling: str = "uniform", class_weights: Sequence[float] | None = None) -> None:
        if t_sampling not in _T_SAMPLINGS:
            near = closest(t_sampling, _T_SAMPLINGS)
            raise ValueError(f"t_sampling must be 'uniform' or 'logit-normal', got {t_sampling!r}{near}")
        self.t_sampling = t_sampling
        if class_weights is not None and not all(weight > 0 for weight in class_weights):
            raise ValueError(f"class_weights must be positive, got {list(class_weights)}")
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)

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
            **condition: passed to the model, e.g. ``mask=...``; with ``class_weights`` there must be a ``mask`` of
                integer labels ``(batch, H, W)``, H and W multiples of height and width.

        Raises:
            TypeError: data that are not floating point.
            ValueError: noise or t of another shape than data asks for, or no such mask for the class weights.
        """
        if not data.is_floating_point():
            raise TypeError(
                f"data must be floating point, latents or images in [-1, 1], got {data.dtype}: uint8 images become "
                "that by images / 127.5 - 1"
            )
        if noise is None:
            noise = torch.randn(data.shape, dtype=data.dtype, device=data.device, generator=generator)
        if t is None:
            t = self.sample_t(data.shape[0], data.device, generator)
        if noise.shape != data.shape or t.shape != data.shape[:1]:
            raise ValueError(
                f"noise must be {tuple(data.shape)} and t ({data.shape[0]},) to go with data, "
                f"got {tuple(noise.shape)} and {tuple(t.shape)}"
            )
        weights = None if self.class_weights is None else self._weights(condition, data)
        prediction = model(self.interpolate(noise, data, t), t, **condition)
        error = (prediction.float() - (data - noise).float()).square()
        return error.mean() if weights is None else (error * weights).mean()

    def _weights(self, condition: dict[str, Any], data: Tensor) -> Tensor:
        """What each place counts, ``(batch, 1, height, width)``."""
        mask, (height, width) = condition.get("mask"), data.shape[-2:]
        if mask is None or mask.dim() != 3 or mask.shape[1] % height or mask.shape[2] % width:
            given = "none" if mask is None else f"one of shape {tuple(mask.shape)}"
            raise ValueError(
                f"class_weights need mask=, integer labels (batch, H, W) with sides that are multiples of {height} and "
                f"{width}; got {given}"
            )
        assert self.class_weights is not None
        if int(mask.max()) >= len(self.class_weights):
            raise ValueError(
                f"there are {len(self.class_weights)} class_weights, and the mask has a label {int(mask.max())}"
            )
        weights = self.class_weights.to(data.device)[mask.long()].unsqueeze(1)
        return F.max_pool2d(weights, (mask.shape[1] // height, mask.shape[2] // width))

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
