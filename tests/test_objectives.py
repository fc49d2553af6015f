"""Every registered objective against what it is defined by, and the loss of flow matching against its formula."""

import pytest
import torch

from ssmgen import build, names, sample
from ssmgen.data import loss_weights, mirrored_contrasts
from ssmgen.objectives import GaussianObjective, LinearPath, Path

OBJECTIVES = names("objective")
PATH = LinearPath()


def data(batch=4):
    return torch.randn(batch, 3, 8, 8)


def exact(objective, noise, data):
    """A model that knows noise and data."""
    return lambda x_t, t, **condition: objective.target(noise, data, t)


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    return build(request.param)


def test_paths_run_from_noise_to_data(objective):
    x1, x0, path = data(), data(), objective.path
    assert torch.equal(path.interpolate(x0, x1, torch.zeros(4)), x0)
    assert torch.equal(path.interpolate(x0, x1, torch.ones(4)), x1)
    t = torch.linspace(0.1, 0.9, 4, dtype=torch.float64).requires_grad_()
    for factor, rate in ((path.alpha, path.alpha_rate), (path.sigma, path.sigma_rate)):
        (slope,) = torch.autograd.grad(factor(t).sum(), t)
        torch.testing.assert_close(rate(t.detach()), slope)


def test_the_linear_path_is_a_straight_line():
    x1, x0 = data(), data()
    torch.testing.assert_close(PATH.interpolate(x0, x1, torch.full((4,), 0.5)), (x0 + x1) / 2)
    torch.testing.assert_close(PATH.velocity(x0, x1, torch.rand(4)), x1 - x0)


def test_loss_and_gradients_are_finite_at_both_ends(objective):
    model = build("sisma-debug")
    x, mask = data(), torch.zeros(4, 8, 8, dtype=torch.long)
    loss = objective.loss(model, x, t=torch.tensor([0.0, 0.3, 0.9, 1.0]), mask=mask)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert loss.isfinite() and gradients and all(g.isfinite().all() for g in gradients)
    assert any(g.any() for g in gradients)


def test_an_exact_prediction_has_no_loss_and_any_other_has_more(objective):
    x1, x0, t = data(), data(), torch.tensor([0.0, 0.2, 0.7, 1.0])
    model = exact(objective, x0, x1)
    assert objective.loss(model, x1, noise=x0, t=t) == 0
    worse = objective.loss(lambda *inputs: model(*inputs) + 0.1, x1, noise=x0, t=t)
    torch.testing.assert_close(worse, torch.tensor(0.01))


def test_an_exact_prediction_converts_to_the_velocity_and_the_data(objective):
    x1, x0, t = data(), data(), torch.tensor([0.06, 0.3, 0.7, 0.99])
    x_t, prediction = objective.path.interpolate(x0, x1, t), objective.target(x0, x1, t)
    torch.testing.assert_close(objective.velocity(prediction, x_t, t), x1 - x0, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(objective.data(prediction, x_t, t), x1, rtol=1e-3, atol=1e-4)
    single = objective.velocity(prediction, x_t, t[1])
    torch.testing.assert_close(single[1], (x1 - x0)[1], rtol=1e-3, atol=1e-4)


def test_a_single_time_on_the_cpu_converts_on_any_device(objective):
    x, t = torch.zeros(2, 3, 4, 4, device="meta"), torch.tensor(0.5)
    assert objective.velocity(x, x, t).device == objective.data(x, x, t).device == x.device


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_conversions_are_safe_at_the_ends(objective, t):
    """Where the prediction does not determine the other end of the line, that end is zero; else all is exact."""
    x1, x0, time = data(), data(), torch.tensor(t)
    x_t, prediction = objective.path.interpolate(x0, x1, time), objective.target(x0, x1, time)
    known_noise, known_data = (t, objective.prediction) != (1, "data"), (t, objective.prediction) != (0, "noise")
    velocity, found = objective.velocity(prediction, x_t, time), objective.data(prediction, x_t, time)
    torch.testing.assert_close(velocity, x1 * known_data - x0 * known_noise, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, x1 * known_data, rtol=1e-5, atol=1e-5)


def test_the_inputs_of_the_network_are_state_and_time(objective):
    seen = []

    def model(x, t):
        seen.append((x, t))
        return x

    x1, x0, t = data(), data(), torch.rand(4)
    objective.loss(model, x1, noise=x0, t=t)
    expected = objective.inputs(objective.path.interpolate(x0, x1, t), t)
    assert all(map(torch.equal, seen[0], expected))


class Best(torch.nn.Module):
    """The best network for data of independent pixels N(mean, std^2): its prediction has a closed form."""

    def __init__(self, objective, mean, std):
        super().__init__()
        self.objective, self.mean, self.std = objective, mean, std
        self.scale = torch.nn.Parameter(torch.ones(()))

    def condition(self, mask, size=None):
        return None

    def forward(self, x, t, cond=None):
        path = self.objective.path
        t = t.view(-1, 1, 1, 1)
        alpha, sigma = path.alpha(t), path.sigma(t)
        residual = (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        noise, found = sigma * residual, self.mean + alpha * self.std**2 * residual
        return self.scale * self.objective.target(noise, found, t.flatten())


@pytest.mark.parametrize("std", [0.0, 0.5])
def test_sampling_arrives_at_a_known_distribution(objective, std):
    x0 = torch.randn(2, 3, 16, 16)
    end = sample(Best(objective, 2.0, std), x0, objective=objective, solver="euler", steps=400)
    torch.testing.assert_close(end, 2.0 + std * x0, rtol=0.01, atol=0.02)


@pytest.mark.parametrize("scale", [0.9, 1.1])
def test_no_other_model_has_a_smaller_loss_than_the_best(objective, scale):
    best, x1 = Best(objective, 2.0, 0.5), 2 + 0.5 * torch.randn(64, 3, 16, 16)
    losses = []
    for factor in (1.0, scale):
        best.scale.data.fill_(factor)
        losses.append(objective.loss(best, x1, generator=torch.Generator().manual_seed(9)).item())
    assert losses[0] < losses[1]


@pytest.mark.parametrize("prediction", ["velocity", "v", "data", "noise"])
def test_the_velocity_weighting_measures_the_error_of_the_velocity(prediction):
    objective, reference = GaussianObjective(prediction=prediction, weighting="velocity"), build("flow-matching")
    x1, x0, t = data(), data(), torch.tensor([0.06, 0.3, 0.7, 0.95])

    def model(x, t):
        return x.sin()

    def as_velocity(x, t):
        return objective.velocity(model(x, t), x, t)

    expected = reference.loss(as_velocity, x1, noise=x0, t=t)
    torch.testing.assert_close(objective.loss(model, x1, noise=x0, t=t), expected, rtol=1e-3, atol=1e-4)


def test_v_is_that_of_salimans_and_ho():
    objective, x1, x0, t = build("v"), data(), data(), torch.rand(4)
    alpha, sigma = t.view(-1, 1, 1, 1), 1 - t.view(-1, 1, 1, 1)
    torch.testing.assert_close(objective.target(x0, x1, t), alpha * x0 - sigma * x1)


class Curved(Path):
    """alpha = t^2, sigma = 1 - t: no special case of anything."""

    def alpha(self, t):
        return t**2

    def sigma(self, t):
        return 1 - t

    def alpha_rate(self, t):
        return 2 * t

    def sigma_rate(self, t):
        return -torch.ones_like(t)


@pytest.mark.parametrize("prediction", ["velocity", "v", "data", "noise"])
def test_any_path_has_all_conversions(prediction):
    objective, x1, x0, t = GaussianObjective(Curved(), prediction), data(), data(), torch.tensor([0.3, 0.5, 0.7, 0.9])
    x_t, found = objective.path.interpolate(x0, x1, t), objective.target(x0, x1, t)
    slopes = t.view(-1, 1, 1, 1)
    torch.testing.assert_close(objective.velocity(found, x_t, t), 2 * slopes * x1 - x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(objective.data(found, x_t, t), x1, rtol=1e-4, atol=1e-4)


def test_loss_is_equation_3():
    objective, x1, x0, t = build("flow-matching"), data(), data(), torch.rand(4)
    model = lambda x, t: 2 * x + t.view(-1, 1, 1, 1)  # noqa: E731
    x_t = t.view(-1, 1, 1, 1) * x1 + (1 - t.view(-1, 1, 1, 1)) * x0
    expected = (2 * x_t + t.view(-1, 1, 1, 1) - (x1 - x0)).square().mean()
    assert torch.equal(objective.loss(model, x1, noise=x0, t=t), expected)


def test_the_condition_reaches_the_model(objective):
    seen = {}

    def model(x, t, **condition):
        seen.update(condition)
        return x

    objective.loss(model, data(), mask="m", style="s", weight=torch.ones(1, 1, 8, 8))
    assert seen == {"mask": "m", "style": "s"}


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
def test_times_have_their_distribution(sampling):
    t = build("flow-matching", t_sampling=sampling).sample_t(200_000, torch.device("cpu"))
    assert t.min() >= 0 and t.max() <= 1
    assert abs(t.mean() - 0.5) < 0.01
    # Share of the middle half: 1/2 if uniform; P(|z| < ln 3) = 0.728 if logit-normal.
    middle = ((t > 0.25) & (t < 0.75)).float().mean()
    assert abs(middle - {"uniform": 0.5, "logit-normal": 0.728}[sampling]) < 0.01


def test_a_generator_makes_the_loss_repeat(objective):
    x1 = data()
    model = lambda x, t: x * t.view(-1, 1, 1, 1)  # noqa: E731
    first, again, other = (
        objective.loss(model, x1, generator=torch.Generator().manual_seed(seed)).item() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_weight_multiplies_the_squared_error(objective):
    x1, x0, t, model = data(), data(), torch.rand(4), lambda x, t: x.sin()
    weight = torch.rand(4, 1, 8, 8)
    x_t = objective.path.interpolate(x0, x1, t)
    error = (model(x_t, t) - objective.target(x0, x1, t)).square()
    assert torch.equal(objective.loss(model, x1, noise=x0, t=t, weight=weight), (error * weight).mean())
    twice = objective.loss(model, x1, noise=x0, t=t, weight=torch.tensor(2.0))
    torch.testing.assert_close(twice, 2 * objective.loss(model, x1, noise=x0, t=t))
    each = torch.rand(4)  # one per example, and not along the width
    expected = (error * each.view(4, 1, 1, 1)).mean()
    torch.testing.assert_close(objective.loss(model, x1, noise=x0, t=t, weight=each), expected)
    for shape in ((2, 1, 8, 8), (8,), (4, 1, 4, 4), (1, 4, 1, 8, 8)):
        with pytest.raises(ValueError, match=r"weight must broadcast to data \(4, 3, 8, 8\), got "):
            objective.loss(model, x1, weight=torch.ones(shape))


@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_contrasts_are_linear_functions_of_the_error(prediction):
    objective = GaussianObjective(prediction=prediction, weighting="velocity")
    x1, x0, t, model = data(), data(), torch.rand(4), lambda x, t: x.sin()
    contrasts = torch.randn(4, 2, 8, 8)
    x_t = objective.path.interpolate(x0, x1, t)
    factor = objective._velocity_factor(t).view(4, 1, 1, 1).sqrt()
    error = (model(x_t, t) - objective.target(x0, x1, t)) * factor
    by_hand = sum((error * contrasts[:, m : m + 1]).sum(dim=(2, 3)).square() for m in range(2)).mean()
    plain = objective.loss(model, x1, noise=x0, t=t)
    torch.testing.assert_close(objective.loss(model, x1, noise=x0, t=t, contrasts=contrasts), plain + by_hand)
    with torch.autocast("cpu", torch.bfloat16):
        again = objective.loss(model, x1, noise=x0, t=t, contrasts=contrasts)
    torch.testing.assert_close(again, plain + by_hand, rtol=1e-5, atol=0), "nothing is rounded to 16 bits"
    none = objective.loss(model, x1, noise=x0, t=t, contrasts=contrasts[:, :0])
    assert torch.equal(none, plain)
    for shape in ((2, 1, 8, 8), (8, 8), (4, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"contrasts must be \(batch, m, height, width\) for data \(4, 3, 8, 8\)"):
            objective.loss(model, x1, contrasts=torch.ones(shape))


def test_a_mirrored_contrast_is_the_mean_of_the_left_minus_that_of_the_right():
    mask = torch.zeros(2, 16, 16, dtype=torch.uint8)
    mask[0, :2, :4], mask[0, 8:10, :2], mask[1, 4:6, 4:6], mask[1, 0, 0] = 1, 2, 1, 2  # the last one of a quarter cell
    contrasts = mirrored_contrasts(mask, [(1, 2), (3, 4)], (8, 8), weight=4.0)
    by_hand = torch.zeros(2, 2, 8, 8)
    by_hand[0, 0, 0, :2], by_hand[0, 0, 4, 0] = 2 * 0.5, 2 * -1.0
    torch.testing.assert_close(contrasts, by_hand)
    image = torch.rand(1, 1, 8, 8)
    found = (image * contrasts[:1, :1]).sum() / 2
    torch.testing.assert_close(found, image[0, 0, 0, :2].mean() - image[0, 0, 4, 0])
    assert mirrored_contrasts(mask, (), (8, 8)).shape == (2, 0, 8, 8)
    for bad in (torch.zeros(2, 8, 8), torch.zeros(8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"masks must be integer labels \(batch, H, W\), got "):
            mirrored_contrasts(bad, [(1, 2)], (8, 8))
    with pytest.raises(ValueError, match="weight must be a number from 0 on, got -1"):
        mirrored_contrasts(mask, [(1, 2)], (8, 8), weight=-1)


def test_class_weights_count_a_latent_as_its_heaviest_label():
    mask = torch.zeros(2, 16, 16, dtype=torch.uint8)
    mask[0, 0, 0] = 1  # one pixel of the first latent
    mask[1] = 2
    by_hand = torch.ones(2, 1, 8, 8)
    by_hand[0, 0, 0, 0], by_hand[1] = 3.0, 0.5
    assert torch.equal(loss_weights(mask, [1.0, 3.0, 0.5], (8, 8)), by_hand)


@pytest.mark.parametrize("side", [1, 4, 8, 12, 64])
def test_class_weights_take_masks_of_any_size(side):
    """Coarser than the latent, as fine, finer, and of a size that does not divide: a rare class counts where it is."""
    mask = torch.zeros(1, side, side, dtype=torch.int64)
    mask[0, 0, 0] = 1
    reached = -(-8 // side)  # latents along a side that the first label touches
    by_hand = torch.ones(1, 1, 8, 8)
    by_hand[..., :reached, :reached] = 3.0
    assert torch.equal(loss_weights(mask, [1.0, 3.0], (8, 8)), by_hand)


def test_class_weights_without_a_fitting_mask_are_explained():
    for bad, said in (
        (torch.zeros(4, 2, 8, 8), r"integer labels \(batch, H, W\), got torch.float32 \(4, 2, 8, 8\)"),
        (torch.zeros(0, 8, 8, dtype=torch.uint8), r"integer labels \(batch, H, W\), got torch.uint8 \(0, 8, 8\)"),
        (torch.full((4, 8, 8), -1), "there are 2 class_weights, but a mask has the label -1"),
        (torch.full((4, 8, 8), 2, dtype=torch.uint8), "there are 2 class_weights, but a mask has the label 2"),
    ):
        with pytest.raises(ValueError, match=said):
            loss_weights(bad, [1.0, 2.0], (8, 8))
    with pytest.raises(ValueError, match="class_weights must be positive"):
        loss_weights(torch.zeros(1, 8, 8).long(), [1.0, 0.0], (8, 8))


def test_a_misspelt_argument_is_answered_with_the_closest_name():
    def model(x, t, mask=None, *, cond=None):
        pytest.fail("the arguments are checked before the model runs")

    objective = build("flow-matching")
    known = "noise, t, generator, weight, contrasts, mask, cond"
    with pytest.raises(TypeError, match=f"loss takes no 'nois'. Did you mean 'noise'.*{known}"):
        objective.loss(model, data(), nois=data())
    with pytest.raises(TypeError, match="loss takes no 'masks'. Did you mean 'mask'"):
        objective.loss(torch.compile(build("sisma-debug")), data(), masks=torch.zeros(4, 8, 8).long())


def test_an_empty_batch_is_called_one():
    model = build("sisma-debug")
    for call in (
        lambda: build("flow-matching").loss(model, torch.zeros(0, 3, 8, 8), mask=torch.zeros(0, 8, 8).long()),
        lambda: model(torch.zeros(0, 3, 8, 8), torch.zeros(1), torch.zeros(1, 8, 8).long()),
        lambda: model.condition(torch.zeros(0, 8, 8).long()),
    ):
        with pytest.raises(ValueError, match="the batch is empty"):
            call()


def test_bad_arguments_are_explained():
    with pytest.raises(
        ValueError, match="t_sampling must be 'uniform' or 'logit-normal', got 'lognormal'.*'logit-normal'"
    ):
        build("flow-matching", t_sampling="lognormal")
    with pytest.raises(ValueError, match="prediction must be 'velocity', 'v', 'data' or 'noise', got 'nois'.*'noise'"):
        GaussianObjective(prediction="nois")
    with pytest.raises(ValueError, match="weighting must be 'uniform' or 'velocity', got 'snr'"):
        GaussianObjective(weighting="snr")
    with pytest.raises(ValueError, match="smallest must be positive, got 0"):
        build("eps", smallest=0)
    with pytest.raises(TypeError, match=r"data must be floating point.*got torch.uint8.*127.5"):
        build("flow-matching").loss(lambda x, t: x, torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="noise must be"):
        build("flow-matching").loss(lambda x, t: x, data(), noise=data(2))
    with pytest.raises(ValueError, match="and t"):
        build("flow-matching").loss(lambda x, t: x, data(), t=torch.rand(3))
