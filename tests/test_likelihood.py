"""The log-likelihood against distributions whose density is known."""

import math

import pytest
import torch
from torch import nn

import ssmgen
from ssmgen.noise import initial_noise
from ssmgen.sampling import in_dtype

MEAN, DEVIATION = 0.7, 0.5


class Normal(nn.Module):
    """The exact velocity where the data are normal with mean ``shift`` or MEAN, and DEVIATION."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.train()

    def condition(self, mask=None, size=None):
        return MEAN if mask is None else mask.float().mean((1, 2)).view(-1, 1, 1, 1)

    def forward(self, x, t, mask=None, *, cond=None):
        assert not self.training
        variance = (t * DEVIATION) ** 2 + (1 - t) ** 2
        return cond + (t * DEVIATION**2 - (1 - t)) / variance * (x - t * cond)


def density(x, mean):
    values = torch.distributions.Normal(torch.as_tensor(mean, dtype=x.dtype), DEVIATION).log_prob(x)
    return values.sum((1, 2, 3))


@pytest.mark.parametrize("solver", ["ab3", "heun"])
def test_it_is_the_density_of_a_normal_distribution(solver):
    model, x = Normal(), MEAN + DEVIATION * initial_noise([1, 2, 3], (2, 3, 4)).double()
    found = ssmgen.log_likelihood(model, x, solver=solver, steps=100)
    torch.testing.assert_close(found, density(x, MEAN), rtol=2e-3, atol=2e-3)
    assert model.training


def test_conditions_change_it_and_images_stay_apart():
    model, x = Normal(), MEAN + DEVIATION * initial_noise([1, 2, 3], (2, 3, 4))
    mask = torch.stack([torch.full((3, 4), k) for k in (0, 1, 2)])
    found = ssmgen.log_likelihood(model, x, mask=mask, steps=60)
    torch.testing.assert_close(found, density(x, mask[:, None].float()), rtol=5e-3, atol=5e-3)
    alone = torch.cat([ssmgen.log_likelihood(model, x[i : i + 1], mask=mask[i : i + 1], steps=60) for i in range(3)])
    torch.testing.assert_close(found, alone)


def test_the_estimate_of_a_network_is_unbiased():
    """Against the exact divergence, from the whole Jacobian at each time."""
    torch.manual_seed(0)
    model = ssmgen.build("sisma-debug", in_channels=1, patch_size=1, dim=16, num_classes=3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    x, mask = torch.randn(1, 1, 2, 3), torch.tensor([[[0, 1, 2], [2, 1, 0]]])
    cond = model.eval().condition(mask)
    exact, state, steps = 0.0, x, 8
    for k in range(steps, 0, -1):  # Euler, from data to noise
        t = torch.tensor([k / steps])
        jacobian = torch.autograd.functional.jacobian(lambda x, t=t: model(x, t, cond=cond), state).view(6, 6)
        exact -= jacobian.trace().item() / steps
        state = state - model(state, t, cond=cond).detach() / steps
    exact += -(state.square() + math.log(2 * math.pi)).sum().item() / 2
    settings = {"solver": "euler", "steps": steps, "probes": 400}
    found = ssmgen.log_likelihood(model, x, mask=mask, **settings).item()
    assert abs(exact - found) < 0.1
    rough = [ssmgen.log_likelihood(model, x, mask=mask, solver="euler", steps=steps, seed=s).item() for s in range(3)]
    assert len(set(rough)) > 1  # of one probe each: the test would see a divergence that is left out
    assert rough[0] == ssmgen.log_likelihood(model, x, mask=mask, solver="euler", steps=steps).item()


class Coupled(nn.Module):
    """A velocity whose Jacobian ``c (|x|_1 I + x sign(x)') / n`` couples all values with the signs of x."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def condition(self, mask=None, size=None):
        return None

    def forward(self, x, t, *, cond=None):
        return 0.5 * x * x.abs().mean((1, 2, 3), keepdim=True)


def test_images_sampled_with_the_same_seeds_are_estimated_without_bias():
    """The probes are independent of the noise that an image was made from."""
    model, seeds, settings = Coupled(), list(range(64)), {"solver": "rk4", "steps": 5}
    images = ssmgen.sample(model, initial_noise(seeds, (1, 4, 8)), **settings)
    found = ssmgen.log_likelihood(model, images, seed=0, **settings)
    exact = ssmgen.log_likelihood(model, images, seed=10**6, probes=400, **settings)
    spread = (found - exact).std() / 64**0.5
    assert abs((found - exact).mean()) < 3 * spread, ((found - exact).mean(), spread)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_in_sixteen_bits_is_integrated_in_float32(dtype):
    torch.manual_seed(0)
    model = ssmgen.build("dit-debug", in_channels=1, num_classes=3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    x, mask = torch.randn(2, 1, 4, 6).bfloat16(), torch.randint(0, 3, (2, 4, 6))
    exact = ssmgen.log_likelihood(model, x.float(), mask=mask, steps=8)
    found = ssmgen.log_likelihood(in_dtype(model, torch.bfloat16), x.to(dtype), mask=mask, steps=8)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=2e-3, atol=0.02)


def test_data_move_to_the_device_of_the_model():
    assert ssmgen.log_likelihood(Normal().to("meta"), torch.zeros(2, 2, 3, 4), steps=2).device.type == "meta"


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"solver": "dopri5"}, ValueError, "a reversible solver of fixed steps, such as 'ab3', got 'dopri5'"),
        ({"solver": "euler-maruyama"}, ValueError, "a reversible solver"),
        ({"probes": 0}, ValueError, "probes must be at least 1, got 0"),
        ({"maks": torch.zeros(1, 2, 2)}, TypeError, "no 'maks'. Did you mean 'mask'"),
        ({"mask": torch.zeros(3, 3, 4)}, ValueError, "got 3 values for 2 images"),
    ],
)
def test_bad_settings_are_explained(given, error, message):
    with pytest.raises(error, match=message):
        ssmgen.log_likelihood(Normal(), torch.zeros(2, 2, 3, 4), **given)
    with pytest.raises(ValueError, match="data must be floating point"):
        ssmgen.log_likelihood(Normal(), torch.zeros(2, 3, 4))
