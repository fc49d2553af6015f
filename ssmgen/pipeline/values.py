"""Values of a model's conditions from what users have: texts, pictures with their masks, labels, maps of numbers.

A condition's class says what it takes (`ssmgen.conditions.Condition.takes`), and `_PREPARED` has a function for each
kind. What is a value already, a mapping of tensors, passes as it is. The mask is not among these: `MaskToImage` reads
it by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmgen.data.images import from_pil, read_image, to_pil
from ssmgen.data.labels import LabelSet
from ssmgen.data.mask_input import to_labels
from ssmgen.data.transforms import check_same_shape
from ssmgen.noise import shared_noise
from ssmgen.pipeline.checks import check_shape
from ssmgen.registry import check_keywords, make
from ssmgen.sampling import Sampling
from ssmgen.text import TextEncoder, from_record
from ssmgen.values import Value, value_for

_BATCH = 16  # pictures that an autoencoder encodes at a time
_MASK = "_mask"


class Context(NamedTuple):
    """What preparing values needs of a pipeline.

    Attributes:
        conditions: those of the model by name.
        size: (height, width) of the images in pixels.
        autoencoder: encodes pictures.
        labels: classes of masks.
        text_encoder: returns the encoder of a condition by its name.
        orders: ``palette`` and ``remap`` of masks.
    """

    conditions: Mapping[str, Any]
    size: tuple[int, int]
    autoencoder: Any
    labels: LabelSet
    text_encoder: Callable[[str], TextEncoder]
    orders: Mapping[str, str | LabelSet]


def started(noise: Tensor, masks: Tensor, sampling: Sampling, labels: LabelSet) -> tuple[Tensor, Sampling]:
    """The noise that images of these masks start from, and the settings for a `Sampler` that gets it.

    Args:
        noise: ``(n, c, h, w)``.
        masks: labels ``(n or 1, H, W)``.
        sampling: the settings.
        labels: the classes of the masks.
    """
    if not sampling.shared_noise:
        return noise, sampling
    return shared_noise(noise, masks, labels.mirrored), sampling.replaced(shared_noise=False)


def keywords_of(conditions: Mapping[str, Any]) -> list[str]:
    """The keywords of a call that give values: the names of conditions besides ``mask``, and ``NAME_mask``."""
    names = [name for name in conditions if name != "mask"]
    return names + [name + _MASK for name in names if _by_regions(conditions[name])]


def examples_of(conditions: Mapping[str, Any]) -> list[str]:
    """An example of each keyword of `keywords_of`, for a model card."""
    given = {"text": '"..."', "picture": '"style.png"', "label": "0", "map": "array"}
    found = []
    for name, condition in conditions.items():
        if getattr(condition, "takes", "value") in given:
            found.append(f"{name}={given[condition.takes]}")
        if _by_regions(condition):
            found.append(f'{name}{_MASK}="style-mask.png"')
    return found


def divided_keywords(
    call: str, given: Mapping[str, Any], known: Sequence[str], conditions: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keywords of a call that are settings, and those that give values of conditions.

    Args:
        call: name of what is called, for the message.
        given: the keywords.
        known: the settings that it takes.
        conditions: those of the model by name.

    Raises:
        TypeError: neither a setting nor a condition; names the closest.
    """
    values = keywords_of(conditions)
    check_keywords(call, given, [*known, *values])
    return (
        {name: one for name, one in given.items() if name not in values},
        {name: one for name, one in given.items() if name in values and one is not None},
    )


def prepared_values(given: Mapping[str, Any], images: int, context: Context) -> dict[str, Value]:
    """The values of conditions by name, each checked by its condition: one for all images, or one per image.

    Args:
        given: by the keywords of `keywords_of`.
        images: the number of images.
        context: see `Context`.

    Raises:
        FileNotFoundError: no such picture or mask.
        TypeError, ValueError: what does not suit its condition; names it.
    """
    values = {}
    for name in given:
        owner = name.removesuffix(_MASK)
        if name not in context.conditions and owner not in given:
            raise ValueError(f"{name}= is the mask of a picture that is not given: give {owner}= too")
    for name, condition in context.conditions.items():
        if name not in given:
            continue
        try:
            raw = _raw(name, condition, given, context)
            value = value_for(name, raw, images)
            _check(condition, value, context)
        except (TypeError, ValueError) as error:
            raise error if name in str(error) else type(error)(f"{name}: {error}") from error
        values[name] = value
    return values


def text_encoder_of(spec: str | Mapping[str, Any]) -> TextEncoder:
    """The text encoder of a spec, or of a record with the hash of its weights, which is compared.

    Raises:
        FileNotFoundError, ImportError, ValueError: see the encoder, and `ssmgen.text.from_record`.
    """
    if isinstance(spec, Mapping) and "weights" in spec:
        return from_record(spec)
    encoder: TextEncoder = make(spec)
    return encoder


def _raw(name: str, condition: Any, given: Mapping[str, Any], context: Context) -> Any:
    takes, what = getattr(condition, "takes", "value"), given[name]
    if takes not in ("text", "picture") and isinstance(_first(what), str):
        raise TypeError(f"{name} takes {_NOUNS.get(takes, 'a tensor')}, not a text: got {_first(what)!r}")
    if isinstance(what, Mapping) or takes not in _PREPARED:
        return what
    return _PREPARED[takes](name, condition, given, context)


def _check(condition: Any, value: Value, context: Context) -> None:
    """Let the condition reject a value before the work begins."""
    height, width = (side // context.autoencoder.factor for side in context.size)
    with torch.no_grad():
        condition(value, (height, width))


def _text(name: str, condition: Any, given: Mapping[str, Any], context: Context) -> Any:
    what = given[name]
    texts = [what] if isinstance(what, str) else what
    if hasattr(texts, "shape"):
        return texts  # vectors
    if not (isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts)):
        raise TypeError(f"{name} takes a text, or a list with one per image, got {what!r}")
    encoder = context.text_encoder(name)
    if encoder.width != condition.width:
        raise ValueError(
            f"{name}: the text encoder {encoder.name!r} makes vectors of width {encoder.width}, and the model reads "
            f"width {condition.width}: record the encoder that it was trained with"
        )
    return encoder.encode(texts)


def _picture(name: str, condition: Any, given: Mapping[str, Any], context: Context) -> Any:
    """Latents of pictures, each scaled to the model's size, and their masks: their proportions carry no style."""
    pictures, regional = _listed(given[name], 3), _by_regions(condition)
    masks = given.get(name + _MASK)
    if regional and masks is None:
        raise ValueError(
            f"{name}= is a style image without its mask: this model takes the style by regions. Give {name}{_MASK}= too"
        )
    listed = _listed(masks, 2) if regional else [None] * len(pictures)
    if len(listed) != len(pictures):
        raise ValueError(f"give one {name}{_MASK} for each {name}: got {len(listed)} for {len(pictures)}")
    pairs = []
    for i, (picture, mask) in enumerate(zip(pictures, listed, strict=True), 1):
        suffix = f" {i} of {len(pictures)}" if len(pictures) > 1 else ""
        pairs.append(_pair(picture, mask, f"{name}{suffix}", f"{name}{_MASK}{suffix}", context))
    device = next(context.autoencoder.parameters(), torch.empty(0)).device
    images = torch.stack([image for image, _ in pairs]).float() / 127.5 - 1
    with torch.no_grad():
        latents = torch.cat(
            [context.autoencoder.encode(part.to(device)).float().cpu() for part in images.split(_BATCH)]
        )
    return {"latents": latents, "mask": torch.stack([mask for _, mask in pairs])} if regional else latents


def _pair(picture: Any, mask: Any, name: str, mask_name: str, context: Context) -> tuple[Tensor, Any]:
    pixels = to_pixels(picture, name)
    if mask is None:
        return scaled_to(pixels, context.size), None
    orders = {"palette": context.orders.get("palette", ""), "order": context.orders.get("remap", "")}
    labels = to_labels(mask, context.labels, name=mask_name, **orders)
    try:
        check_same_shape(pixels, labels)
    except ValueError as error:
        raise ValueError(f"{name} and {mask_name}: {error}") from error
    return scaled_to(pixels, context.size), scaled_to(labels, context.size)


def _map(name: str, condition: Any, given: Mapping[str, Any], context: Context) -> Any:
    """A map of numbers, scaled to the model's size if it has another one."""
    what = given[name]
    if isinstance(what, list | tuple):
        what = torch.stack([torch.as_tensor(each) for each in what])
    found = torch.as_tensor(what)
    found = found.unsqueeze(0) if found.dim() == 2 and condition.channels == 1 else found
    found = found.unsqueeze(0) if found.dim() == 3 else found
    if found.dim() != 4 or not found.is_floating_point() or 0 in found.shape:
        return found  # the condition rejects it
    latent = tuple(side // context.autoencoder.factor for side in context.size)
    full = tuple(side * condition.scale for side in latent)
    if tuple(found.shape[-2:]) in (latent, full):
        return found
    check_shape(found, context.size, name)
    return F.interpolate(found, full, mode="bilinear", antialias=True)


def to_pixels(image: Any, name: str = "the image") -> Tensor:
    """A picture as ``(3, height, width)`` uint8.

    Args:
        image: a path, a PIL image, or an array or tensor of uint8, ``(3, height, width)`` or ``(height, width, 3)``.
        name: what messages call it.

    Raises:
        FileNotFoundError, TypeError, ValueError: not a picture.
    """
    pixels: Any = read_image(image) if isinstance(image, str | Path) else image
    if hasattr(pixels, "convert"):
        pixels = from_pil(pixels.convert("RGB"))
    elif hasattr(pixels, "__array_interface__"):
        pixels = torch.from_numpy(pixels.copy())
    if not isinstance(pixels, Tensor):
        raise TypeError(f"{name}: an image is a path, a PIL image, an array or a tensor, got {type(image).__name__}")
    if pixels.dim() == 3 and pixels.shape[0] != 3:
        pixels = pixels.movedim(-1, 0)
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[0] != 3 or 0 in pixels.shape:
        raise ValueError(
            f"{name} must be uint8 (3, height, width) or (height, width, 3), got {pixels.dtype} {tuple(pixels.shape)}"
        )
    return pixels.cpu()


def scaled_to(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture ``(3, h, w)`` or labels ``(h, w)``, uint8, in another size (height, width), without cropping."""
    from PIL import Image

    if tuple(pixels.shape[-2:]) == size:
        return pixels
    method = Image.Resampling.NEAREST if pixels.dim() == 2 else Image.Resampling.LANCZOS  # labels cannot be averaged
    return from_pil(to_pil(pixels).resize((size[1], size[0]), method))


def _listed(given: Any, dims: int) -> list[Any]:
    """One or several pictures (3 dimensions) or masks (2) as a list."""
    if isinstance(given, list | tuple):
        return list(given)
    stacked = hasattr(given, "shape") and len(given.shape) == dims + 1
    if stacked and dims == 2:  # three dimensions may also be one mask of colours
        stacked = not (str(given.dtype).endswith("uint8") and 3 in (given.shape[0], given.shape[-1]))
    return list(given) if stacked else [given]


def _first(given: Any) -> Any:
    return given[0] if isinstance(given, list | tuple) and given else given


def _by_regions(condition: Any) -> bool:
    return getattr(condition, "takes", "") == "picture" and bool(condition.classes)


_PREPARED: dict[str, Callable[[str, Any, Mapping[str, Any], Context], Any]] = {
    "text": _text,
    "picture": _picture,
    "map": _map,
}
_NOUNS = {"label": "a label, a whole number", "map": "a map of numbers, an array or a tensor"}
