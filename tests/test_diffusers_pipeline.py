"""diffusers' schedulers drive our models."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import diffusers
import pytest
import torch
from pipelines import random_pipe

import ssmgen
from ssmgen import MaskToImage, initial_noise
from ssmgen.data import BISENET19, CELEBAMASK19, draw_face, remap
from ssmgen.noise import shared_noise
from ssmgen.pipeline import MaskToImagePipeline, SchedulerSolver, dynamic_shift

MASK = draw_face(2, 32)[1]


@pytest.fixture(scope="module")
def pipe():
    return random_pipe()


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_their_euler_is_our_euler(pipe, guidance_scale):
    theirs = MaskToImagePipeline(pipe)
    settings = {"guidance_scale": guidance_scale, "output_type": "latent"}
    found = theirs([MASK, MASK.flip(1)], num_inference_steps=7, **settings).images
    expected = pipe([MASK, MASK.flip(1)], steps=7, solver="euler", **settings)
    assert torch.allclose(found, expected, atol=1e-5) and expected.std() > 0.5


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
OTHERS = {
    "heun": diffusers.FlowMatchHeunDiscreteScheduler(),
    "unipc": diffusers.UniPCMultistepScheduler(**FLOW),
    "dpm": diffusers.DPMSolverMultistepScheduler(**FLOW),
    "deis": diffusers.DEISMultistepScheduler(**FLOW),
    "shifted-euler": diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_their_schedulers_converge_to_where_ours_do(pipe, name):
    found = MaskToImagePipeline(pipe, OTHERS[name])(MASK, num_inference_steps=60, output_type="latent").images
    expected = pipe(MASK, steps=100, solver="heun", output_type="latent")
    coarse = pipe(MASK, steps=2, solver="euler", output_type="latent")
    assert (found - expected).abs().max() < 0.25 * (coarse - expected).abs().max()


def test_a_scheduler_is_a_solver_anywhere(pipe):
    """With another time grid, in batches, and with as many evaluations as it says."""
    solver = SchedulerSolver(diffusers.FlowMatchEulerDiscreteScheduler())
    settings = {"steps": 5, "shift": 0.5, "num_images": 3, "output_type": "latent"}
    found = pipe(MASK, solver=solver, batch_size=2, **settings)
    assert torch.allclose(found, pipe(MASK, solver="euler", **settings), atol=1e-5)
    assert solver.nfe(5) == 5 and solver.evaluations == 5
    assert SchedulerSolver(OTHERS["heun"]).nfe(5) == 9


def test_settings_left_out_are_those_of_the_model(pipe):
    recipe = replace(pipe.recipe, sampling={"solver": "heun", "steps": 5, "guidance_scale": 2.0, "shift": 3.0})
    theirs = MaskToImagePipeline(MaskToImage(pipe.model, pipe.autoencoder, recipe))
    found = theirs(MASK, output_type="latent").images
    expected = pipe(MASK, steps=5, solver="euler", guidance_scale=2.0, shift=1.0, output_type="latent")
    assert torch.allclose(found, expected, atol=1e-5)


def test_guidance_starts_where_it_is_told_to(pipe):
    settings = {"guidance_scale": 200.0, "guidance_start": 0.5, "output_type": "latent"}
    found = MaskToImagePipeline(pipe)(MASK, num_inference_steps=5, **settings).images
    expected = pipe(MASK, steps=5, solver="euler", **settings)
    throughout = pipe(MASK, steps=5, solver="euler", guidance_scale=200.0, output_type="latent")
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(expected, throughout, atol=1e-3)


def test_weights_in_bfloat16_and_masks_of_another_order(pipe):
    theirs = MaskToImagePipeline(MaskToImage(pipe.model, pipe.autoencoder, pipe.recipe))
    plain = theirs(MASK, num_inference_steps=3, output_type="pt").images
    renamed = remap(MASK, CELEBAMASK19, BISENET19)
    assert torch.equal(theirs(renamed, num_inference_steps=3, remap="bisenet19", output_type="pt").images, plain)
    half = theirs.to(torch.bfloat16)(MASK, num_inference_steps=3, output_type="pt").images
    assert 0 < (half - plain).abs().max() < 0.1


def test_it_is_loaded_as_a_pipeline_is(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    theirs = MaskToImagePipeline.from_pretrained(tmp_path)
    theirs.scheduler = diffusers.FlowMatchHeunDiscreteScheduler.from_config(theirs.scheduler.config)
    assert len(theirs([MASK, MASK], num_inference_steps=2).images) == 2
    theirs.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(TypeError, match="DDIMScheduler is not a flow-matching scheduler"):
        theirs(MASK)


def test_it_is_called_as_a_pipeline_is(pipe):
    theirs = MaskToImagePipeline(pipe).to("cpu")
    seen = []

    def watch(pipeline, step, timestep, tensors):
        seen.append((step, float(timestep), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    generator = torch.Generator().manual_seed(3)
    (images,) = theirs(
        MASK,
        num_inference_steps=4,
        num_images_per_prompt=2,
        generator=generator,
        return_dict=False,
        callback_on_step_end=watch,
    )
    assert [step for step, *_ in seen] == [0, 1, 2, 3] and seen[0][1] == 1000 and seen[0][2] == (2, 3, 32, 32)
    assert len(images) == 2 and images[0].getextrema() == ((128, 128),) * 3, "the callback made them grey"
    assert theirs.components["transformer"] is pipe.model and theirs.device.type == "cpu"


def test_noise_comes_from_generator_or_latents(pipe):
    theirs = MaskToImagePipeline(pipe)
    settings = {"num_inference_steps": 2, "output_type": "latent"}
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    a = theirs(MASK, generator=torch.Generator().manual_seed(5), **settings).images
    assert torch.equal(a, theirs(MASK, latents=noise, **settings).images)
    assert not torch.equal(a, theirs(MASK, **settings).images)
    two = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    each = theirs(MASK, num_images_per_prompt=2, generator=two, **settings).images
    assert torch.allclose(each[:1], a, atol=1e-5) and not torch.allclose(each[1:], a, atol=0.1)
    assert torch.equal(
        theirs(MASK, **settings).images, theirs(MASK, latents=initial_noise([0], (3, 32, 32)), **settings).images
    )
    shared = theirs(MASK, latents=noise, shared_noise=True, **settings).images
    start = shared_noise(noise, MASK[None], CELEBAMASK19.mirrored)
    assert torch.equal(shared, theirs(MASK, latents=start, **settings).images) and not torch.equal(shared, a)
    with pytest.raises(ValueError, match=r"noise must be \(1, 3, 32, 32\), .* got \(2, 3, 32, 32\)"):
        theirs(MASK, latents=torch.cat([noise, noise]), **settings)
    with pytest.raises(ValueError, match="one per image: got 2 for 1 image"):
        theirs(MASK, generator=two, **settings)


@pytest.mark.parametrize("name", ["euler", "heun", "unipc"])
def test_several_threads_share_a_pipeline(pipe, name):
    """A scheduler keeps the step it is at; each call has one of its own."""
    theirs = MaskToImagePipeline(pipe, OTHERS.get(name))
    shared = SchedulerSolver(theirs.scheduler)

    def make(i):
        ours = pipe(MASK, steps=2 + i, solver=shared, seed=i, output_type="latent")
        found = theirs(MASK, num_inference_steps=2 + i, latents=initial_noise([i], (3, 32, 32)), output_type="latent")
        return torch.cat([ours, found.images])

    before = theirs.scheduler.timesteps.clone()
    serial = [make(i) for i in range(6)]
    with ThreadPoolExecutor(6) as threads:
        for found, expected in zip(threads.map(make, range(6)), serial, strict=True):
            assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(theirs.scheduler.timesteps, before)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.2, max_shift=0.9),
        diffusers.UniPCMultistepScheduler(**FLOW, use_dynamic_shifting=True, time_shift_type="exponential"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_dynamic_shifting_goes_by_the_number_of_tokens(pipe, scheduler):
    """64 tokens of 4 x 4 pixels; mu is the logarithm of a shift."""
    mu = dynamic_shift(scheduler, 64)
    low, high = (0.2, 0.9) if "base_shift" in scheduler.config else (0.5, 1.15)
    assert mu == pytest.approx(low - (high - low) * 192 / 3840)
    found = MaskToImagePipeline(pipe, scheduler)(MASK, num_inference_steps=5, output_type="latent").images
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        expected = pipe(MASK, steps=5, solver="euler", shift=float(torch.tensor(mu).exp()), output_type="latent")
        times = SchedulerSolver(scheduler, mu=mu).times(torch.linspace(0, 1, 6))
        assert torch.allclose(times, ssmgen.solvers.shifted_grid(5, float(torch.tensor(mu).exp()))[:-1], atol=1e-4)
        assert torch.allclose(found, expected, atol=1e-4)
    with pytest.raises(ValueError, match="use_dynamic_shifting=True .* give mu=dynamic_shift"):
        SchedulerSolver(scheduler)


def test_calls_that_cannot_be_are_explained(pipe):
    theirs = MaskToImagePipeline(pipe)
    for settings, message in (
        ({"generator": 3}, "generator must be a torch.Generator, .* or a list of them, got 3"),
        ({"num_inference_step": 3}, "MaskToImagePipeline takes no 'num_inference_step'. Did you mean 'num_inference_s"),
    ):
        with pytest.raises(TypeError, match=message):
            theirs(MASK, **settings)


def test_a_scheduler_of_another_kind_is_refused(pipe):
    with pytest.raises(TypeError, match="DDIMScheduler is not a flow-matching scheduler"):
        MaskToImagePipeline(pipe, diffusers.DDIMScheduler())
    with pytest.raises(TypeError, match="UniPCMultistepScheduler is not a flow-.*use_flow_sigmas=True"):
        MaskToImagePipeline(pipe, diffusers.UniPCMultistepScheduler())
    with pytest.raises(TypeError, match="invert_sigmas"):
        MaskToImagePipeline(pipe, diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


@pytest.mark.parametrize("scheduler", ["FlowMatchHeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_grid_that_a_scheduler_cannot_follow_is_refused(pipe, scheduler):
    solver = SchedulerSolver(getattr(diffusers, scheduler)())
    with pytest.raises(ValueError, match=f"{scheduler} goes from .* to 1 and cannot follow times from 1 to 0"):
        pipe.sampler(torch.zeros(1, 3, 32, 32), MASK[None], solver=solver, times=torch.linspace(1, 0, 5))
    half = torch.linspace(0.5, 1, 5)
    if scheduler.startswith("FlowMatchHeun"):  # begins at the noise whatever it is given
        with pytest.raises(ValueError, match="cannot follow times from 0.5 to 1"):
            solver.times(half)
    else:
        assert torch.allclose(solver.times(half), half[:-1], atol=1e-3)
