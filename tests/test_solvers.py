"""Solvers against closed-form solutions."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

import ssmgen
from ssmgen import build, extras
from ssmgen.objectives import LinearPath, Path
from ssmgen.solvers import RungeKutta, shifted_grid

STOCHASTIC = [name for name in ssmgen.names("solver") if build(name).stochastic]
FIXED = [name for name in ssmgen.names("solver") if not build(name).adaptive]
ADAPTIVE = [name for name in ssmgen.names("solver") if build(name).adaptive]
X0 = torch.tensor([[0.4], [1.1]], dtype=torch.float64)


def of_the_ode(name):
    """The solver, without the noise that a stochastic one adds."""
    return build(name, diffusion=0) if name in STOCHASTIC else build(name)


def f(t, x):
    """x' = -2 t x^2 has the solution x0 / (1 + x0 t^2)."""
    return -2 * t * x**2


EXACT = X0 / (1 + X0)


def grid(steps):
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


@pytest.mark.parametrize("name", FIXED)
def test_order_by_slope(name):
    solver = of_the_ode(name)
    steps = [64, 128, 256, 512]
    errors = [(solver.solve(f, X0, grid(n)) - EXACT).norm().item() for n in steps]
    slope = torch.tensor([math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]).mean().item()
    assert abs(slope - solver.order) < 0.25, (slope, errors)


@pytest.mark.parametrize("name", FIXED)
def test_evaluations_are_known_ahead(name):
    solver = build(name)
    solver.solve(f, X0, grid(7))
    assert solver.evaluations == solver.nfe(7)


@pytest.mark.parametrize("name", FIXED)
def test_uneven_grids_and_progress(name):
    seen = []
    ts = torch.tensor([0, 0.1, 0.35, 0.6, 1.0], dtype=torch.float64)
    out = of_the_ode(name).solve(f, X0, ts, lambda step, x: seen.append((step, x)))
    assert [step for step, _ in seen] == [1, 2, 3, 4] and torch.equal(seen[-1][1], out)
    assert (out - EXACT).abs().max() < 0.3


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_error_follows_the_tolerance(name):
    errors = {}
    for tolerance in (1e-3, 1e-6):
        solver = build(name, rtol=tolerance, atol=tolerance)
        errors[tolerance] = (solver.solve(f, X0, grid(1)) - EXACT).abs().max().item()
        assert errors[tolerance] < 20 * tolerance, (name, errors)
        assert solver.evaluations > 0 and solver.nfe(1) is None
    assert errors[1e-6] < errors[1e-3]


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_steps_stay_on_the_grid(name):
    times = []
    build(name).solve(lambda t, x: times.append(float(t)) or f(t, x), X0[:1], grid(1))
    assert min(times) >= 0 and max(times) <= 1


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_images_do_not_couple(name):
    def stiff_if_large(t, x):
        return torch.where(x.abs().amax() > 0.9, 40 * torch.cos(40 * t) * x, x * 0)

    solver = build(name)
    alone = solver.solve(stiff_if_large, X0[:1], grid(1))
    assert torch.equal(solver.solve(stiff_if_large, X0, grid(1))[:1], alone)


@pytest.mark.parametrize("ts", [[0.0], [0, 0.5, 0.5, 1], [1.0, 0.0, 0.5]])
def test_bad_grids_are_explained(ts):
    with pytest.raises(ValueError, match="all rising or all falling"):
        build("euler").solve(f, X0, torch.tensor(ts))


def test_the_exponential_solver_is_exact_where_the_data_prediction_is_a_line():
    """dx/dt = (D - x) / (1 - t) with D = 3 - 2 t: exact from its second step on, for any steps."""
    ts = torch.tensor([0, 0.1, 0.35, 0.6, 1.0], dtype=torch.float64)
    x0 = torch.zeros(1, dtype=torch.float64)

    def velocity(t, x):
        return (3 - 2 * t - x) / (1 - t)

    solver, fine = build("deis2"), build("dopri5", rtol=1e-10, atol=1e-10)
    start = solver.solve(velocity, x0, ts[:2])
    for steps in (2, 3):
        expected = fine.solve(velocity, start, ts[[1, steps]])
        torch.testing.assert_close(solver.solve(velocity, x0, ts[: steps + 1]), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(solver.solve(velocity, x0, ts), torch.ones_like(x0))  # the path ends in the data


def old_deis2(f, x, ts):
    """The formulas of the linear path as they were before paths: deis2 must keep them to the bit."""
    previous = None
    for step in range(len(ts) - 1):
        t, h = ts[step], ts[step + 1] - ts[step]
        left, right = 1 - t, 1 - ts[step + 1]
        data = x + left * f(t, x)
        x = (right / left) * x + (h / left) * data
        if previous is not None:
            logarithm = torch.xlogy(right, left) - torch.xlogy(right, right)
            x = x + (h - logarithm) / (t - ts[step - 1]) * (data - previous)
        previous = data
    return x


@pytest.mark.parametrize("path", [None, LinearPath()])
def test_deis2_keeps_the_bits_of_the_linear_path(path):
    x, ts = torch.randn(3, 2, 4, 4), shifted_grid(7, 2.0)
    out = build("deis2", path=path).solve(lambda t, x: torch.sin(3 * x) - t, x, ts)
    assert torch.equal(out, old_deis2(lambda t, x: torch.sin(3 * x) - t, x, ts))


class Cosine(Path):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""

    def alpha(self, t):
        return (math.pi / 2 * t).sin()

    def sigma(self, t):
        return (math.pi / 2 * t).cos()

    def alpha_rate(self, t):
        return math.pi / 2 * self.sigma(t)

    def sigma_rate(self, t):
        return -math.pi / 2 * self.alpha(t)


def test_deis2_is_exact_on_any_path_where_the_data_prediction_is_a_line():
    path, x0 = Cosine(), torch.full((1,), 0.3, dtype=torch.float64)
    ts = torch.tensor([0, 0.1, 0.35, 0.6, 0.9], dtype=torch.float64)

    def velocity(t, x):
        data = 3 - 2 * t
        return path.velocity((x - path.alpha(t) * data) / path.sigma(t), data, t)

    solver, fine = build("deis2", path=path), build("dopri5", rtol=1e-10, atol=1e-10)
    start = solver.solve(velocity, x0, ts[:2])
    for steps in (2, 3, 4):
        expected = fine.solve(velocity, start, ts[[1, steps]])
        torch.testing.assert_close(solver.solve(velocity, x0, ts[: steps + 1]), expected, rtol=1e-7, atol=1e-7)
    ts[-1] = 1
    end = solver.solve(velocity, x0, ts)
    torch.testing.assert_close(end, torch.ones_like(x0), rtol=1e-6, atol=1e-6)  # the path ends in the data


def test_deis2_converges_on_any_path_with_order_two():
    path = Cosine()

    def velocity(t, x):  # data of variance 1/4 around 2
        alpha, sigma = path.alpha(t), path.sigma(t)
        variance = alpha**2 / 4 + sigma**2
        data = 2 + alpha / 4 * (x - 2 * alpha) / variance
        return path.velocity((x - alpha * data) / sigma, data, t)

    ts = [torch.linspace(0, 0.95, n + 1, dtype=torch.float64) for n in (64, 128, 256)]
    exact = build("rk4").solve(velocity, X0, torch.linspace(0, 0.95, 1001, dtype=torch.float64))
    errors = [(build("deis2", path=path).solve(velocity, X0, grid) - exact).norm().item() for grid in ts]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(abs(slope - 2) < 0.25 for slope in slopes), slopes


def test_deis2_rejects_times_outside_the_path():
    with pytest.raises(ValueError, match="from 0 .noise. up to 1 .data., got "):
        build("deis2").solve(f, X0, torch.tensor([0.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("name", [name for name in FIXED + ADAPTIVE if build(name).reversible])
def test_a_falling_grid_goes_back_to_the_start(name):
    there = build(name).solve(f, X0, grid(64))
    back = build(name).solve(f, there, grid(64).flip(0))
    assert (back - X0).abs().max() < 0.05 * (there - X0).abs().max()


@pytest.mark.parametrize("name", [name for name in FIXED + ADAPTIVE if not build(name).reversible])
def test_a_solver_that_is_not_reversible_rejects_a_falling_grid(name):
    with pytest.raises(ValueError, match="is not reversible: ts must rise, got 1 to 0.*'ab3'"):
        build(name).solve(f, X0, grid(4).flip(0))


@pytest.mark.parametrize("name", FIXED)
def test_the_grid_may_stay_on_the_cpu(name):
    """Any device but the CPU will do: meta tensors mix with single CPU times as those of a GPU do."""
    end = of_the_ode(name).solve(lambda t, x: t * x, torch.ones(2, 3, device="meta"), torch.linspace(0, 1, 5))
    assert end.device.type == "meta" and end.shape == (2, 3)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_solvers_move_the_grid_to_the_state(name, monkeypatch):
    def odeint(f, x, ends, options, **settings):
        assert ends.device == x.device == options["step_t"].device
        return x.expand(2, *x.shape)

    solver = build(name)
    monkeypatch.setitem(sys.modules, "torchdiffeq", SimpleNamespace(odeint=odeint))
    end = solver.solve(lambda t, x: -x, torch.ones(2, 3, device="meta"), torch.linspace(0, 1, 5))
    assert end.device.type == "meta"


def test_shifted_grids():
    torch.testing.assert_close(shifted_grid(4), torch.linspace(0, 1, 5))
    grid = shifted_grid(4, shift=3.0)
    assert grid[0] == 0 and grid[-1] == 1
    torch.testing.assert_close(1 - grid[2], torch.tensor(3 * 0.5 / (1 + 2 * 0.5)))
    for bad in (dict(steps=0), dict(steps=4, shift=0.0), dict(steps=4, shift=-1.0), dict(steps=4, shift=math.nan)):
        with pytest.raises(ValueError, match="shift positive"):
            shifted_grid(**bad)


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"torchdiffeq.*ssmgen\[adaptive\]"):
        build("dopri5")


@pytest.mark.parametrize(
    ("tableau", "message"),
    [
        (((0, 0.5), ((0.5,),), (0.2, 0.3, 0.5)), "2 nodes has 2 weights .* got 3 weights"),
        (((0, 0.5, 1), ((0.5,), (1,)), (0.2, 0.3, 0.5)), r"rows of 1 to 2 numbers, got 3 weights and rows of \[1, 1\]"),
        (((0, 0.5), ((0.5,),), (0.5, 0.7)), "must sum to 1, got .* which sum to 1.2"),
    ],
)
def test_an_inconsistent_tableau_is_rejected(tableau, message):
    with pytest.raises(ValueError, match=message):
        RungeKutta(2, *tableau)


@pytest.mark.parametrize("name", FIXED)
def test_solvers_say_which_times_they_ask_for(name):
    ts = torch.tensor([0.0, 0.1, 0.35, 0.4, 1.0])
    asked = []

    def f(t, x):
        asked.append(t)
        return -x

    solver = build(name)
    solver.solve(f, torch.ones(2), ts)
    assert torch.equal(solver.times(ts), torch.stack(asked))


MEAN, DEVIATION = 0.7, 0.5


class CosinePath(Path):
    """alpha = sin, sigma = cos of pi t / 2."""

    def alpha(self, t):
        return torch.sin(math.pi / 2 * t)

    def sigma(self, t):
        return torch.cos(math.pi / 2 * t)

    def alpha_rate(self, t):
        return math.pi / 2 * self.sigma(t)

    def sigma_rate(self, t):
        return -math.pi / 2 * self.alpha(t)


def velocity_of_a_normal_distribution(path, deviation=DEVIATION):
    """The exact velocity where the data are normal with MEAN and a deviation."""

    def velocity(t, x):
        alpha, sigma, alpha_rate, sigma_rate = path.alpha(t), path.sigma(t), path.alpha_rate(t), path.sigma_rate(t)
        variance = (alpha * deviation) ** 2 + sigma**2
        slope = (alpha * alpha_rate * deviation**2 + sigma * sigma_rate) / variance
        return alpha_rate * MEAN + slope * (x - alpha * MEAN)

    return velocity


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=["linear", "cosine"])
@pytest.mark.parametrize("diffusion", [0.0, 1.0, 3.0])
def test_the_stochastic_solver_keeps_the_distribution(path, diffusion):
    solver = build("euler-maruyama", path=path, diffusion=diffusion)
    start = ssmgen.initial_noise(range(4), (5000,)).double()
    end = solver.solve(velocity_of_a_normal_distribution(path), start, grid(100))
    assert abs(end.mean() - MEAN) < 0.02 and abs(end.std() - DEVIATION) < 0.02
    # Noise on the way makes the end depend less on the start, which the ODE maps in order.
    correlation = torch.corrcoef(torch.stack([start.flatten(), end.flatten()]))[0, 1]
    assert (correlation > 0.999) == (diffusion == 0)


@pytest.mark.parametrize("path", [None, CosinePath()], ids=["linear", "cosine"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_stochastic_solver_leaves_no_noise_at_few_steps(path, shift):
    deviation, start = 0.05, ssmgen.initial_noise(range(4), (5000,)).double()
    for steps in (10, 25):
        solver = build("euler-maruyama", path=path)
        velocity = velocity_of_a_normal_distribution(path or LinearPath(), deviation)
        end = solver.solve(velocity, start, shifted_grid(steps, shift).double())
        assert abs(end.mean() - MEAN) < 0.1 and end.std() < 1.2 * deviation, (steps, end.mean(), end.std())


def test_a_large_diffusion_does_not_blow_up():
    start = ssmgen.initial_noise(range(4), (5000,)).double()
    for diffusion in (10, 1e6):
        solver = build("euler-maruyama", diffusion=diffusion)
        end = solver.solve(velocity_of_a_normal_distribution(LinearPath()), start, grid(10))
        assert abs(end.mean() - MEAN) < 0.1 and end.std() < 2 * DEVIATION, (diffusion, end.mean(), end.std())


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fixed_steps_keep_the_dtype_of_the_start(name, dtype):
    start = torch.linspace(0, 1, 6).view(2, 3).to(dtype)
    end = build(name).solve(lambda t, x: -x, start, shifted_grid(5))
    assert end.dtype == dtype and bool(end.isfinite().all())


def test_the_noise_of_a_stochastic_solver_belongs_to_the_image():
    solver, start = build("euler-maruyama"), torch.randn(3, 2, 4, 5)
    together = solver.solve(f, start, grid(5))
    assert torch.equal(together, solver.solve(f, start, grid(5)))
    for i in (2, 0):
        assert torch.equal(solver.solve(f, start[i : i + 1], grid(5))[0], together[i])
    still = build("euler-maruyama", diffusion=0).solve(f, start, grid(5))
    assert torch.equal(still, build("euler").solve(f, start, grid(5))) and not torch.allclose(still, together)
    with pytest.raises(ValueError, match="diffusion must be a number of at least 0, got -1"):
        build("euler-maruyama", diffusion=-1)
