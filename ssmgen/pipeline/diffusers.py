"""A `MaskToImage` with the interface of a diffusers pipeline, and diffusers schedulers as solvers."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ssmgen.data.labels import LabelSet
from ssmgen.pipeline.mask_to_image import MaskToImage
from ssmgen.pipeline.values import divided_keywords
from ssmgen.registry import keywords
from ssmgen.solvers.base import Progress, Solver, Velocity

AfterStep = Callable[[int, Tensor, Tensor], Tensor]


@dataclass
class ImageOutput:
    """The output of a diffusers pipeline."""

    images: Any


class SchedulerSolver(Solver):
    """A flow-matching scheduler of diffusers as a solver: ``sample(..., solver=SchedulerSolver(scheduler))``.

    In diffusers, sigma falls from 1 at noise to 0 at data and the model predicts ``noise - data``. Here t = 1 - sigma
    and the velocity is data - noise, so time and sign are reversed. A scheduler that accepts a grid gets ours and
    applies its own shift to it; others take as many steps of their own grid.

    Each call copies the scheduler, which has state, so several threads may share it.

    Args:
        scheduler: ``FlowMatchEulerDiscreteScheduler``, ``FlowMatchHeunDiscreteScheduler``, or another such as
            ``UniPCMultistepScheduler`` or ``DPMSolverMultistepScheduler`` with ``use_flow_sigmas=True,
            prediction_type="flow_prediction"``.
        after_step: called as ``after_step(step, timestep, x)`` after each step, counted from 0; sampling continues
            with what it returns.
        mu: logarithm of the shift, for a scheduler with ``use_dynamic_shifting=True``; see `dynamic_shift`.

    Raises:
        TypeError: not a flow-matching scheduler; DDPM and similar ones expect models that predict noise.
        ValueError: a scheduler with dynamic shifting and no ``mu``.
    """

    order = 1

    def __init__(self, scheduler: Any, after_step: AfterStep | None = None, mu: float | None = None) -> None:
        check_scheduler(scheduler)
        if _is_dynamic(scheduler) and mu is None:
            raise ValueError(
                f"{type(scheduler).__name__} has use_dynamic_shifting=True and shifts by the number of tokens: give "
                "mu=dynamic_shift(scheduler, tokens), or create it without dynamic shifting"
            )
        self.scheduler = scheduler
        self.after_step = after_step
        self.mu = mu

    def nfe(self, steps: int) -> int:
        """One evaluation per timestep of the scheduler; a Heun scheduler has most timesteps twice."""
        return len(self.times(torch.linspace(0, 1, steps + 1)))

    def times(self, ts: Tensor) -> Tensor:
        """See `Solver`; ``(n + 1,)`` times to one per evaluation, ``(evaluations,)``."""
        return self._ready(ts)[1]

    def _ready(self, ts: Tensor) -> tuple[Any, Tensor]:
        """A copy of the scheduler, ready to start, and the times at which it evaluates the model."""
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
        # Timesteps may be rounded to whole numbers; schedulers step by their sigmas.
        times = (1 - scheduler.sigmas[: len(scheduler.timesteps)]).to(ts)
        if ts[-1] < ts[0] or abs(float(times[0] - ts[0])) > 0.01:
            raise ValueError(
                f"{type(scheduler).__name__} goes from {float(times[0]):g} to 1 and cannot follow times from "
                f"{float(ts[0]):g} to {float(ts[-1]):g}: use a solver of ssmgen"
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
    """Raise a TypeError for a scheduler of models that do not predict a velocity."""
    name = type(scheduler).__name__
    config = getattr(scheduler, "config", {})
    flow = config.get("use_flow_sigmas", False) and config.get("prediction_type") == "flow_prediction"
    if not name.startswith("FlowMatch") and not flow:
        raise TypeError(
            f"{name} is not a flow-matching scheduler: use FlowMatchEulerDiscreteScheduler, another whose name starts "
            'with FlowMatch, or one with use_flow_sigmas=True and prediction_type="flow_prediction"'
        )
    if config.get("invert_sigmas", False):
        raise TypeError(f"{name} has invert_sigmas=True, for models with reversed time: create it without")


def _is_dynamic(scheduler: Any) -> bool:
    return bool(getattr(scheduler, "config", {}).get("use_dynamic_shifting", False))


def dynamic_shift(scheduler: Any, tokens: int) -> float:
    """The ``mu`` of a scheduler with dynamic shifting for images of ``tokens`` tokens, as in diffusers' Flux pipeline.

    It rises linearly from ``base_shift`` at ``base_image_seq_len`` tokens to ``max_shift`` at ``max_image_seq_len``.
    Their defaults are 0.5, 256, 1.15 and 4096.
    """
    config = scheduler.config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low + (high - low) * (tokens - few) / (many - few))


class MaskToImagePipeline:
    """A `MaskToImage` that is called like a diffusers pipeline.

        pipe = MaskToImagePipeline.from_pretrained("folder")
        pipe(mask, num_inference_steps=20, generator=torch.Generator().manual_seed(0)).images[0]

    ``pipe.scheduler = UniPCMultistepScheduler.from_config(...)`` replaces the scheduler, as in diffusers. Several
    threads may call one pipeline.

    Args:
        pipe: the pipeline that generates the images.
        scheduler: see `SchedulerSolver`; ``FlowMatchEulerDiscreteScheduler()`` if None.

    Raises:
        TypeError: not a flow-matching scheduler.
    """

    def __init__(self, pipe: MaskToImage, scheduler: Any = None) -> None:
        if scheduler is None:
            import diffusers

            scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        check_scheduler(scheduler)
        self.pipe = pipe
        self.scheduler = scheduler

    @classmethod
    def from_pretrained(cls, source: str | Path, *, scheduler: Any = None, **settings: Any) -> Self:
        """Wrap ``MaskToImage.from_pretrained(source, **settings)``."""
        return cls(MaskToImage.from_pretrained(source, **settings), scheduler)

    @property
    def components(self) -> dict[str, Any]:
        """The parts of the pipeline by name."""
        return {"transformer": self.pipe.model, "vae": self.pipe.autoencoder, "scheduler": self.scheduler}

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return self.pipe.device

    def to(self, *where: Any, **named: Any) -> Self:
        """Set device or sampling dtype, see `MaskToImage.to`."""
        self.pipe.to(*where, **named)
        return self

    def __call__(
        self,
        mask: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Mapping[str, float] | None = None,
        guidance_start: float | Mapping[str, float] | None = None,
        shared_noise: bool | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        palette: str | LabelSet = "",
        remap: str | LabelSet = "",
        **values: Any,
    ) -> ImageOutput | tuple[Any]:
        """Generate images of a mask or a list of masks, all in one batch.

        Args:
            mask, palette, remap, output_type: see `MaskToImage`.
            height, width: of the images in pixels, both or neither; see `MaskToImage.resized`.
            num_inference_steps: steps of the scheduler; the recipe's if None.
            guidance_scale: 1 disables guidance; the recipe's if None. Or one scale by condition.
            guidance_start: t in [0, 1] at which guidance begins, or one by condition; the recipe's if None.
            shared_noise: see `ssmgen.Sampling`; it changes ``latents`` and drawn noise alike. The recipe's if None.
            num_images_per_prompt: images per mask.
            generator: source of the noise, one or one per image; if None, image i has seed i.
            latents: initial noise ``(n, c, h, w)``.
            return_dict: return an `ImageOutput`; a tuple if False.
            callback_on_step_end: called with (self, step, timestep, {"latents": x}) after each step; sampling
                continues with the latents it returns.
            **values: of the model's other conditions, see `MaskToImage.values_of`.

        Raises:
            TypeError, ValueError: see `SchedulerSolver` and `MaskToImage`; or not a generator.
        """
        self._check_names(values)
        count = num_images_per_prompt * (len(mask) if isinstance(mask, list | tuple) else 1)
        pipe = self._fitted(mask, height, width, {"palette": palette, "remap": remap})
        images = pipe(
            mask,
            steps=num_inference_steps,
            solver=self._solver(callback_on_step_end, pipe.latent_size),
            guidance_scale=guidance_scale,
            guidance_start=guidance_start,
            shared_noise=shared_noise,
            shift=1.0,  # the scheduler applies its own
            num_images=num_images_per_prompt,
            noise=self._drawn((count, *pipe.latent_size), generator) if latents is None else latents,
            output_type=output_type,
            palette=palette,
            remap=remap,
            batch_size=max(count, 1),
            **values,
        )
        return ImageOutput(images) if return_dict else (images,)

    def _check_names(self, values: Mapping[str, Any]) -> None:
        known = keywords(MaskToImagePipeline.__call__)
        divided_keywords("MaskToImagePipeline", values, known, self.pipe.sampler.conditions)

    def _fitted(self, mask: Any, height: int | None, width: int | None, orders: dict[str, Any]) -> MaskToImage:
        if (height is None) != (width is None):
            raise ValueError(f"give both height and width, or neither: got height={height} and width={width}")
        if height is not None and width is not None:
            return self.pipe.resized((height, width))
        first = mask[0] if isinstance(mask, list | tuple) and mask else mask
        return self.pipe.fitted(first, **orders)

    def _solver(self, callback: Any, latent_size: tuple[int, int, int]) -> SchedulerSolver:
        def after_step(step: int, timestep: Tensor, x: Tensor) -> Tensor:
            changed = callback(self, step, timestep, {"latents": x}) if callback else None
            return (changed or {}).get("latents", x)

        _, height, width = latent_size
        tokens = height * width // getattr(self.pipe.model, "patch_size", 1) ** 2
        mu = dynamic_shift(self.scheduler, tokens) if _is_dynamic(self.scheduler) else None
        return SchedulerSolver(self.scheduler, after_step, mu)

    def _drawn(
        self, shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None
    ) -> Tensor | None:
        if generator is None:
            return None
        from diffusers.utils.torch_utils import randn_tensor

        for one in generator if isinstance(generator, list) else [generator]:
            if not isinstance(one, torch.Generator):
                wanted = "a torch.Generator, such as torch.Generator().manual_seed(0), or a list of them"
                raise TypeError(f"generator must be {wanted}, got {one!r}")
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"give one generator or one per image: got {len(generator)} for {shape[0]} image(s)")
        return randn_tensor(shape, generator=generator, device=self.device)
