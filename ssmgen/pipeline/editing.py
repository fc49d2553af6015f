"""Edit images with a `MaskToImage`: change a part of the mask, vary the details, interpolate between seeds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmgen.noise import checked_seed, image_seeds, initial_noise
from ssmgen.pipeline.checks import check_output_type, checked_sampling
from ssmgen.pipeline.mask_to_image import MaskToImage, to_output
from ssmgen.pipeline.values import divided_keywords, started
from ssmgen.registry import keywords, make
from ssmgen.sampling import SETTINGS, Sampling
from ssmgen.solvers import shifted_grid

STARTS = ("inversion", "noise")
_OPTIONS = ("output_type", "palette", "remap", "callback", "sampling")


def edit(
    pipe: MaskToImage,
    image: Any,
    mask: Any,
    new_mask: Any,
    *,
    region: Tensor | None = None,
    margin: int = 4,
    start: str = "noise",
    seed: int = 0,
    **options: Any,
) -> Any:
    """Redraw the region where the mask changes and keep the rest of the image.

    Outside the region, latents follow the objective's path to those of the image; inside, they follow the model, so
    both arrive together. Pixels outside the region are then copied from the image. Inside, the model starts from new
    noise or from the inversion of the image (the ODE solved backwards under the old mask). Inversion keeps a little
    more of the colours, takes twice the time, and resists a change of class. ``shared_noise`` concerns new noise alone,
    so an eye that is redrawn by itself does not take the colour of the other.

    Args:
        pipe: the pipeline that redraws.
        image: a path, a PIL image, or uint8 ``(3, height, width)``, of the model's size, or of the one of several sizes
            that suits the mask. For another one: ``edit(pipe.resized(size), ...)``.
        mask: the mask of the image, see `MaskToImage`.
        new_mask: the mask of the edited image.
        region: bool ``(height, width)``, where the image may change; where the masks differ if None.
        margin: pixels by which the region is widened.
        start: ``"noise"`` or ``"inversion"``, which samples without guidance.
        seed: seed of the new noise.
        **options: ``output_type`` (``"pil"``, ``"np"`` or ``"pt"``), ``palette`` and ``remap`` (of both masks),
            ``callback`` (also called in an inversion), ``sampling`` or single settings, and values of the model's other
            conditions, see `MaskToImage`.

    Returns:
        One image of the requested ``output_type``.

    Raises:
        ValueError: an invalid start, region or margin, equal masks without a region, or an inversion with a solver
            that is not reversible.
    """
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    check_output_type(options.get("output_type", "pil"), ("pil", "np", "pt"))
    given = _Options(pipe, edit, options, mask)
    pipe = given.pipe
    old = pipe.labels_of(mask, **given.orders)
    new = pipe.labels_of(new_mask, name="the new mask", **given.orders)
    noise = given.start(initial_noise([seed], pipe.latent_size), new)
    widened = _region(old, new, region, margin).to(pipe.device)
    if start == "inversion":
        _check_reversible(given.sampling)
    data = pipe.encode(image)
    if start == "inversion":
        backwards = shifted_grid(given.sampling.steps, given.sampling.shift).flip(0)
        noise = given.sample(data, old, times=backwards, guidance_scale=1.0)
    inside = F.interpolate(widened[None, None].float(), data.shape[-2:], mode="area") > 0
    latents = given.sample(noise, new, objective=_Kept(pipe.objective, inside, noise, data))
    return _paste(pipe, latents, image, widened, given.output_type)


def variations(
    pipe: MaskToImage,
    image: Any,
    mask: Any,
    *,
    strength: float = 0.5,
    seed: int = 0,
    num_images: int = 1,
    **options: Any,
) -> Any:
    """Generate images of the same mask near a given image, which is mixed with noise and resampled (SDEdit).

    Args:
        pipe, image, mask: see `edit`.
        strength: share of noise in (0, 1]; 1 ignores the image. Only the steps after it are taken.
        seed: seed of the first image; later images count up.
        num_images: number of images.
        **options: those of `edit`, with any ``output_type`` of `MaskToImage`.

    Raises:
        ValueError: ``strength`` outside (0, 1], or ``num_images`` below 1.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1], got {strength}")
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    given = _Options(pipe, variations, options, mask, num_images)
    pipe = given.pipe
    labels = pipe.labels_of(mask, **given.orders)
    noise = given.start(initial_noise(image_seeds(seed, num_images), pipe.latent_size), labels)
    grid = shifted_grid(given.sampling.steps, given.sampling.shift)
    first = 1 - strength
    data = pipe.encode(image)
    x = pipe.objective.path.interpolate(noise, data, torch.full((num_images,), first, device=pipe.device))
    latents = given.sample(x, labels, times=torch.cat([torch.tensor([first]), grid[grid > first]]))
    return to_output(latents if given.output_type == "latent" else pipe.decode(latents), given.output_type)


def interpolate(pipe: MaskToImage, mask: Any, seeds: tuple[int, int], count: int = 8, **settings: Any) -> Any:
    """Generate ``count`` images between those of two seeds by spherical interpolation (Shoemake 1985) of their noise.

    Args:
        pipe: the pipeline that samples.
        mask: one mask, see `MaskToImage`.
        seeds: seeds of the first and the last image.
        count: number of images, at least 2.
        **settings: those of a `MaskToImage` call, values of conditions too.

    Raises:
        ValueError: ``count`` below 2, or ``seeds`` that are not two different seeds.
    """
    known = [*keywords(interpolate), *keywords(MaskToImage.__call__), *SETTINGS]
    divided_keywords("interpolate", settings, known, pipe.sampler.conditions)
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    if not isinstance(seeds, Sequence) or len(seeds) != 2 or checked_seed(seeds[0]) == checked_seed(seeds[1]):
        raise ValueError(f"seeds must be two different ones, got {seeds}")
    orders = {name: settings.get(name, "") for name in ("palette", "remap")}
    pipe = pipe.resized(settings.pop("size", None)).fitted(mask, **orders)
    first, last = initial_noise(list(seeds), pipe.latent_size)
    angle = torch.acos(F.cosine_similarity(first.flatten(), last.flatten(), dim=0).clamp(-1, 1))
    parts = [torch.sin((1 - s) * angle) * first + torch.sin(s * angle) * last for s in torch.linspace(0, 1, count)]
    return pipe(mask, noise=torch.stack(parts) / torch.sin(angle), num_images=count, **settings)


class _Options:
    """The options of a `MaskToImage` call that `edit` and `variations` share, and sampling with them."""

    def __init__(
        self, pipe: MaskToImage, call: Callable[..., Any], options: Mapping[str, Any], mask: Any, images: int = 1
    ) -> None:
        known = [*keywords(call), *_OPTIONS, *SETTINGS]
        settings, told = divided_keywords(call.__name__, options, known, pipe.sampler.conditions)
        own = {name: settings.pop(name) for name in _OPTIONS if name in settings}
        self.output_type, self.callback = own.get("output_type", "pil"), own.get("callback")
        check_output_type(self.output_type)
        self.orders: dict[str, Any] = {name: own.get(name, "") for name in ("palette", "remap")}
        own_sampling, conditions = pipe.recipe.sampling, pipe.sampler.conditions
        self.settings = checked_sampling(own_sampling, own.get("sampling"), settings, told, conditions)
        self.sampling = self.settings.replaced(shared_noise=False)  # of x0, which `start` makes
        self.pipe = pipe.fitted(mask, **self.orders)
        self.values: dict[str, Any] = self.pipe.values_of(told, images, **self.orders)

    def start(self, noise: Tensor, labels: Tensor) -> Tensor:
        """The noise that images of one mask ``(height, width)`` start from, on the pipeline's device."""
        return started(noise, labels[None], self.settings, self.pipe.recipe.labels)[0].to(self.pipe.device)

    def sample(self, x: Tensor, labels: Tensor, objective: Any = None, **options: Any) -> Tensor:
        """Latents of one mask ``(height, width)``."""
        how = {"objective": objective or self.pipe.objective, "progress": self.callback, **options}
        return self.pipe.sampler(x, labels[None], self.sampling, **self.values, **how)


def _check_reversible(sampling: Sampling) -> None:
    solver = make(sampling.solver) if isinstance(sampling.solver, str) else sampling.solver
    if not solver.reversible:
        raise ValueError(
            f"start='inversion' integrates from data to noise, and solver={sampling.solver!r} is not reversible: give "
            "another, such as solver='ab3', or start='noise'"
        )


class _Kept:
    """An objective whose velocity outside the region is that of its path to the image."""

    def __init__(self, objective: Any, inside: Tensor, noise: Tensor, data: Tensor) -> None:
        self.objective, self.path, self.inputs = (
            objective,
            objective.path,
            getattr(objective, "inputs", lambda x, t: (x, t)),
        )
        self.inside, self.noise, self.data = inside, noise, data

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        drawn = self.objective.velocity(prediction, x_t, t)
        return torch.where(self.inside, drawn, self.path.velocity(self.noise, self.data, t))


def _region(old: Tensor, new: Tensor, region: Tensor | None, margin: int) -> Tensor:
    if margin < 0:
        raise ValueError(f"margin must be at least 0 pixels, got {margin}")
    changed = old != new if region is None else region
    if changed.shape != old.shape or changed.dtype != torch.bool:
        raise ValueError(f"region must be bool {tuple(old.shape)}, got {changed.dtype} {tuple(changed.shape)}")
    if not bool(changed.any()):
        raise ValueError("nothing to redraw: the masks are the same" if region is None else "the region is empty")
    side = 2 * margin + 1
    return F.max_pool2d(changed[None, None].float(), side, stride=1, padding=margin)[0, 0] > 0


def _paste(pipe: MaskToImage, latents: Tensor, image: Any, inside: Tensor, output_type: str) -> Any:
    """The image with the region replaced, blended over a few pixels inside its edge."""
    drawn, kept = pipe.decode(latents), pipe.pixels_of(image).to(latents.device).float() / 255
    weight = F.avg_pool2d(F.pad(inside[None, None].float(), (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    weight = torch.where(inside, weight, 0.0)
    return to_output(torch.lerp(kept, drawn, weight), output_type)
