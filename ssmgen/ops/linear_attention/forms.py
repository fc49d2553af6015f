"""The two forms of the gated delta rule: a plain loop, the definition; and products of matrices over chunks.

Letters: b batch, l length, h heads, n width of a key, p width of a value; c chunks of s steps.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DeltaInputs(NamedTuple):
    """What both forms read; see `ssmgen.ops.gated_delta_rule`.

    Attributes:
        q, k: ``(b, l, h, n)``.
        v: ``(b, l, h, p)``.
        g, beta, state: ``(b, l, h)``, twice, and ``(b, h, p, n)``, in the precision of the state.
        order: the token of each step, int64, ``(l,)`` or ``(b, l)``, for a backend that takes it.
        chunk: steps per chunk of the matrix form.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor
    order: Tensor | None = None
    chunk: int = 32


#: The inputs that have a row for each token.
SEQUENCES = ("q", "k", "v", "g", "beta")


def loop(inputs: DeltaInputs) -> tuple[Tensor, Tensor]:
    """The recurrence step by step: output ``(b, l, h, p)`` and the last state, for checking."""
    state = inputs.state
    steps = (getattr(inputs, name).to(state).unbind(1) for name in SEQUENCES)
    outputs = []
    for q, k, v, g, beta in zip(*steps, strict=True):
        state = torch.exp(g)[..., None, None] * state
        known = (state * k.unsqueeze(-2)).sum(-1)
        state = state + (beta.unsqueeze(-1) * (v - known)).unsqueeze(-1) * k.unsqueeze(-2)
        outputs.append((state * q.unsqueeze(-2)).sum(-1))
    return torch.stack(outputs, dim=1), state


def chunked(inputs: DeltaInputs) -> tuple[Tensor, Tensor]:
    """The same by products of matrices (Gated DeltaNet, section 3.3): output ``(b, l, h, p)`` and the last state.

    A step writes the difference between its value and what the state holds under its key. That depends on the earlier
    steps, so within a chunk the written values solve a unit triangular system. It is solved for all chunks at once,
    with two right-hand sides: the values (what an empty state would be given) and the keys (what to subtract for each
    state that enters). Then the states pass from chunk to chunk. Every exponent is a sum of ``g`` over later steps, at
    most 0 for ``g <= 0``, so none overflows. The system, decays and states keep the state's precision, products take
    that of v.
    """
    length, precision, dtype = inputs.v.shape[1], inputs.state.dtype, inputs.v.dtype
    q, k, v, g, beta = _chunks(inputs, min(inputs.chunk, length))  # (b, c, h, s, n or p) and (b, c, h, s)
    # Below this the decay is 0 in any case, and differences of sums must be finite: g may be -inf.
    g = g.clamp(min=-746.0 if precision == torch.float64 else -104.0)
    total = g.cumsum(-1)  # the exponent from the chunk's start
    decay, beta = _decays(total), beta.unsqueeze(-1)

    system = (k @ k.mT).to(precision) * decay * beta  # the solver reads what lies below the diagonal
    wanted = torch.cat([v.to(precision), k * torch.exp(total).unsqueeze(-1)], dim=-1) * beta
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    values, erased = solved.split([v.shape[-1], k.shape[-1]], dim=-1)

    inside = ((q @ k.mT).to(precision) * decay).to(dtype)  # (b, c, h, s, s)
    queries = (q * torch.exp(total).unsqueeze(-1)).to(dtype)
    kept = (k * torch.exp(total[..., -1:] - total).unsqueeze(-1)).to(dtype)
    passed = torch.exp(total[..., -1])[..., None, None]
    state, outputs = inputs.state.mT, []  # (b, h, n, p)
    each = (values, erased.to(dtype), inside, queries, kept, passed)
    for value, erase, scores, query, key, decayed in zip(*(x.unbind(1) for x in each), strict=True):
        entering = state.to(dtype)
        written = (value - erase @ entering).to(dtype)
        outputs.append(query @ entering + scores @ written)
        state = decayed * state + key.mT @ written
    y = torch.stack(outputs, dim=1).transpose(2, 3).flatten(1, 2)
    return y[:, :length], state.mT


def _chunks(inputs: DeltaInputs, chunk: int) -> tuple[Tensor, ...]:
    """The sequences cut into chunks, heads before steps; filled up with steps that write and change nothing."""
    missing = -inputs.v.shape[1] % chunk
    given = (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta)
    padded = (F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else x for x in given)
    return tuple(x.unflatten(1, (-1, chunk)).transpose(2, 3) for x in padded)


def _decays(total: Tensor) -> Tensor:
    """``exp(total_i - total_j)`` for i >= j, else 0: ``(..., s)`` to ``(..., s, s)``."""
    later = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).triu(1)
    return torch.exp((total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf))
