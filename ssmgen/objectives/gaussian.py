"""Objectives on Gaussian paths: a path, what the network predicts, and how its error is weighted."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmgen.objectives.path import LinearPath, Path, broadcast_time
from ssmgen.registry import check_keywords, closest, register


@register("objective", "flow-matching", prediction="velocity")
@register("objective", "v", prediction="v")
@register("objective", "x0", prediction="data")
@register("objective", "eps", prediction="noise", smallest=0.05)
class GaussianObjective:
    """Mean squared error of one prediction about the path ``x_t = alpha(t) x_1 + sigma(t) x_0``.

    The network predicts one of

    - ``"velocity"``: ``alpha' x_1 + sigma' x_0``, on the linear path ``x_1 - x_0`` (SISMA eqs. 1 to 3; flow matching,
      arXiv 2210.02747);
    - ``"v"``: ``alpha x_0 - sigma x_1`` (Salimans and Ho, arXiv 2202.00512, section 4, with their sign: noise minus
      data). Their path has ``alpha^2 + sigma^2 = 1``; on others the inverse divides by that sum;
    - ``"data"``: x_1, which diffusion papers call x_0;
    - ``"noise"``: x_0, which they call eps (DDPM, arXiv 2006.11239, eq. 14).

    ``"velocity"`` and ``"v"`` convert to each other at every t in [0, 1]. Predicted data do not determine the noise
    where sigma = 0, nor predicted noise the data where alpha = 0: ``smallest`` bounds sigma or alpha from below there,
    so that the unknown part stays finite.

    Args:
        path: a `Path`; None is the linear one.
        prediction: one of the above.
        weighting: ``"uniform"`` counts the error of the prediction itself at all t alike, ``"velocity"`` that of the
            velocity it stands for.
        t_sampling: ``"uniform"`` on [0, 1], or ``"logit-normal"``: the logistic function of a standard normal, with
            most times near the middle of the path (arXiv 2403.03206, section 3.1).
        smallest: smallest divisor of ``"data"`` and ``"noise"``, positive. A sampler multiplies the network's error at
            t = 0 by its step over ``smallest``, so ``eps`` has a larger one.

    Raises:
        ValueError: an unknown prediction, weighting or t_sampling, or ``smallest`` not positive.
    """

    def __init__(
        self,
        path: Path | None = None,
        prediction: str = "velocity",
        weighting: str = "uniform",
        t_sampling: str = "uniform",
        smallest: float = 1e-3,
    ) -> None:
        _check_choice("prediction", prediction, ("velocity", "v", "data", "noise"))
        _check_choice("weighting", weighting, ("uniform", "velocity"))
        _check_choice("t_sampling", t_sampling, ("uniform", "logit-normal"))
        if not smallest > 0:
            raise ValueError(f"smallest must be positive, got {smallest}")
        if path is not None and not hasattr(path, "interpolate"):
            raise TypeError(f"path must be a Path, or None for the linear one, got {path!r}")
        self.path: Path = LinearPath() if path is None else path
        self.prediction, self.weighting = prediction, weighting
        self.t_sampling, self.smallest = t_sampling, smallest

    def loss(
        self,
        model: Callable[..., Tensor],
        data: Tensor,
        noise: Tensor | None = None,
        t: Tensor | None = None,
        generator: torch.Generator | None = None,
        weight: Tensor | None = None,
        contrasts: Tensor | None = None,
        **condition: Any,
    ) -> Tensor:
        """Weighted mean squared error of the prediction, a scalar (SISMA eq. 3 for ``"velocity"``).

        Args:
            model: called as ``model(*inputs(x_t, t), **condition)``.
            data: x_1, ``(batch, channels, height, width)``.
            noise, t: x_0 of the shape of data, and times ``(batch,)`` in [0, 1]; drawn where None.
            generator: source of noise and t, on the device of ``data``.
            weight: factor of the squared error, ``(batch,)``, or ``(batch or 1, 1, height, width)`` such as
                `ssmgen.data.loss_weights` gives. The best prediction does not depend on it.
            contrasts: linear functions of the error that are counted beside it, ``(batch, m, height, width)`` such as
                `ssmgen.data.mirrored_contrasts` gives: the loss has their squared values too, summed over m. The best
                prediction does not depend on them either, because it is a mean, and so are its linear functions.
            **condition: passed to the model, e.g. ``mask=...``.

        Raises:
            TypeError: data that are not floating point, or a condition that the model does not take.
            ValueError: an empty batch, or a shape that does not fit data.
        """
        check_keywords(
            "loss", condition, ["noise", "t", "generator", "weight", "contrasts", *_conditions(model, condition)]
        )
        _check_data(data)
        if noise is None:
            noise = _noise_for(data, data.shape[0], generator)
        if t is None:
            t = self.sample_t(data.shape[0], data.device, generator)
        if weight is not None and weight.dim() == 1:
            weight = broadcast_time(weight, data)
        _check_shapes(data, noise, t, weight, contrasts)
        prediction = model(*self.inputs(self.path.interpolate(noise, data, t), t), **condition)
        precise = torch.promote_types(prediction.dtype, torch.float32)
        difference = prediction.to(precise) - self.target(noise, data, t).to(precise)
        factor = broadcast_time(self._velocity_factor(t), data) if self.weighting == "velocity" else None
        error = difference.square() if factor is None else difference.square() * factor
        loss = error.mean() if weight is None else (error * weight).mean()
        if contrasts is None:
            return loss
        # No matrix product: rounded to 16 bits, errors that left and right share would no longer cancel.
        found = (difference.unsqueeze(1) * contrasts.to(precise).unsqueeze(2)).sum(dim=(3, 4)).square()
        return loss + (found if factor is None else found * factor.flatten(1).unsqueeze(2)).sum(dim=1).mean()

    def draw(self, data: Tensor, rank: int = 0, processes: int = 1) -> dict[str, Tensor]:
        """The ``noise`` and ``t`` that `loss` draws, for a process that sees a part of the batch.

        They are drawn for the whole batch, so that an example gets the same in any number of processes.

        Args:
            data: every ``processes``-th example of the batch, from the ``rank``-th on, ``(batch / processes, ...)``.
        """
        whole = data.shape[0] * processes
        noise, t = _noise_for(data, whole, None), self.sample_t(whole, data.device)
        return {"noise": noise[rank::processes], "t": t[rank::processes]}

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network's inputs for state x_t ``(batch, ...)`` and time t ``(batch,)``; here both unchanged."""
        return x_t, t

    def target(self, noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """What a perfect network predicts for known noise and data ``(batch, ...)`` and times ``(batch,)``."""
        if self.prediction == "velocity":
            return self.path.velocity(noise, data, t)
        if self.prediction == "v":
            t = broadcast_time(t, data)
            return self.path.alpha(t) * noise - self.path.sigma(t) * data
        return data if self.prediction == "data" else noise

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity dx/dt of the probability-flow ODE (SISMA eq. 2) that a prediction stands for.

        The prediction and the state x_t are ``(batch, ...)``; t is one time ``()``, or one per image ``(batch,)``.
        """
        if self.prediction == "velocity":
            return prediction
        return self.path.velocity(self._noise(prediction, x_t, t), self.data(prediction, x_t, t), t)

    def data(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The data x_1, ``(batch, ...)``, that a prediction stands for; arguments as in `velocity`."""
        if self.prediction == "velocity":
            return self.path.data_of_velocity(prediction, x_t, t)
        if self.prediction == "noise":
            return self.path.data_of_noise(prediction, x_t, t, self.smallest)
        if self.prediction == "data":
            return prediction
        alpha, sigma, norm = self._rotation(broadcast_time(t, x_t))
        return (alpha * x_t - sigma * prediction) / norm

    def _noise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "noise":
            return prediction
        if self.prediction == "data":
            return self.path.noise_of_data(prediction, x_t, t, self.smallest)
        alpha, sigma, norm = self._rotation(broadcast_time(t, x_t))
        return (sigma * x_t + alpha * prediction) / norm

    def _rotation(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Alpha, sigma and the norm ``alpha^2 + sigma^2`` by which (x_t, v) turns into (data, noise)."""
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return alpha, sigma, alpha.square() + sigma.square()

    def _velocity_factor(self, t: Tensor) -> Tensor:
        """Squared error of the velocity over that of the prediction, of the shape of t."""
        if self.prediction == "velocity":
            return torch.ones_like(t)
        alpha, sigma, norm = self._rotation(t)
        divisor = {"v": norm, "data": sigma.clamp(min=self.smallest), "noise": alpha.clamp(min=self.smallest)}
        return (self.path.determinant(t) / divisor[self.prediction]).square()

    def sample_t(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """``(count,)`` times for training."""
        if self.t_sampling == "uniform":
            return torch.rand(count, device=device, generator=generator, dtype=torch.float32)
        return torch.randn(count, device=device, generator=generator, dtype=torch.float32).sigmoid()


def _check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        *most, last = (repr(choice) for choice in choices)
        raise ValueError(f"{name} must be {', '.join(most)} or {last}, got {given!r}{closest(given, choices)}")


def _noise_for(data: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn((count, *data.shape[1:]), dtype=data.dtype, device=data.device, generator=generator)


def _check_data(data: Tensor) -> None:
    if not data.is_floating_point():
        raise TypeError(
            f"data must be floating point, latents or images in [-1, 1], got {data.dtype}: convert uint8 images with "
            "images / 127.5 - 1"
        )
    if not data.shape[0]:
        raise ValueError(f"the batch is empty: data must hold at least one image, got {tuple(data.shape)}")


def _check_shapes(
    data: Tensor, noise: Tensor, t: Tensor, weight: Tensor | None, contrasts: Tensor | None = None
) -> None:
    if noise.shape != data.shape or t.shape != data.shape[:1]:
        raise ValueError(
            f"noise must be {tuple(data.shape)} and t ({data.shape[0]},) to go with data, "
            f"got {tuple(noise.shape)} and {tuple(t.shape)}"
        )
    if weight is not None:
        sizes = zip(reversed(weight.shape), reversed(data.shape), strict=False)
        if weight.dim() > data.dim() or any(size not in (1, wanted) for size, wanted in sizes):
            raise ValueError(f"weight must broadcast to data {tuple(data.shape)}, got {tuple(weight.shape)}")
    if contrasts is not None and (contrasts.dim() != 4 or contrasts[:, 0:0].shape != data[:, 0:0].shape):
        raise ValueError(
            f"contrasts must be (batch, m, height, width) for data {tuple(data.shape)}, got {tuple(contrasts.shape)}"
        )


def _conditions(model: Callable[..., Tensor], given: dict[str, Any]) -> list[str]:
    """What a model takes by name after x and t; all that is given where its signature is open or unknown."""
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    if hasattr(inner, "conditions"):
        return list(inner.conditions)
    try:
        parameters = inspect.signature(inner.forward if isinstance(inner, nn.Module) else inner).parameters
    except ValueError:  # compiled from another language
        return list(given)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return list(given)
    return list(parameters)[2:]
