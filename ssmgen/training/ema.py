"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """An `AveragedModel` of ``model`` with decay ``min(decay, (1 + n) / (10 + n))`` at its n-th update.

    The ramp lets short runs forget their initial weights. Call ``update_parameters(model)`` after each step;
    ``.module`` is the averaged model.

    Raises:
        ValueError: ``decay`` outside [0, 1), or weights that are not float32 (16-bit averages lose their updates).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {decay}")
    low = next((name for name, p in model.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
    if low is not None:
        raise ValueError(
            f"{low} is 16-bit: a moving average at decay {decay} would lose its updates; keep float32 weights"
        )
    return AveragedModel(model, multi_avg_fn=_ramped(decay), use_buffers=False)


def _ramped(decay: float) -> Callable[..., None]:
    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        n = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return update
