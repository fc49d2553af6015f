"""Initial values of step sizes and of the decays of heads."""

import math

import torch
from torch import Tensor


@torch.no_grad()
def reset_step_size(bias: Tensor, smallest: float = 1e-3, largest: float = 1e-1) -> None:
    """Draw a bias ``(n,)`` of step sizes whose softplus is log-uniform between two values (Mamba, section 3.6)."""
    step = torch.empty_like(bias).uniform_(math.log(smallest), math.log(largest)).exp_()
    bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


def reset_heads(A_log: Tensor, dt_bias: Tensor) -> None:
    """Initialise decays and step sizes of heads, both ``(heads,)``, as Mamba-2's code does: -A uniform in [1, 16].

    Neither takes part in weight decay. The step sizes are those of `reset_step_size`.
    """
    with torch.no_grad():
        A_log.uniform_(1, 16).log_()
    reset_step_size(dt_bias)
    A_log.no_weight_decay = dt_bias.no_weight_decay = True  # type: ignore[attr-defined]
