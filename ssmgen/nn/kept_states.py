"""All states of a scan, kept: what reads them at every step then scans nothing.

Letters: b batch, l length (= height x width tokens), e inner width, n d_state, k directions.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmgen.nn.parts import parts_of
from ssmgen.ops import selective_scan


class KeptStates(NamedTuple):
    """What is left of a scan whose u, delta and B do not change: ``y = C h + skip``, with any C.

    Attributes:
        h: states after each token, those of all directions side by side, ``(b, l, k n, e)``.
        skip: ``D u``, summed over the directions, ``(b, l, e)``.
    """

    h: Tensor
    skip: Tensor


def kept_states(ssm: Any, u: Tensor, delta: Tensor, B: Tensor, size: tuple[int, int]) -> KeptStates:
    """The states of `SelectiveSSM.scan` for ``u`` ``(b, l, e)``, ``delta`` ``(b, l, k e)`` and ``B`` ``(b, l, k n)``.

    Each is rounded once to the dtype of ``u``. They come from a scan for each of the n states by itself, which with
    C = 1 returns that state.
    """
    A, orders = ssm.constants(size)
    parts = zip(*(x.chunk(ssm.directions, dim=-1) for x in (delta, B)), orders, strict=True)
    biases = ssm.dt_proj.bias.to(A.dtype).chunk(ssm.directions)
    ones = u.new_ones(1, 1, 1).expand(*u.shape[:2], 1)
    states: list[Any] = []
    for (own_delta, own_B, order), own_A, bias in zip(parts, A.chunk(ssm.directions), biases, strict=True):
        shared: dict[str, Any] = {"delta_bias": bias, "delta_softplus": True, "order": order, "backend": ssm.backend}
        pairs = zip(own_A.split(1, dim=1), own_B.split(1, dim=2), strict=True)
        states += [selective_scan(u, own_delta, a, b, ones, **shared) for a, b in pairs]
    D = ssm.D.to(A.dtype).view(ssm.directions, -1).sum(0)
    return KeptStates(torch.stack(states, dim=2), (D * u.to(A.dtype)).to(u.dtype))


def read_states(states: list[KeptStates], C: Tensor) -> list[Tensor]:
    """``C h + skip`` of each part of the batch, ``(part, l, e)``; C is ``(b, l, k n)``.

    States of batch 1 are read once for all items that they serve.

    Raises:
        TypeError: only some of the states are kept.
        RuntimeError: gradients are on, and the weights of the scan would get none.
    """
    if not all(isinstance(state, KeptStates) for state in states):
        raise TypeError("some conditions have kept states and others have none: keep those of all, or of none")
    if torch.is_grad_enabled():
        raise RuntimeError("kept states have no gradients for the scan's weights: read them under torch.no_grad()")
    results = []
    for (h, skip), (_, own) in zip(states, parts_of(states, C), strict=True):
        if len(h) == 1:
            read = (own.transpose(0, 1) @ h[0]).transpose(0, 1)
        else:
            read = (own.flatten(0, 1).unsqueeze(1) @ h.flatten(0, 1)).view_as(skip)
        results.append(read + skip)  # not baddbmm, which copies the skip in a kernel of its own
    return results
