"""The base of all solvers, and the time grid."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int, Tensor], None]


class Path(Protocol):
    """What some solvers ask of the objective's path, see `ssmgen.objectives.Path`."""

    linear: bool

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def data_of_velocity(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor: ...

    def noise_of_velocity(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor: ...


class Solver(ABC):
    """Integrates dx/dt = f(t, x) over one grid, from t = 0 (noise) to t = 1 (data) or back. It knows no model.

    Attributes:
        order: order of convergence.
        adaptive: whether it chooses its own steps by an error estimate, using only the ends of the grid.
        stochastic: whether it adds noise on the way, so that the end does not follow from the ODE.
        reversible: whether it also integrates falling times, from data to noise.
        evaluations: how often the last `solve` called the velocity.
    """

    order: int
    adaptive: bool = False
    stochastic: bool = False
    reversible: bool = True
    evaluations: int = 0

    def solve(self, f: Velocity, x0: Tensor, ts: Tensor, progress: Progress | None = None) -> Tensor:
        """Integrate from ``ts[0]`` to ``ts[-1]``.

        Args:
            f: velocity ``f(t, x)`` with a scalar t and x of the shape of ``x0``.
            x0: start, any shape and floating-point dtype, bfloat16 too; the steps keep the dtype.
            ts: ``(n + 1,)`` rising times for n intervals, or falling ones, from data to noise, if the solver is
                ``reversible``. They may stay on the CPU: single times mix with tensors of any device.
            progress: called as ``progress(step, x)`` after each interval (fixed steps only).

        Returns:
            x at ``ts[-1]``, the shape and dtype of ``x0``.

        Raises:
            ValueError: a grid that has no interval, is not monotonic, or falls though the solver is not reversible.
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

        return self._integrate(counted, x0, ts, progress or (lambda step, x: None))

    def times(self, ts: Tensor) -> Tensor | None:
        """The times ``(evaluations,)`` of the velocities that `solve` asks for on a grid, in order; None if adaptive.

        Whatever depends on the time alone can be computed from them in one batch.
        """
        if self.adaptive:
            return None
        asked: list[Tensor] = []

        def note(t: Tensor, x: Tensor) -> Tensor:
            asked.append(t)
            return x

        self.solve(note, torch.zeros(1, device=ts.device), ts)
        return torch.stack(asked)

    @abstractmethod
    def nfe(self, steps: int) -> int | None:
        """Evaluations of the velocity for ``steps`` intervals; None if not known in advance."""

    @abstractmethod
    def _integrate(self, f: Velocity, x0: Tensor, ts: Tensor, progress: Progress) -> Tensor: ...


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
