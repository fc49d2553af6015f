"""What a pipeline is made of and what its calls are given, checked before the work begins."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmgen.pipeline.folder import Recipe
from ssmgen.sampling import Sampling

OUTPUTS = ("pil", "np", "pt", "uint8", "latent")


def check_fit(model: Any, autoencoder: Any, recipe: Recipe) -> None:
    """Reject parts that do not fit together, by a `ValueError`; an attribute that a model lacks is not checked."""
    for name, value, unit in (
        ("in_channels", autoencoder.channels, "channels of the autoencoder's latents"),
        ("mask_scale", autoencoder.factor, "image pixels per latent pixel of the autoencoder"),
        ("num_classes", len(recipe.labels), f"classes of {recipe.labels.name}"),
    ):
        if getattr(model, name, value) != value:
            raise ValueError(f"the model has {name}={getattr(model, name)}, and there are {value} {unit}")
    conditions = dict(getattr(model, "conditions", {"mask": None}))
    if "mask" not in conditions:
        raise ValueError(
            f"the model has no condition called 'mask', only {', '.join(conditions) or 'none at all'}: MaskToImage "
            "makes images of masks; use ssmgen.sample"
        )
    for key in ("guidance_scale", "guidance_start"):
        named = getattr(recipe.sampling, key)
        if isinstance(named, Mapping) and not named.keys() <= conditions.keys():
            raise ValueError(f"{key}={named!r} names a condition that the model does not have")
    for name in recipe.text_encoders:
        if getattr(conditions.get(name), "takes", "") != "text":
            raise ValueError(f"text_encoders: the model has no condition {name!r} that takes text")
    side = autoencoder.factor * getattr(model, "multiple", 1)
    if any(each % side for size in recipe.sizes for each in size):
        raise ValueError(f"image_size must be a multiple of {side} (autoencoder and patches), got {recipe.image_size}")


def checked_sampling(
    own: Sampling,
    given: Sampling | None,
    settings: Mapping[str, Any],
    told: Collection[str],
    conditions: Mapping[str, Any],
) -> Sampling:
    """The settings of a call: those given, else a pipeline's own, without scales of conditions that have no value.

    Args:
        own: the pipeline's.
        given: of the call, or None.
        settings: single ones of the call.
        told: names of what the call was given besides the mask.
        conditions: the model's, by name.

    Raises:
        ValueError: a setting out of range, or guidance that the model or the values do not allow.
    """
    names = ["mask", *(name for name in told if name in conditions)]
    sampling = (given or own).for_values(names, conditions).replaced(**settings)
    sampling.guidances(names, conditions)
    return sampling


def crop_to(size: tuple[int, int]) -> str:
    """How to bring an image to the aspect ratio of a size (height, width)."""
    height, width = size
    return "crop it to a square" if height == width else f"crop it to the aspect ratio of {height} x {width}"


def check_shape(labels: Tensor, size: tuple[int, int], name: str, most: float = 0.02, hint: str = "") -> None:
    """Reject labels or numbers ``(..., h, w)`` whose aspect ratio is not about that of a size (height, width).

    Args:
        labels: what is to be resized.
        size: the size that it gets.
        name: what messages call it.
        most: by which part the aspect ratios may differ; of a rectangle also by a pixel.
        hint: what else can be done about it.

    Raises:
        ValueError: the aspect ratios differ by more.
    """
    height, width = labels.shape[-2:]
    off = abs(height * size[1] - width * size[0])
    if off > most * height * size[1] and (size[0] == size[1] or off > max(size)):
        raise ValueError(f"{name} is {height} x {width} (height x width): {crop_to(size)}{hint}")


def is_stack(masks: Any) -> bool:
    """Whether these are ids of several masks in one tensor ``(n, h, w)``, and not the colours of one mask."""
    if not isinstance(masks, Tensor) or masks.dim() != 3 or not masks.numel():
        return False
    ids = not (masks.is_floating_point() or masks.is_complex() or masks.dtype == torch.bool)
    return ids and not (masks.dtype == torch.uint8 and 3 in (masks.shape[0], masks.shape[-1]))


def check_device(device: Any) -> None:
    """Raise a ValueError with torch's reason if it cannot use a device here, before any part of a model is moved."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError) as error:  # depends on how torch was built
        reason = (str(error) or type(error).__name__).strip().splitlines()[0].partition(". ")[0]
        raise ValueError(
            f"device {str(device)!r}: torch cannot use it here ({reason}); 'ssmgen doctor' lists the devices it sees"
        ) from error


def check_output_type(output_type: str, outputs: Sequence[str] = OUTPUTS) -> None:
    """Reject an unknown ``output_type``, by a `ValueError`."""
    if output_type not in outputs:
        raise ValueError(f"output_type must be one of {', '.join(outputs)}, got {output_type!r}")


def check_noise(noise: Tensor, shape: tuple[int, ...]) -> None:
    """Reject noise that is not ``(images, channels, height, width)`` of this shape, by a `ValueError`."""
    if tuple(noise.shape) != shape:
        raise ValueError(f"noise must be {shape}, one per image, got {tuple(noise.shape)}")


def check_counts(output_type: str, num_images: int, batch_size: int) -> None:
    """Reject an unknown ``output_type`` and counts below 1, by a `ValueError`."""
    check_output_type(output_type)
    if num_images < 1 or batch_size < 1:
        raise ValueError(f"num_images and batch_size must be at least 1, got {num_images} and {batch_size}")


def check_same_size(maps: Sequence[Tensor]) -> None:
    """Reject label maps ``(h, w)`` of one call that got different sizes, by a `ValueError`."""
    for i, each in enumerate(maps, 1):
        if each.shape != maps[0].shape:
            one, first = (f"{height} x {width}" for height, width in (each.shape, maps[0].shape))
            raise ValueError(
                f"mask 1 gets the size {first} and mask {i} {one}: call the pipeline once for each shape, or give size="
            )


def as_size(size: int | Sequence[int]) -> int | tuple[int, int]:
    """A side, or ``(height, width)``; a square is a side.

    Raises:
        ValueError: neither.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"size must be a side or (height, width), got {size!r}")
    return sides[0] if sides[0] == sides[1] else sides
