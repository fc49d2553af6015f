"""Change a picture a `MaskToImage` can make: a part of its mask, its details, or from one seed to another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmgen.data.labels import LabelSet
from ssmgen.model_folder import SAMPLING
from ssmgen.objectives import LinearPath
from ssmgen.pipeline import MaskToImage, check_output_type, to_output
from ssmgen.registry import explained, keywords
from ssmgen.sampling import checked_seed, image_seeds, initial_noise
from ssmgen.solvers import shifted_grid

STARTS = ("inversion", "noise")


@explained(*SAMPLING)
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
    output_type: str = "pil",
    palette: str | LabelSet = "",
    remap: str | LabelSet = "",
    callback: Callable[[int, Tensor], None] | None = None,
    **settings: Any,
) -> Any:
    """Redraw what a changed mask asks for and keep the rest of the image.

    Latents outside the region are moved on the straight line to those of the image, inside by the model, so that both
    arrive together; in the end pixels outside the region are the image's own. Inside, the model starts from new noise,
    or from the noise that the image comes from (the ODE is solved backwards under the old mask): that keeps a little
    more of the colours, takes twice the time, and is slow to give up what was there for another class.

    Args:
        pipe: what redraws.
        image: a path, a PIL image, or uint8 ``(3, size, size)``, of the model's size.
        mask: its mask, as `MaskToImage` takes it.
        new_mask: the mask it should have.
        region: bool ``(size, size)``, where the image may change; where the masks differ if None.
        margin: pixels by which the region is widened.
        start: ``"noise"`` or ``"inversion"``.
        seed: of new noise.
        output_type: ``"pil"``, ``"np"`` or ``"pt"``, see `MaskToImage`.
        palette, remap: of both masks, see `MaskToImage`.
        callback: called as ``callback(step, x)`` after each step, of an inversion too.
        **settings: ``steps``, ``solver``, ``guidance_scale``, ``guidance_start``, ``shift``; the model's own otherwise.
            The way back takes the same, without guidance.

    Returns:
        One image, of the kind ``output_type`` says.

    Raises:
        ValueError: a start, region or margin that is none, or masks that do not differ where no region is given.
    """
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    check_output_type(output_type, ("pil", "np", "pt"))
    noise = initial_noise([seed], pipe.latent_size).to(pipe.device)
    old = pipe.labels_of(mask, palette=palette, remap=remap, name="the mask")
    new = pipe.labels_of(new_mask, palette=palette, remap=remap, name="the new mask")
    widened = _region(old, new, region, margin).to(pipe.device)
    chosen = pipe.sampling(**settings)
    data = pipe.encode(image)
    if start == "inversion":
        back = chosen | {"guidance_scale": 1.0, "solver": _reversible(chosen["solver"])}
        times = shifted_grid(back.pop("steps"), back.pop("shift")).flip(0)
        noise = pipe.sampler(data, old[None].to(pipe.device), times=times, progress=callback, **back)
    inside = F.interpolate(widened[None, None].float(), data.shape[-2:], mode="area") > 0
    kept = _Kept(inside, data - noise)
    latents = pipe.sampler(noise, new[None].to(pipe.device), objective=kept, progress=callback, **chosen)
    return _paste(pipe, latents, image, widened, output_type)


@explained(*SAMPLING)
def variations(
    pipe: MaskToImage,
    image: Any,
    mask: Any,
    *,
    strength: float = 0.5,
    seed: int = 0,
    num_images: int = 1,
    output_type: str = "pil",
    palette: str | LabelSet = "",
    remap: str | LabelSet = "",
    callback: Callable[[int, Tensor], None] | None = None,
    **settings: Any,
) -> Any:
    """Images of the same mask near a given one: it is mixed with noise and sampled on from there (SDEdit).

    Args:
        pipe: what draws.
        image: a path, a PIL image, or uint8 ``(3, size, size)``, of the model's size.
        mask: its mask.
        strength: share of noise in (0, 1]; 1 forgets the image.
        seed: of the first image; the next ones count up.
        num_images: how many.
        output_type, palette, remap, callback: see `MaskToImage`.
        **settings: ``steps``, ``solver``, ``guidance_scale``, ``guidance_start``, ``shift``; of the steps, those after
            the start are made.

    Raises:
        ValueError: a strength outside (0, 1], or no images.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1], got {strength}")
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    check_output_type(output_type)
    noise = initial_noise(image_seeds(seed, num_images), pipe.latent_size).to(pipe.device)
    labels = pipe.labels_of(mask, palette=palette, remap=remap)
    chosen = pipe.sampling(**settings)
    grid = shifted_grid(chosen.pop("steps"), chosen.pop("shift"))
    first = 1 - strength
    times = torch.cat([torch.tensor([first]), grid[grid > first]])
    data = pipe.encode(image)
    x = LinearPath().interpolate(noise, data, torch.full((num_images,), first, device=pipe.device))
    latents = pipe.sampler(x, labels[None].to(pipe.device), times=times, progress=callback, **chosen)
    return to_output(latents if output_type == "latent" else pipe.decode(latents), output_type)


@explained(*keywords(MaskToImage.__call__))
def interpolate(pipe: MaskToImage, mask: Any, seeds: tuple[int, int], count: int = 8, **settings: Any) -> Any:
    """``count`` images from that of one seed to that of another, their noise turned from one to the other (slerp).

    Args:
        pipe: what draws.
        mask: as `MaskToImage` takes it, one.
        seeds: of the first and the last image.
        count: at least 2.
        **settings: of `MaskToImage`'s call.

    Raises:
        ValueError: a count below 2, or seeds that are not two.
    """
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    if not isinstance(seeds, Sequence) or len(seeds) != 2 or checked_seed(seeds[0]) == checked_seed(seeds[1]):
        raise ValueError(f"seeds must be two different ones, got {seeds}")
    first, last = initial_noise(list(seeds), pipe.latent_size)
    angle = torch.acos(F.cosine_similarity(first.flatten(), last.flatten(), dim=0).clamp(-1, 1))
    parts = [torch.sin((1 - s) * angle) * first + torch.sin(s * angle) * last for s in torch.linspace(0, 1, count)]
    return pipe(mask, noise=torch.stack(parts) / torch.sin(angle), num_images=count, **settings)


def _reversible(solver: Any) -> Any:
    """A solver that can go from data to noise."""
    return solver if isinstance(solver, str) and solver != "deis2" else "ab3"


class _Kept:
    """Flow matching whose velocity outside the region is that of the straight line to the image."""

    def __init__(self, inside: Tensor, line: Tensor) -> None:
        self.inside = inside
        self.line = line

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return torch.where(self.inside, prediction, self.line)


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
    """The image with the region redrawn, its edge blended over a few pixels inside."""
    drawn, kept = pipe.decode(latents), pipe.pixels_of(image).to(latents.device).float() / 255
    weight = F.avg_pool2d(F.pad(inside[None, None].float(), (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    weight = torch.where(inside, weight, 0.0)
    return to_output(torch.lerp(kept, drawn, weight), output_type)
