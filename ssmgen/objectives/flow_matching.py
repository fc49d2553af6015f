"""Flow matching with straight paths (rectified flow)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmgen.registry import check_keywords, closest, register

_T_SAMPLINGS = ("uniform", "logit-normal")
_OWN = ("noise", "t", "generator")


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
                integer labels ``(batch, H, W)``, or ``(1, H, W)`` for all; H and W may differ from height and width.

        Raises:
            TypeError: data that are not floating point, or a condition that the model does not take.
            ValueError: no data, noise or t of another shape than data asks for, or no such mask for the class weights.
        """
        check_keywords("loss", condition, [*_OWN, *_conditions(model, condition)])
        if not data.is_floating_point():
            raise TypeError(
                f"data must be floating point, latents or images in [-1, 1], got {data.dtype}: uint8 images become "
                "that by images / 127.5 - 1"
            )
        if not data.shape[0]:
            raise ValueError(f"the batch is empty: data must hold at least one image, got {tuple(data.shape)}")
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
        """What each place counts, ``(batch or 1, 1, height, width)``."""
        mask, batch = condition.get("mask"), data.shape[0]
        wanted = f"class_weights need mask=, integer labels ({batch}, H, W) or (1, H, W)"
        if not isinstance(mask, Tensor):
            raise ValueError(f"{wanted}; got {mask!r}")
        if mask.is_floating_point() or mask.dim() != 3 or mask.shape[0] not in (1, batch) or not mask.numel():
            raise ValueError(f"{wanted}; got {mask.dtype} {tuple(mask.shape)}")
        assert self.class_weights is not None
        low, high = torch.stack(mask.aminmax()).tolist()
        count = len(self.class_weights)
        if low < 0 or high >= count:
            raise ValueError(f"there are {count} class_weights, and the mask has a label {low if low < 0 else high}")
        weights = self.class_weights.to(data.device)[mask.long()].unsqueeze(1)
        return F.adaptive_max_pool2d(weights, data.shape[-2:])

    def interpolate(self, noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """The point at time t of the line from noise to data (SISMA eq. 1)."""
        t = t.view(-1, *[1] * (data.dim() - 1)).to(data.dtype)
        return t * data + (1 - t) * noise

    def sample_t(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """``(count,)`` times for training."""
        if self.t_sampling == "uniform":
            return torch.rand(count, device=device, generator=generator, dtype=torch.float32)
        return torch.randn(count, device=device, generator=generator, dtype=torch.float32).sigmoid()

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity dx/dt that a prediction stands for: itself (SISMA eq. 2)."""
        return prediction


def _conditions(model: Callable[..., Tensor], given: dict[str, Any]) -> list[str]:
    """What a model takes by name after x and t; all that is given where it does not say, as with ``**condition``."""
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    try:
        parameters = inspect.signature(inner.forward if isinstance(inner, nn.Module) else inner).parameters
    except ValueError:  # code that was compiled from another language has no signature
        return list(given)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return list(given)
    return list(parameters)[2:]
