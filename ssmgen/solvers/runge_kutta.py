"""Explicit Runge-Kutta methods by their Butcher tableaus (Hairer, Norsett, Wanner, Solving ODEs I, section II.1)."""

import torch
from torch import Tensor

from ssmgen.registry import register
from ssmgen.solvers.base import Progress, Solver, Velocity


class RungeKutta(Solver):
    """An explicit one-step method by its Butcher tableau (Hairer, Norsett, Wanner, Solving ODEs I, section II.1).

    Args:
        order: order of convergence.
        nodes: c, the times of the stages as fractions of the step; the first is 0.
        matrix: a, one row per stage after the first.
        weights: b, the weights of the stages in the step.

    Raises:
        ValueError: parts whose lengths disagree, or weights that do not sum to 1.
    """

    def __init__(
        self, order: int, nodes: tuple[float, ...], matrix: tuple[tuple[float, ...], ...], weights: tuple[float, ...]
    ) -> None:
        stages = len(nodes)
        if [len(row) for row in matrix] != list(range(1, stages)) or len(weights) != stages:
            raise ValueError(
                f"a tableau of {stages} nodes has {stages} weights and matrix rows of 1 to {stages - 1} numbers, got "
                f"{len(weights)} weights and rows of {[len(row) for row in matrix]}"
            )
        if not abs(sum(weights) - 1) <= 1e-6:
            raise ValueError(f"the weights of a step must sum to 1, got {weights}, which sum to {sum(weights):g}")
        self.order = order
        self.nodes, self.matrix, self.weights = nodes, matrix, weights

    def nfe(self, steps: int) -> int:
        """``stages * steps``."""
        return len(self.nodes) * steps

    def _integrate(self, f: Velocity, x0: Tensor, ts: Tensor, progress: Progress) -> Tensor:
        x = x0
        for step in range(len(ts) - 1):
            x = self.advance(f, x, ts[step], ts[step + 1] - ts[step])
            progress(step + 1, x)
        return x

    def advance(self, f: Velocity, x: Tensor, t: Tensor, h: Tensor, slope: Tensor | None = None) -> Tensor:
        """One step of scalar length h from x, of any shape, at scalar t; ``slope`` is f(t, x) if already known."""
        slopes = [f(t, x) if slope is None else slope]
        for node, row in zip(self.nodes[1:], self.matrix, strict=True):
            slopes.append(f(t + node * h, x + h * _combine(row, slopes)))
        return x + h * _combine(self.weights, slopes)


def _combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = torch.zeros_like(slopes[0])
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            total = total + weight * slope
    return total


@register("solver", "euler")
def euler() -> RungeKutta:
    """First order, one evaluation per step: ``x += h f(t, x)`` (section I.7). SISMA's, with 200 steps."""
    return RungeKutta(order=1, nodes=(0.0,), matrix=(), weights=(1.0,))


@register("solver", "midpoint")
def midpoint() -> RungeKutta:
    """Second order, two evaluations per step, none at t = 1: ``x += h f(t + h/2, x + h/2 f(t, x))`` (II.1)."""
    return RungeKutta(order=2, nodes=(0.0, 0.5), matrix=((0.5,),), weights=(0.0, 1.0))


@register("solver", "heun")
def heun() -> RungeKutta:
    """Second order, two evaluations per step: ``x += h/2 (k + f(t + h, x + h k))``, ``k = f(t, x)`` (section II.1)."""
    return RungeKutta(order=2, nodes=(0.0, 1.0), matrix=((1.0,),), weights=(0.5, 0.5))


@register("solver", "rk4")
def rk4() -> RungeKutta:
    """Fourth order, four evaluations per step (Kutta 1901; Solving ODEs I, section II.1)."""
    rows = ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0))
    return RungeKutta(order=4, nodes=(0.0, 0.5, 0.5, 1.0), matrix=rows, weights=(1 / 6, 1 / 3, 1 / 3, 1 / 6))
