"""The one place where a model, an objective and a solver meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ssmgen.registry import build, find
from ssmgen.solvers.base import Solver

if TYPE_CHECKING:
    from collections.abc import Iterator


class MaskModel(Protocol):
    """What `sample` asks of a model: `ssmgen.models.SISMA` is one."""

    training: bool

    def __call__(self, x: Tensor, t: Tensor, mask: Tensor | None = None, *, cond: Any = None) -> Tensor: ...

    def condition(self, mask: Tensor | None, size: tuple[int, int] | None = None) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def parameters(self) -> Iterable[Tensor]: ...


class Objective(Protocol):
    """What `sample` asks of an objective."""

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor: ...


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Noise ``(len(seeds), *shape)`` in which image i depends on ``seeds[i]`` alone, on any device and in any batch."""
    rows = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows)


def sample(
    model: MaskModel,
    x0: Tensor,
    mask: Tensor | None = None,
    *,
    objective: str | Objective = "flow-matching",
    solver: str | Solver = "midpoint",
    steps: int = 25,
    guidance_scale: float = 1.0,
    progress: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Turn noise into data by integrating the model's velocity from t = 0 to t = 1.

    The condition is computed once and reused at every step. The model runs in evaluation mode and without gradients,
    and is put back as it was.

    Args:
        model: a mask-conditioned model.
        x0: noise ``(batch, channels, height, width)`` in the model's space, e.g. from `initial_noise`.
        mask: what the model takes: labels or one-hot, one per image or one for all; None samples without a mask.
        objective: a name or an objective that turns predictions into velocities.
        solver: a name or a solver.
        steps: intervals of the uniform time grid; ``solver.nfe(steps)`` tells the evaluations.
        guidance_scale: 1 follows the conditional model; w > 1 follows ``v_null + w (v_mask - v_null)`` and needs a
            model trained with mask dropout.
        progress: called as ``progress(step, x)`` after each step of a fixed-step solver.

    Returns:
        ``(batch, channels, height, width)`` on the device of the model.

    Raises:
        ValueError: bad steps, a mask that does not fit, or guidance on a model trained without mask dropout.
    """
    integrator: Solver = _resolve(solver, "solver")
    learned: Objective = _resolve(objective, "objective")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if mask is not None and mask.shape[0] not in (1, x0.shape[0]):
        raise ValueError(f"give one mask, or one per image: got {mask.shape[0]} masks for {x0.shape[0]} images")
    _check_guidance(model, mask, guidance_scale)
    if integrator.adaptive and x0.shape[0] > 1:
        return _one_by_one(model, x0, mask, objective=learned, solver=integrator, guidance_scale=guidance_scale)

    device = next(iter(model.parameters())).device
    x0 = x0.to(device)
    with torch.no_grad(), _evaluation_mode(model):
        size = (x0.shape[2], x0.shape[3])
        predict = _predictor(model, mask, size, guidance_scale)

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            return learned.velocity(predict(x, t.view(1)), x, t)

        return integrator.solve(velocity, x0, torch.linspace(0, 1, steps + 1, device=device), progress)


def _predictor(
    model: MaskModel, mask: Tensor | None, size: tuple[int, int], guidance_scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    cond = model.condition(mask, size=size)
    if guidance_scale == 1:
        return lambda x, t: model(x, t, cond=cond)
    null = model.condition(None, size=size)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        unconditional = model(x, t, cond=null)
        return unconditional + guidance_scale * (model(x, t, cond=cond) - unconditional)

    return guided


def _one_by_one(model: MaskModel, x0: Tensor, mask: Tensor | None, **settings: Any) -> Tensor:
    """Adaptive steps depend on the error of what is integrated: each image gets its own."""
    images = []
    evaluations = 0
    for i in range(x0.shape[0]):
        own = mask if mask is None or mask.shape[0] == 1 else mask[i : i + 1]
        images.append(sample(model, x0[i : i + 1], own, steps=1, **settings))
        evaluations += settings["solver"].evaluations
    settings["solver"].evaluations = evaluations
    return torch.cat(images)


def _check_guidance(model: MaskModel, mask: Tensor | None, guidance_scale: float) -> None:
    if guidance_scale == 1:
        return
    if mask is None:
        raise ValueError(f"guidance_scale={guidance_scale} needs a mask to guide towards, got None")
    if getattr(model, "mask_dropout", 0) == 0:
        raise ValueError(
            f"guidance_scale={guidance_scale} needs a model trained with mask dropout, and this one has "
            "mask_dropout=0: use guidance_scale=1, or train with mask_dropout of about 0.1"
        )


def _resolve(given: Any, kind: str) -> Any:
    if not isinstance(given, str):
        return given
    entry = find(given)
    if entry.kind != kind:
        raise ValueError(f"{given!r} is a {entry.kind}, expected a {kind}")
    return build(given)


@contextmanager
def _evaluation_mode(model: MaskModel) -> Iterator[None]:
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)
