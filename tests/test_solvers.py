"""Solvers against closed-form solutions, and sampling with them."""

import math

import pytest
import torch
from conftest import randomize

import ssmgen
from ssmgen import build, extras, initial_noise, sample
from ssmgen.solvers import Solver

FIXED = [name for name in ssmgen.names("solver") if not build(name).adaptive]
ADAPTIVE = [name for name in ssmgen.names("solver") if build(name).adaptive]
X0 = torch.tensor([[0.4], [1.1]], dtype=torch.float64)


def f(t, x):
    """x' = -2 t x^2 has the solution x0 / (1 + x0 t^2)."""
    return -2 * t * x**2


EXACT = X0 / (1 + X0)


def grid(steps):
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


@pytest.mark.parametrize("name", FIXED)
def test_order_by_slope(name):
    solver = build(name)
    steps = [8, 16, 32, 64]
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
    out = build(name).solve(f, X0, ts, lambda step, x: seen.append((step, x)))
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


@pytest.mark.parametrize("ts", [[0.0], [0, 0.5, 0.5, 1], [1.0, 0.0]])
def test_bad_grids_are_explained(ts):
    with pytest.raises(ValueError, match="increasing times"):
        build("euler").solve(f, X0, torch.tensor(ts))


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"torchdiffeq.*ssmgen\[adaptive\]"):
        build("dopri5")


class Known(torch.nn.Module):
    """A model whose velocity is known: (mean of the mask) - x, so that x -> m + (x0 - m) / e."""

    mask_dropout = 0.1

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.conditions = 0

    def condition(self, mask, size=None):
        self.conditions += 1
        return torch.zeros(1, 1, 1, 1) if mask is None else mask.float().mean((1, 2)).view(-1, 1, 1, 1)

    def forward(self, x, t, mask=None, *, cond=None):
        assert not self.training and not torch.is_grad_enabled()
        return (cond - x) * self.weight


@pytest.mark.parametrize("solver", [*FIXED, *ADAPTIVE])
def test_sampling_follows_the_ode(solver):
    model, x0 = Known().train(), torch.randn(3, 2, 4, 4)
    mask = torch.stack([torch.full((4, 4), k) for k in (1, 2, 3)])
    out = sample(model, x0, mask, solver=solver, steps=40)
    m = mask.float().mean((1, 2)).view(-1, 1, 1, 1)
    torch.testing.assert_close(out, m + (x0 - m) / math.e, rtol=0.02, atol=0.02)
    assert model.training and model.conditions == (3 if solver in ADAPTIVE else 1)


def test_guidance_extrapolates_from_the_null_condition():
    model, x0 = Known(), torch.randn(2, 2, 4, 4)
    mask = torch.full((1, 4, 4), 3)
    out = sample(model, x0, mask, solver="rk4", steps=10, guidance_scale=2.0)
    torch.testing.assert_close(out, 6 + (x0 - 6) / math.e, rtol=1e-4, atol=1e-4)


def test_guidance_needs_mask_dropout_in_training():
    model = build("sisma-debug")
    x0, mask = torch.randn(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="trained with mask dropout.*mask_dropout=0"):
        sample(model, x0, mask, guidance_scale=1.5)
    sample(build("sisma-debug", mask_dropout=0.1), x0, mask, guidance_scale=1.5, steps=1)
    with pytest.raises(ValueError, match="needs a mask"):
        sample(build("sisma-debug", mask_dropout=0.1), x0, guidance_scale=1.5)


@pytest.mark.parametrize("solver", ["midpoint", "dopri5"])
def test_an_image_depends_on_its_own_seed_and_mask(solver):
    model = randomize(build("sisma-debug"), std=0.05)
    seeds = [5, 6, 7]
    masks = torch.randint(0, 19, (3, 8, 8))
    together = sample(model, initial_noise(seeds, (3, 8, 8)), masks, solver=solver, steps=4)
    for i, seed in enumerate(seeds):
        alone = sample(model, initial_noise([seed], (3, 8, 8)), masks[i : i + 1], solver=solver, steps=4)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1])


def test_bad_sampling_arguments_are_explained():
    model, x0 = build("sisma-debug"), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        sample(model, x0, steps=0)
    with pytest.raises(ValueError, match="3 masks for 2 images"):
        sample(model, x0, torch.zeros(3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="unknown name 'eulr'.*'euler'"):
        sample(model, x0, solver="eulr")
    with pytest.raises(ValueError, match="'sisma-debug' is a model, expected a solver"):
        sample(model, x0, solver="sisma-debug")


def test_a_solver_object_is_taken_as_it_is():
    solver = build("heun")
    assert isinstance(solver, Solver)
    sample(build("sisma-debug"), torch.randn(1, 3, 8, 8), solver=solver, steps=3)
    assert solver.evaluations == 6
