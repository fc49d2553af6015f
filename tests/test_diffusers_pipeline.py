"""diffusers' schedulers drive our models."""

import pytest
import torch

pytest.importorskip("diffusers", reason="needs ssmgen[latents]")

import diffusers

import ssmgen
from ssmgen import MaskToImage
from ssmgen.data import CELEBAMASK19, draw_face
from ssmgen.diffusers_pipeline import MaskToImagePipeline
from ssmgen.pipeline import Recipe

ARGS = {"in_channels": 3, "mask_scale": 1, "patch_size": 4, "mask_dropout": 0.1, "dim": 96}
MASK = draw_face(2, 32)[1]


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    model = ssmgen.build("sisma-debug", **ARGS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return MaskToImage(model, ssmgen.build("identity"), Recipe("sisma-debug", ARGS, "identity", 32, CELEBAMASK19))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_their_euler_is_our_euler(pipe, guidance_scale):
    theirs = MaskToImagePipeline(pipe)
    settings = {"guidance_scale": guidance_scale, "output_type": "latent"}
    found = theirs([MASK, MASK.flip(1)], num_inference_steps=7, **settings).images
    expected = pipe([MASK, MASK.flip(1)], steps=7, solver="euler", **settings)
    assert torch.allclose(found, expected, atol=1e-5) and expected.std() > 0.5


def test_their_heun_converges_to_where_ours_does(pipe):
    theirs = MaskToImagePipeline(pipe, diffusers.FlowMatchHeunDiscreteScheduler())
    found = theirs(MASK, num_inference_steps=60, output_type="latent").images
    expected = pipe(MASK, steps=100, solver="heun", output_type="latent")
    coarse = pipe(MASK, steps=2, solver="euler", output_type="latent")
    assert (found - expected).abs().max() < 0.25 * (coarse - expected).abs().max()


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
    with pytest.raises(ValueError, match=r"latents must be \(1, 3, 32, 32\), got \(2, 3, 32, 32\)"):
        theirs(MASK, latents=torch.cat([noise, noise]), **settings)


def test_a_scheduler_of_another_kind_is_refused(pipe):
    with pytest.raises(TypeError, match="DDIMScheduler is no flow-matching scheduler"):
        MaskToImagePipeline(pipe, diffusers.DDIMScheduler())
