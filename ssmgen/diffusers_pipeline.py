"""A `MaskToImage` behind the calls of a diffusers pipeline, driven by a diffusers scheduler."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmgen.data.labels import LabelSet
from ssmgen.pipeline import MaskToImage
from ssmgen.registry import explained
from ssmgen.solvers.base import Progress, Solver, Velocity


@dataclass
class ImageOutput:
    """What a diffusers pipeline returns."""

    images: Any


class SchedulerSolver(Solver):
    """A flow-matching scheduler of diffusers as a solver of ours: ``sample(..., solver=SchedulerSolver(scheduler))``.

    diffusers counts sigma from 1 at noise to 0 at data and has the model predict ``noise - data``. Ours is t = 1 -
    sigma and the velocity data - noise: time and sign are turned here. A scheduler that takes a grid gets ours, and
    moves it by its own shift; the others take as many steps of their own.

    A scheduler keeps the step it is at, so each call works with a copy of its own: the scheduler given stays as it is,
    and several threads may share it.

    Args:
        scheduler: ``FlowMatchEulerDiscreteScheduler``, ``FlowMatchHeunDiscreteScheduler``, or one like
            ``UniPCMultistepScheduler`` or ``DPMSolverMultistepScheduler`` made with ``use_flow_sigmas=True,
            prediction_type="flow_prediction"``.
        after_step: called as ``after_step(step, timestep, x)`` after each step, from 0; what it returns is gone on
            with.
        mu: the logarithm of the shift, for a scheduler with ``use_dynamic_shifting=True``; see `dynamic_shift`.

    Raises:
        TypeError: a scheduler of another kind; DDPM's and its like expect models that predict noise.
        ValueError: a scheduler with dynamic shifting without ``mu``.
    """

    order = 1

    def __init__(
        self,
        scheduler: Any,
        after_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
        mu: float | None = None,
    ) -> None:
        check_scheduler(scheduler)
        if _is_dynamic(scheduler) and mu is None:
            raise ValueError(
                f"{type(scheduler).__name__} has use_dynamic_shifting=True and shifts by the number of tokens: give "
                "mu=dynamic_shift(scheduler, tokens), or make it without dynamic shifting"
            )
        self.scheduler = scheduler
        self.after_step = after_step
        self.mu = mu

    def nfe(self, steps: int) -> int:
        """One at each of the scheduler's timesteps: a Heun scheduler has two of most."""
        return len(self._ready(torch.linspace(0, 1, steps + 1))[1])

    def times(self, ts: Tensor) -> Tensor:
        """See `Solver`."""
        return self._ready(ts)[1]

    def _ready(self, ts: Tensor) -> tuple[Any, Tensor]:
        """A copy of the scheduler, set to begin, and the times at which it will ask."""
        scheduler = copy.deepcopy(self.scheduler)
        arguments: dict[str, Any] = {"device": ts.device}
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            arguments["sigmas"] = (1 - ts[:-1]).cpu().numpy()
        else:
            arguments["num_inference_steps"] = len(ts) - 1
        if _is_dynamic(scheduler):
            arguments["mu"] = self.mu
        scheduler.set_timesteps(**arguments)
        scheduler.set_begin_index(0)
        # Their timesteps may be rounded to whole numbers; the sigmas are what they step by.
        times = (1 - scheduler.sigmas[: len(scheduler.timesteps)]).to(ts)
        if ts[-1] < ts[0] or abs(float(times[0] - ts[0])) > 0.01:
            raise ValueError(
                f"{type(scheduler).__name__} goes from {float(times[0]):g} to 1 and cannot follow times from "
                f"{float(ts[0]):g} to {float(ts[-1]):g}: take a solver of ssmgen"
            )
        return scheduler, times

    def _integrate(self, f: Velocity, x0: Tensor, ts: Tensor, progress: Progress | None) -> Tensor:
        x = x0
        scheduler, times = self._ready(ts)
        for step, (t, timestep) in enumerate(zip(times, scheduler.timesteps, strict=True)):
            x = scheduler.step(-f(t, x), timestep, x, return_dict=False)[0]
            if self.after_step is not None:
                x = self.after_step(step, timestep, x)
            if progress is not None:
                progress(step + 1, x)
        return x


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler whose model is not to predict a velocity.

    Raises:
        TypeError: names it.
    """
    name = type(scheduler).__name__
    config = getattr(scheduler, "config", {})
    flow = config.get("use_flow_sigmas", False) and config.get("prediction_type") == "flow_prediction"
    if not name.startswith("FlowMatch") and not flow:
        raise TypeError(
            f"{name} is no flow-matching scheduler: give FlowMatchEulerDiscreteScheduler, another whose name begins "
            'with FlowMatch, or one made with use_flow_sigmas=True and prediction_type="flow_prediction"'
        )
    if config.get("invert_sigmas", False):
        raise TypeError(f"{name} has invert_sigmas=True, for models whose time runs the other way; make it without")


def _is_dynamic(scheduler: Any) -> bool:
    return bool(getattr(scheduler, "config", {}).get("use_dynamic_shifting", False))


def dynamic_shift(scheduler: Any, tokens: int) -> float:
    """The ``mu`` of a scheduler with dynamic shifting for images of so many tokens, as diffusers' Flux pipeline has it.

    It rises on a straight line from ``base_shift`` at ``base_image_seq_len`` tokens to ``max_shift`` at
    ``max_image_seq_len``; where a scheduler's configuration lacks them, they are 0.5, 256, 1.15 and 4096.
    """
    config = scheduler.config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low + (high - low) * (tokens - few) / (many - few))


class MaskToImagePipeline:
    """Call a `MaskToImage` as diffusers' pipelines are called.

        pipe = MaskToImagePipeline.from_pretrained("folder")
        pipe(mask, num_inference_steps=20, generator=torch.Generator().manual_seed(0)).images[0]

    ``pipe.scheduler = UniPCMultistepScheduler.from_config(...)`` replaces the scheduler, as in diffusers. Each call
    works with a copy of it, so several threads may call one pipeline.

    Args:
        pipe: what makes the images.
        scheduler: see `SchedulerSolver`; ``FlowMatchEulerDiscreteScheduler()`` where None.

    Raises:
        TypeError: a scheduler of another kind.
    """

    def __init__(self, pipe: MaskToImage, scheduler: Any = None) -> None:
        if scheduler is None:
            import diffusers

            scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        check_scheduler(scheduler)
        self.pipe = pipe
        self.scheduler = scheduler

    @classmethod
    def from_pretrained(cls, source: str | Path, *, scheduler: Any = None, **settings: Any) -> MaskToImagePipeline:
        """``MaskToImage.from_pretrained(source, **settings)`` behind these calls."""
        return cls(MaskToImage.from_pretrained(source, **settings), scheduler)

    @property
    def components(self) -> dict[str, Any]:
        """Its parts by name."""
        return {"transformer": self.pipe.model, "vae": self.pipe.autoencoder, "scheduler": self.scheduler}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pipe.device

    def to(self, *where: Any, **named: Any) -> MaskToImagePipeline:
        """Move it, or set what it samples in, see `MaskToImage.to`."""
        self.pipe.to(*where, **named)
        return self

    @explained()
    def __call__(
        self,
        mask: Any,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_start: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        palette: str | LabelSet = "",
        remap: str | LabelSet = "",
    ) -> ImageOutput | tuple[Any]:
        """Make images of a mask or a list of them, all in one batch.

        Args:
            mask, palette, remap: see `MaskToImage`.
            num_inference_steps: steps of the scheduler; the model's own where None.
            guidance_scale: 1 is none; the model's own where None.
            guidance_start: from which t on guidance acts, in [0, 1]; the model's own where None.
            num_images_per_prompt: images of each mask.
            generator: where the noise is drawn from, or one for each image; where None, image i has seed i.
            latents: the noise itself, ``(n, c, h, w)``.
            output_type: see `MaskToImage`.
            return_dict: False gives a tuple.
            callback_on_step_end: called with (self, step, timestep, {"latents": x}) after each step; the latents it
                returns are gone on with.

        Raises:
            TypeError: the scheduler is of another kind, or a generator is none.
            ValueError: latents of another shape, or what `MaskToImage` refuses.
        """

        def after_step(step: int, timestep: Tensor, x: Tensor) -> Tensor:
            if callback_on_step_end is None:
                return x
            return (callback_on_step_end(self, step, timestep, {"latents": x}) or {}).get("latents", x)

        count = num_images_per_prompt * (len(mask) if isinstance(mask, list | tuple) else 1)
        images = self.pipe(
            mask,
            steps=num_inference_steps,
            solver=self._solver(after_step),
            guidance_scale=guidance_scale,
            guidance_start=guidance_start,
            shift=1.0,  # the scheduler's own is the one that counts
            num_images=num_images_per_prompt,
            noise=self._drawn(count, generator) if latents is None else latents,
            output_type=output_type,
            palette=palette,
            remap=remap,
            batch_size=max(count, 1),
        )
        return ImageOutput(images) if return_dict else (images,)

    def _solver(self, after_step: Callable[[int, Tensor, Tensor], Tensor]) -> SchedulerSolver:
        _, height, width = self.pipe.latent_size
        tokens = height * width // getattr(self.pipe.model, "patch_size", 1) ** 2
        mu = dynamic_shift(self.scheduler, tokens) if _is_dynamic(self.scheduler) else None
        return SchedulerSolver(self.scheduler, after_step, mu)

    def _drawn(self, count: int, generator: torch.Generator | list[torch.Generator] | None) -> Tensor | None:
        if generator is None:
            return None
        from diffusers.utils.torch_utils import randn_tensor

        for one in generator if isinstance(generator, list) else [generator]:
            if not isinstance(one, torch.Generator):
                raise TypeError(
                    "generator is a torch.Generator, such as torch.Generator().manual_seed(0), or a list of them, got "
                    f"{one!r}"
                )
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"give one generator, or one per image: got {len(generator)} for {count} image(s)")
        drawn: Tensor = randn_tensor((count, *self.pipe.latent_size), generator=generator, device=self.device)
        return drawn
