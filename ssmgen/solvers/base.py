"""The base of all solvers: the call and the checks of the time grid; and explicit Runge-Kutta methods.

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
        adaptive: whether it chooses its own steps by an error estimate, using only the ends of the grid.
        reversible: whether it also integrates falling times, from data to noise.
        evaluations: how often the last `solve` called the velocity.
    """

    order: int
    adaptive: bool = False
    reversible: bool = True
    evaluations: int = 0

    def solve(self, f: Velocity, x0: Tensor, ts: Tensor, progress: Progress | None = None) -> Tensor:
        """Integrate from ``ts[0]`` to ``ts[-1]``.

        Args:
            f: velocity ``f(t, x)`` with a scalar t and x of the shape of ``x0``.
            x0: start, any shape.
            ts: ``(n + 1,)`` rising times for n intervals, or falling ones, from data to noise, if the solver is
                ``reversible``. They may stay on the CPU: single times mix with tensors of any device.
            progress: called as ``progress(step, x)`` after each interval (fixed steps only).

        Returns:
            x at ``ts[-1]``, the shape of ``x0``.

        Raises:
            ValueError: a grid that neither rises nor falls throughout, has no interval, or falls though the solver is
                not reversible.
        """
        if ts.dim() != 1 or len(ts) < 2 or not bool((ts.diff() > 0).all() or (ts.diff() < 0).all()):
            raise ValueError(f"ts must be (n + 1,) times, all rising or all falling, with n >= 1, got {ts.tolist()}")
        if not self.reversible and ts[0] > ts[-1]:
            raise ValueError(
                f"{type(self).__name__} is not reversible: ts must rise, got {ts[0]:g} to {ts[-1]:g}. Use a reversible "
                "solver, e.g. 'ab3', from data to noise."
            )
        self.evaluations = 0

        def counted(t: Tensor, x: Tensor) -> Tensor:
            self.evaluations += 1
            return f(t, x)

        return self._integrate(counted, x0, ts, progress)

    def times(self, ts: Tensor) -> Tensor | None:
        """Every time at which `solve` evaluates the velocity on this grid, in order; None for adaptive solvers.

        Whatever depends on the time alone can be computed from them in one batch.
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
        """Evaluations of the velocity for ``steps`` intervals; None if not known in advance."""

    @abstractmethod
    def _integrate(self, f: Velocity, x0: Tensor, ts: Tensor, progress: Progress | None) -> Tensor: ...


class RungeKutta(Solver):
    """An explicit one-step method given by its Butcher tableau.

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
        """One step of length h from (t, x); ``slope`` is f(t, x) if already known."""
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
