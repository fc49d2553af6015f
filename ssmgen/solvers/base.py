"""What every solver shares: the call, the checks on the time grid, and the fixed-step loop.

A solver integrates dx/dt = f(t, x) over one grid, from t = 0 (noise) to t = 1 (data) or back. It knows no model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int, Tensor], None]


class Solver(ABC):
    """An ODE integrator.

    Attributes:
        order: order of convergence.
        adaptive: whether it chooses its own steps by an error estimate; the grid then only says where it starts and
            ends.
        evaluations: how often the last `solve` called the velocity.
    """

    order: int
    adaptive: bool = False
    evaluations: int = 0

    def solve(self, f: Velocity, x0: Tensor, ts: Tensor, progress: Progress | None = None) -> Tensor:
        """Integrate from ``ts[0]`` to ``ts[-1]``.

        Args:
            f: velocity ``f(t, x)`` with a scalar t and x of the shape of ``x0``.
            x0: start, any shape.
            ts: ``(n + 1,)`` increasing times for n intervals; decreasing ones go back, from data to noise.
            progress: called as ``progress(step, x)`` after each interval (fixed steps only).

        Returns:
            x at ``ts[-1]``, the shape of ``x0``.

        Raises:
            ValueError: a grid that does not always rise or always fall, or has no interval.
        """
        if ts.dim() != 1 or len(ts) < 2 or not bool((ts.diff() > 0).all() or (ts.diff() < 0).all()):
            raise ValueError(f"ts must be (n + 1,) times, all rising or all falling, with n >= 1, got {ts.tolist()}")
        self.evaluations = 0

        def counted(t: Tensor, x: Tensor) -> Tensor:
            self.evaluations += 1
            return f(t, x)

        return self._integrate(counted, x0, ts, progress)

    def times(self, ts: Tensor) -> Tensor | None:
        """Every time at which `solve` asks for the velocity on this grid, in turn; None for adaptive solvers.

        What depends on the time alone can so be computed for all of them at once.
        """
        if self.adaptive:
            return None
        asked: list[Tensor] = []

        def note(t: Tensor, x: Tensor) -> Tensor:
            asked.append(t)
            return x

        self.solve(note, torch.zeros((), device=ts.device), ts)
        return torch.stack(asked)

    @abstractmethod
    def nfe(self, steps: int) -> int | None:
        """Evaluations of the velocity for ``steps`` intervals; None where it is not known ahead."""

    @abstractmethod
    def _integrate(self, f: Velocity, x0: Tensor, ts: Tensor, progress: Progress | None) -> Tensor: ...


class RungeKutta(Solver):
    """An explicit one-step method given by its Butcher tableau.

    Args:
        order: order of convergence.
        nodes: c, the times of the stages as fractions of the step; the first is 0.
        matrix: a, one row per stage after the first.
        weights: b, how the stages are combined.

    Raises:
        ValueError: parts of different lengths, or weights that do not sum to 1.
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
        self.nodes = nodes
        self.matrix = matrix
        self.weights = weights

    def nfe(self, steps: int) -> int:
        """``stages * steps``."""
        return len(self.nodes) * steps

    def _integrate(self, f: Velocity, x0: Tensor, ts: Tensor, progress: Progress | None) -> Tensor:
        x = x0
        for step in range(len(ts) - 1):
            x = self.advance(f, x, ts[step], ts[step + 1] - ts[step])
            if progress is not None:
                progress(step + 1, x)
        return x

    def advance(self, f: Velocity, x: Tensor, t: Tensor, h: Tensor, slope: Tensor | None = None) -> Tensor:
        """One step of length h from (t, x); ``slope`` is f(t, x) where it is known already."""
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
