"""Time grids."""

import torch
from torch import Tensor


def shifted_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Times ``(steps + 1,)`` from 0 to 1, float32: a uniform grid whose noise level ``s = 1 - t`` is shifted.

    The shifted level is ``shift s / (1 + (shift - 1) s)`` (Esser et al., arXiv 2403.03206, eq. 23). A shift above 1
    takes finer steps near the noise, where the layout is decided; one below 1 near the data, where details are; 1 is
    the uniform grid.

    Raises:
        ValueError: ``steps`` or ``shift`` not positive.
    """
    if steps < 1 or not shift > 0:
        raise ValueError(f"steps must be at least 1 and shift positive, got steps={steps}, shift={shift}")
    noise = torch.linspace(1, 0, steps + 1, dtype=torch.float32)
    return 1 - shift * noise / (1 + (shift - 1) * noise)
