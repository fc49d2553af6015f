"""The log-likelihood that a model gives to images, by the change of variables along its ODE."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssmgen.noise import hashed_seed, image_seeds, initial_noise
from ssmgen.registry import check_keywords
from ssmgen.sampling import Sampling, evaluation_mode, resolve, weights_dtype
from ssmgen.solvers import shifted_grid
from ssmgen.values import value_for


def log_likelihood(
    model: Any,
    data: Tensor,
    *,
    objective: Any = "flow-matching",
    solver: Any = "ab3",
    steps: int = 24,
    shift: float = 1.0,
    probes: int = 1,
    seed: int | Sequence[int] = 0,
    **conditions: Any,
) -> Tensor:
    """Log-density of data under a model, in nats, ``(batch,)``.

    The ODE is solved from the data at t = 1 to noise at t = 0. Along it ``d log p / dt = -div v`` (neural ODEs, arXiv
    1806.07366, eq. 8). The divergence is estimated by Hutchinson's trace estimator with random signs (FFJORD, arXiv
    1810.01367, section 3.1), which are drawn once for an image and kept. The estimate has no bias; its spread over
    ``seed`` falls with ``probes``.

    For images of n values, ``-result / (n log 2)`` are bits per dimension. The density is that of the model's own
    space: of latents, where the model works on them. Guidance changes the density in an unknown way and is not used.
    The data move to the model's device. The model gets inputs of its weights' dtype; images and density are integrated
    in that of the data, at least float32.

    Args:
        model: a conditional model; it runs in evaluation mode, and its mode is restored.
        data: images or latents ``(batch, channels, height, width)``.
        objective: a name or an objective that turns predictions into velocities.
        solver: a name, a spec or a reversible solver of fixed steps.
        steps, shift: of the time grid, see `ssmgen.Sampling`.
        probes: random vectors per image; each costs a backward pass per evaluation.
        seed: of the first image's vectors; later images count up. Or one per image. They are independent of the noise
            that `ssmgen.initial_noise` draws from the same seed.
        **conditions: values of the model's conditions by name, such as ``mask``.

    Returns:
        ``(batch,)`` on the model's device, float64 for float64 data, else float32.

    Raises:
        ValueError: bad settings, an adaptive, stochastic or irreversible solver, or a value that does not fit.
        TypeError: not a condition of the model; names the closest.
    """
    check_keywords("log_likelihood", conditions, getattr(model, "conditions", ("mask",)))
    _check(data, probes)
    target: Any = resolve(objective, "objective")
    method: Any = resolve(Sampling(solver=solver, steps=steps).solver, "solver", path=getattr(target, "path", None))
    if method.adaptive or not method.reversible:
        raise ValueError(f"log_likelihood needs a reversible solver of fixed steps, such as 'ab3', got {solver!r}")
    values = {name: value_for(name, value, len(data)) for name, value in conditions.items() if value is not None}
    device = next(iter(model.parameters())).device
    data = data.to(device, torch.promote_types(data.dtype, torch.float32))
    signs = _signs(image_seeds(seed, len(data)), (probes, *data.shape[1:])).to(data)
    with torch.no_grad(), evaluation_mode(model):
        cond = model.condition(**values, size=(data.shape[2], data.shape[3]))
        flow = _Flow(model, target, cond, signs, data.shape)
        start = torch.cat([data.flatten(1), data.new_zeros(len(data), 1)], dim=1)
        end = method.solve(flow, start, shifted_grid(steps, shift).flip(0))
    noise, change = end[:, :-1], end[:, -1]
    return -(noise.square() + math.log(2 * math.pi)).sum(1) / 2 + change


def _check(data: Tensor, probes: int) -> None:
    if data.dim() != 4 or not data.is_floating_point():
        raise ValueError(f"data must be floating point (batch, channels, height, width), got {tuple(data.shape)}")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")


class _Flow:
    """The derivative of each image's values and, in the last column, of its log-density's change."""

    def __init__(self, model: Any, objective: Any, cond: Any, signs: Tensor, shape: torch.Size) -> None:
        self.model, self.objective, self.cond, self.signs, self.shape = model, objective, cond, signs, shape
        self.shown = getattr(objective, "inputs", lambda x, t: (x, t))
        self.dtype = weights_dtype(model)

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        """The derivative of ``state (batch, values + 1)`` at time t ``()``."""
        with torch.enable_grad():
            x = state[:, :-1].view(self.shape).requires_grad_()
            given, own_t = self.shown(x, t.to(x.device))
            prediction = self.model(given.to(self.dtype), own_t.view(1), cond=self.cond)
            velocity = self.objective.velocity(prediction.to(x.dtype), x, t)
            products = [
                (torch.autograd.grad(velocity, x, probe, retain_graph=True)[0] * probe).flatten(1).sum(1, keepdim=True)
                for probe in self.signs.unbind(1)
            ]
        return torch.cat([velocity.detach().flatten(1), torch.stack(products).mean(0)], dim=1)


def _signs(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    """Random -1 and 1, ``(len(seeds), *shape)``.

    The seeds are hashed: the estimate is biased where the signs are those of the noise that an image was made from.
    """
    own = [hashed_seed(b"ssmgen log_likelihood" + seed.to_bytes(8, "little")) for seed in seeds]
    return torch.where(initial_noise(own, shape) < 0, -1.0, 1.0)
