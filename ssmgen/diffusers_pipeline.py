"""A `MaskToImage` behind the calls of a diffusers pipeline, driven by a diffusers scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmgen.extras import require
from ssmgen.pipeline import MaskToImage, listed, to_output
from ssmgen.sampling import initial_noise


@dataclass
class ImageOutput:
    """What a diffusers pipeline returns."""

    images: Any


class MaskToImagePipeline:
    """Call a `MaskToImage` as diffusers' pipelines are called.

        pipe = MaskToImagePipeline(MaskToImage.from_pretrained("folder"))
        pipe(mask, num_inference_steps=20, generator=torch.Generator().manual_seed(0)).images[0]

    diffusers' flow-matching schedulers count sigma from 1 at noise to 0 at data and predict ``noise - data``. Ours is
    t = 1 - sigma and the velocity data - noise: time and sign are turned here.

    Args:
        pipe: what makes the images.
        scheduler: a flow-matching scheduler of diffusers, such as ``FlowMatchEulerDiscreteScheduler``, which is the
            default, or ``FlowMatchHeunDiscreteScheduler``.

    Raises:
        TypeError: a scheduler of another kind; DDPM's and its like expect models that predict noise.
    """

    def __init__(self, pipe: MaskToImage, scheduler: Any = None) -> None:
        if scheduler is None:
            scheduler = require("diffusers", extra="latents").FlowMatchEulerDiscreteScheduler()
        if not type(scheduler).__name__.startswith("FlowMatch"):
            raise TypeError(
                f"{type(scheduler).__name__} is no flow-matching scheduler: give FlowMatchEulerDiscreteScheduler or "
                "another whose name begins with FlowMatch"
            )
        self.pipe = pipe
        self.scheduler = scheduler

    @property
    def components(self) -> dict[str, Any]:
        """Its parts by name."""
        return {"transformer": self.pipe.model, "vae": self.pipe.autoencoder, "scheduler": self.scheduler}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pipe.device

    def to(self, device: str | torch.device) -> MaskToImagePipeline:
        """Move it."""
        self.pipe.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        mask: Any,
        *,
        num_inference_steps: int = 24,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> ImageOutput | tuple[Any]:
        """Make images of a mask or a list of them.

        Args:
            mask: see `MaskToImage`.
            num_inference_steps: steps of the scheduler.
            guidance_scale: 1 is none.
            num_images_per_prompt: images of each mask.
            generator: where the noise is drawn from; its seed where None is 0.
            latents: the noise itself, ``(n, c, h, w)``.
            output_type: see `MaskToImage`.
            return_dict: False gives a tuple.
            callback_on_step_end: called with (self, step, timestep, {"latents": x}) after each step; the latents it
                returns are gone on with.

        Raises:
            ValueError: latents of another shape, or what `MaskToImage` refuses.
        """
        masks = torch.stack([self.pipe.labels_of(one) for one in listed(mask)])
        masks = masks.repeat_interleave(num_images_per_prompt, dim=0).to(self.device)
        x = self._noise(len(masks), generator, latents)
        size = (x.shape[2], x.shape[3])
        conds = [self.pipe.model.condition(masks)]
        if guidance_scale != 1:
            conds.append(self.pipe.model.condition(None, size=size))
        for step, timestep in enumerate(self._timesteps(num_inference_steps)):
            t = 1 - (timestep / self.scheduler.config.num_train_timesteps).to(x.dtype).reshape(1).to(self.device)
            with_mask, *null = (self.pipe.model(x, t, cond=cond) for cond in conds)
            velocity = null[0] + guidance_scale * (with_mask - null[0]) if null else with_mask
            x = self.scheduler.step(-velocity, timestep, x, return_dict=False)[0]
            if callback_on_step_end is not None:
                x = callback_on_step_end(self, step, timestep, {"latents": x}).get("latents", x)
        images = to_output(x if output_type == "latent" else self.pipe.decode(x), output_type)
        return ImageOutput(images) if return_dict else (images,)

    def _noise(self, count: int, generator: torch.Generator | None, latents: Tensor | None) -> Tensor:
        shape = (count, *self.pipe.latent_size)
        if latents is None:
            drawn = torch.randn(shape, generator=generator) if generator else initial_noise(range(count), shape[1:])
            return drawn.to(self.device)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}")
        return latents.to(self.device)

    def _timesteps(self, steps: int) -> Tensor:
        """Timesteps of a uniform grid where the scheduler takes one; its own grid otherwise."""
        try:
            self.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), device=self.device)
        except TypeError:
            self.scheduler.set_timesteps(steps, device=self.device)
        return self.scheduler.timesteps
