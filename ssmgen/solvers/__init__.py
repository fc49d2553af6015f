"""Solvers of dx/dt = f(t, x): a declared order and a step, over one shared loop."""

from ssmgen.solvers.adams_bashforth import AdamsBashforth
from ssmgen.solvers.adaptive import Adaptive
from ssmgen.solvers.base import Solver, shifted_grid
from ssmgen.solvers.exponential import Exponential
from ssmgen.solvers.runge_kutta import RungeKutta, euler, heun, midpoint, rk4
from ssmgen.solvers.stochastic import EulerMaruyama

__all__ = [
    "AdamsBashforth",
    "Adaptive",
    "EulerMaruyama",
    "Exponential",
    "RungeKutta",
    "Solver",
    "euler",
    "heun",
    "midpoint",
    "rk4",
    "shifted_grid",
]
