"""The step of Muon (K. Jordan, 2024), with products in the precision of the run.

`torch.optim.Muon` always multiplies in bfloat16, which takes a third of a step on a processor without bfloat16
instructions. Momentum, coefficients and the names in the state are the same as there.
"""

from collections import defaultdict
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from ssmgen.weights import gathered, local_shard, sharded_like

_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7
# Elements orthogonalised at once. On a CPU, small matrices of one shape share their products, and large ones gain
# nothing. A GPU needs several matrices in one product to be busy, and the host takes long to launch many small ones:
# there as many share a product as take 0.9 GiB, at up to 14 bytes an element in bfloat16.
_BATCH, _GPU_BATCH = 2**21, 2**26


@torch.no_grad()
def muon_step(
    group: dict[str, Any],
    state: MutableMapping[Tensor, dict[str, Any]],
    dtype: torch.dtype,
    skipped: Tensor | None = None,
) -> None:
    """Step the matrices of a parameter group that have a gradient.

    The update is orthogonal and scaled by ``0.2 sqrt(max(rows, columns))``, which gives it the RMS of AdamW's (Liu et
    al., arXiv 2502.16982).

    Args:
        group: ``params``, two-dimensional, ``lr``, ``weight_decay`` (decoupled) and ``momentum`` (Nesterov's).
        state: state of each parameter; gets ``momentum_buffer``.
        dtype: dtype of the products, float32 or bfloat16.
        skipped: a bool, scalar, on the device of the matrices; True changes no value of matrices and momentum.

    A sharded matrix is gathered for its products, which every process computes; all processes must call this.
    """
    lr, momentum = group["lr"], group["momentum"]
    matrices = [parameter for parameter in group["params"] if parameter.grad is not None]
    if not matrices:
        return
    for each in matrices:
        if "momentum_buffer" not in state[each]:
            state[each]["momentum_buffer"] = torch.zeros_like(each.grad)
    averages = [local_shard(state[each]["momentum_buffer"]) for each in matrices]
    directions = [local_shard(each.grad) for each in matrices]
    decay: Any = 1 - lr * group["weight_decay"]
    if skipped is not None:  # an average that moves towards itself stays the same to the bit
        directions = [torch.where(skipped, average, grad) for average, grad in zip(averages, directions, strict=True)]
        decay = torch.full_like(skipped, decay, dtype=matrices[0].dtype).masked_fill(skipped, 1.0)
    torch._foreach_lerp_(averages, directions, 1 - momentum)
    directions = list(torch._foreach_lerp(directions, averages, momentum))
    torch._foreach_mul_([local_shard(each) for each in matrices], decay)
    _update(matrices, directions, lr, dtype, skipped)


def _update(
    matrices: list[Tensor], directions: list[Tensor], lr: float, dtype: torch.dtype, skipped: Tensor | None
) -> None:
    """Move matrices by the orthogonal matrices nearest to their directions, of which each process holds its part."""
    by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for parameter, direction in zip(matrices, directions, strict=True):
        rows, columns = sorted(parameter.shape)
        by_shape[rows, columns].append((parameter, direction))
    most = _GPU_BATCH if matrices[0].is_cuda else _BATCH
    for (rows, columns), same in by_shape.items():
        at_once = max(1, most // (rows * columns))
        for start in range(0, len(same), at_once):
            part = same[start : start + at_once]
            whole = torch.stack([_wide(gathered(direction, parameter)) for parameter, direction in part])
            updates = orthogonalize(whole, dtype)
            if skipped is not None:
                updates.masked_fill_(skipped, 0.0)
            own = [
                local_shard(sharded_like(update if p.shape[0] <= p.shape[1] else update.mT, p))
                for (p, _), update in zip(part, updates, strict=True)
            ]
            torch._foreach_add_([local_shard(p) for p, _ in part], own, alpha=-lr * 0.2 * columns**0.5)


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
