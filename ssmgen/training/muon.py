"""The step of Muon (K. Jordan, 2024), with products in the precision of the run.

`torch.optim.Muon` always multiplies in bfloat16, which takes a third of a step on a processor without bfloat16
instructions. Momentum, coefficients and the names in the state are the same as there.
"""

from collections import defaultdict
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from ssmgen.weights import full_tensor, local_shard, sharded_like

_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7
# Elements orthogonalised at once: small matrices of one shape share their products, large ones gain nothing.
_BATCH = 2**21


@torch.no_grad()
def muon_step(group: dict[str, Any], state: MutableMapping[Tensor, dict[str, Any]], dtype: torch.dtype) -> None:
    """Step the matrices of a parameter group that have a gradient.

    The update is orthogonal and scaled by ``0.2 sqrt(max(rows, columns))``, which gives it the RMS of AdamW's (Liu et
    al., arXiv 2502.16982).

    Args:
        group: ``params``, two-dimensional, ``lr``, ``weight_decay`` (decoupled) and ``momentum`` (Nesterov's).
        state: state of each parameter; gets ``momentum_buffer``.
        dtype: dtype of the products, float32 or bfloat16.

    A sharded matrix is gathered for its products, which every process computes; all processes must call this.
    """
    lr, momentum = group["lr"], group["momentum"]
    by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for parameter in group["params"]:
        if parameter.grad is None:
            continue
        if "momentum_buffer" not in state[parameter]:
            state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
        average = state[parameter]["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        parameter.mul_(1 - lr * group["weight_decay"])
        rows, columns = sorted(parameter.shape)
        by_shape[rows, columns].append((parameter, parameter.grad.lerp(average, momentum)))
    for (rows, columns), same in by_shape.items():
        scale = 0.2 * columns**0.5
        at_once = max(1, _BATCH // (rows * columns))
        for start in range(0, len(same), at_once):
            part = same[start : start + at_once]
            updates = orthogonalize(torch.stack([_wide(full_tensor(direction)) for _, direction in part]), dtype)
            for (parameter, _), update in zip(part, updates, strict=True):
                tall = parameter.shape[0] > parameter.shape[1]
                own = sharded_like(update.mT if tall else update, parameter)
                local_shard(parameter).add_(local_shard(own), alpha=-lr * scale)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of each matrix to about 1 (0.7 to 1.2, the smallest less) by Newton-Schulz iterations.

    An iteration of Muon (K. Jordan, 2024) is ``X <- (a + b G + c G^2) X`` with ``G = X X^T``. In float32 only ``G`` and
    the product of the polynomials are iterated, which halves the work for wide matrices; ``G`` holds squares, for which
    bfloat16 has too few bits.

    Args:
        matrices: ``(n, rows, columns)``, ``rows <= columns``.
        dtype: dtype of the products and the result, float32 or bfloat16.
    """
    # Rows first: torch then does not split a sum over threads, whose number would change its rounding.
    norms = matrices.float().square().sum(dim=-1).sum(dim=-1).sqrt().clamp(min=_SMALLEST_NORM)
    x = (matrices / norms.view(-1, 1, 1)).to(dtype)
    if dtype == torch.float32:
        return _by_gram_matrix(x)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x


def _by_gram_matrix(x: Tensor) -> Tensor:
    gram, product = x @ x.mT, None
    for iteration in range(_ITERATIONS):
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        polynomial.diagonal(dim1=1, dim2=2).add_(_A)
        product = polynomial if product is None else polynomial @ product
        if iteration + 1 < _ITERATIONS:
            gram = polynomial @ gram @ polynomial
    return product @ x  # type: ignore[operator]
