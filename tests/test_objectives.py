import pytest
import torch

from ssmgen import build


def data(batch=4):
    return torch.randn(batch, 3, 8, 8)


def test_interpolant_runs_from_noise_to_data():
    objective, x1, x0 = build("flow-matching"), data(), data()
    assert torch.equal(objective.interpolate(x0, x1, torch.zeros(4)), x0)
    assert torch.equal(objective.interpolate(x0, x1, torch.ones(4)), x1)
    half = objective.interpolate(x0, x1, torch.full((4,), 0.5))
    torch.testing.assert_close(half, (x0 + x1) / 2)


def test_an_exact_model_has_no_loss_and_its_velocity_reaches_the_data():
    objective, x1, x0 = build("flow-matching"), data(), data()
    exact = lambda x, t, mask: x1 - x0  # noqa: E731
    assert objective.loss(exact, x1, noise=x0, mask=None).item() == 0
    velocity = objective.velocity(exact(x0, None, None), x0, torch.zeros(4))
    torch.testing.assert_close(x0 + velocity, x1)


def test_loss_is_equation_3():
    objective, x1, x0, t = build("flow-matching"), data(), data(), torch.rand(4)
    model = lambda x, t: 2 * x + t.view(-1, 1, 1, 1)  # noqa: E731
    x_t = t.view(-1, 1, 1, 1) * x1 + (1 - t.view(-1, 1, 1, 1)) * x0
    expected = (2 * x_t + t.view(-1, 1, 1, 1) - (x1 - x0)).square().mean()
    torch.testing.assert_close(objective.loss(model, x1, noise=x0, t=t), expected)


def test_the_condition_reaches_the_model():
    seen = {}

    def model(x, t, **condition):
        seen.update(condition)
        return x

    build("flow-matching").loss(model, data(), mask="m", style="s")
    assert seen == {"mask": "m", "style": "s"}


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
def test_times_have_their_distribution(sampling):
    t = build("flow-matching", t_sampling=sampling).sample_t(200_000, torch.device("cpu"))
    assert t.min() >= 0 and t.max() <= 1
    assert abs(t.mean() - 0.5) < 0.01
    # Share of the middle half: 1/2 if uniform; P(|z| < ln 3) = 0.728 if logit-normal.
    middle = ((t > 0.25) & (t < 0.75)).float().mean()
    assert abs(middle - {"uniform": 0.5, "logit-normal": 0.728}[sampling]) < 0.01


def test_a_generator_makes_the_loss_repeat():
    objective, x1 = build("flow-matching"), data()
    model = lambda x, t: x * t.view(-1, 1, 1, 1)  # noqa: E731
    first, again, other = (
        objective.loss(model, x1, generator=torch.Generator().manual_seed(seed)).item() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_class_weights_count_a_latent_as_its_heaviest_label():
    weights = [1.0, 3.0, 0.5]
    objective = build("flow-matching", class_weights=weights)
    x1, noise = data(2), torch.zeros_like(data(2))
    height, width = x1.shape[-2:]
    mask = torch.zeros(2, 2 * height, 2 * width, dtype=torch.uint8)
    mask[0, 0, 0] = 1  # one pixel of the first latent
    mask[1] = 2
    found = objective.loss(lambda x, t, mask: torch.zeros_like(x), x1, noise, torch.rand(2), mask=mask)
    by_hand = torch.ones(2, 1, height, width)
    by_hand[0, 0, 0, 0], by_hand[1] = 3.0, 0.5
    assert torch.isclose(found, (x1.square() * by_hand).mean())
    alike = build("flow-matching", class_weights=[1.0, 1.0, 1.0]), build("flow-matching")
    losses = [o.loss(lambda x, t, mask: x, x1, noise, torch.full((2,), 0.5), mask=mask) for o in alike]
    assert torch.isclose(*losses)


@pytest.mark.parametrize("side", [1, 4, 8, 12, 64])
def test_class_weights_take_masks_of_any_size(side):
    """Coarser than the latent, as fine, finer, and of a size that does not divide: a rare class counts where it is."""
    objective, x1 = build("flow-matching", class_weights=[1.0, 3.0]), data()
    mask = torch.zeros(1, side, side, dtype=torch.int64)
    mask[0, 0, 0] = 1
    found = objective.loss(lambda x, t, mask: torch.zeros_like(x), x1, torch.zeros_like(x1), torch.rand(4), mask=mask)
    reached = -(-8 // side)  # latents along a side that the first label touches
    by_hand = torch.ones(8, 8)
    by_hand[:reached, :reached] = 3.0
    assert torch.isclose(found, (x1.square() * by_hand).mean())


def test_a_misspelt_argument_is_answered_with_the_closest_name():
    def model(x, t, mask=None, *, cond=None):
        pytest.fail("the model has worked for a loss that cannot be")

    objective = build("flow-matching")
    with pytest.raises(TypeError, match="loss takes no 'nois'. Did you mean 'noise'.*noise, t, generator, mask, cond"):
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


def test_class_weights_without_a_fitting_mask_are_explained():
    objective = build("flow-matching", class_weights=[1.0, 2.0])

    def model(x, t, mask=None):
        pytest.fail("the model has worked for a loss that cannot be")

    for bad, said in (
        (None, "got None"),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), r"labels \(4, H, W\) or \(1, H, W\); got torch.uint8 \(2, 3, 3\)"),
        (torch.zeros(4, 2, 8, 8), r"got torch.float32 \(4, 2, 8, 8\)"),
        (torch.full((4, 8, 8), -1), "there are 2 class_weights, and the mask has a label -1"),
    ):
        with pytest.raises(ValueError, match=said):
            objective.loss(model, data(), mask=bad)
    with pytest.raises(ValueError, match="there are 2 class_weights, and the mask has a label 2"):
        objective.loss(model, data(), mask=torch.full((len(data()), *data().shape[-2:]), 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="class_weights must be positive"):
        build("flow-matching", class_weights=[1.0, 0.0])


def test_bad_arguments_are_explained():
    with pytest.raises(
        ValueError, match="t_sampling must be 'uniform' or 'logit-normal', got 'lognormal'.*'logit-normal'"
    ):
        build("flow-matching", t_sampling="lognormal")
    with pytest.raises(TypeError, match=r"data must be floating point.*got torch.uint8.*127.5"):
        build("flow-matching").loss(lambda x, t: x, torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="noise must be"):
        build("flow-matching").loss(lambda x, t: x, data(), noise=data(2))
    with pytest.raises(ValueError, match="and t"):
        build("flow-matching").loss(lambda x, t: x, data(), t=torch.rand(3))
