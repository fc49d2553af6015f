"""Solvers of dx/dt = f(t, x): a declared order and a step, over one shared loop."""

from ssmgen.solvers.adams_bashforth import AdamsBashforth
from ssmgen.solvers.adaptive import Adaptive
from ssmgen.solvers.base import RungeKutta, Solver
from ssmgen.solvers.euler import euler
from ssmgen.solvers.exponential import Exponential
from ssmgen.solvers.grid import shifted_grid
from ssmgen.solvers.heun import heun
from ssmgen.solvers.midpoint import midpoint
from ssmgen.solvers.rk4 import rk4

__all__ = [
    "AdamsBashforth",
    "Adaptive",
    "Exponential",
    "RungeKutta",
    "Solver",
    "euler",
    "heun",
    "midpoint",
    "rk4",
    "shifted_grid",
]
