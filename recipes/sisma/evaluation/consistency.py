"""Whether the parts of a face go together: both irises and both brows of one colour, hair of one colour, both eyes.

Mean agreement with the masks shows none of this. Real images are measured alike, since even real irises differ in light
and a mask's edge is never exact; a generated face is judged by its ratio to them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ssmgen.data import LabelSet

#: A part counts from this share of the image on: of a smaller one, only edges are seen.
LEAST = 1 / 1024
#: An eye is there if the parser finds this share of its pixels.
FOUND = 0.5
#: Decimals that are given of every figure.
FIGURES = {"iris_distance": 3, "brow_distance": 3, "hair_chroma_variance": 5, "both_eyes": 3}

_EYES, _BROWS, _HAIR = ("l_eye", "r_eye"), ("l_brow", "r_brow"), "hair"


def shows_faces(labels: LabelSet) -> bool:
    """Whether a label set has the parts of a face that are compared."""
    return {*_EYES, *_BROWS, _HAIR} <= set(labels.classes)


def consistency(
    sets: Mapping[str, Tensor | list[Tensor]],
    masks: Tensor | list[Tensor],
    labels: LabelSet,
    parsed: Mapping[str, Tensor | list[Tensor]],
) -> dict[str, Any]:
    """The figures of every set of images of the same masks.

    Args:
        sets: images by the name of the set, each uint8 ``(n, 3, h, w)`` or a list; ``generated`` is compared with
            ``autoencoder``, or else ``real``.
        masks: labels ``(n, h, w)`` or a list.
        labels: the classes, for which `shows_faces` holds.
        parsed: a parser's labels of the sets; empty without a parser.

    Returns:
        For every set a mapping of figures, means over the images whose masks have the parts:

        - ``iris_distance``, ``brow_distance``: Euclidean distance between the colours of left and right, of RGB in
          [0, 1]. The iris's colour is the mean over the eye in which a pixel counts by how much darker it is than the
          brightest one, see `iris_colour`.
        - ``hair_chroma_variance``: variance over the hair of RGB minus its mean over the channels, summed over these.
        - ``both_eyes``: share of images in which the parser finds at least half of either eye. Without a parser there
          is none.

        Beside them ``ratio``, generated to real images after the autoencoder (or to real ones where none is given); the
        numbers ``n`` of masks with these parts; and the ``protocol``. A figure without a mask is left out.
    """
    ids = {name: labels.classes.index(name) for name in (*_EYES, *_BROWS, _HAIR)}
    found = {name: [_of_image(*each, ids) for each in zip(images, masks, strict=True)] for name, images in sets.items()}
    for name, maps in parsed.items():
        for figures, *maps_of_image in zip(found[name], maps, masks, strict=True):
            figures |= _eyes_there(*maps_of_image, [ids[eye] for eye in _EYES])
    result: dict[str, Any] = {name: _means(each) for name, each in found.items()}
    reference = "autoencoder" if "autoencoder" in sets else "real"
    generated, compared = result["generated"], result[reference]
    result["ratio"] = {key: generated[key] / compared[key] for key in generated if compared.get(key)}
    result["n"] = {key: sum(key in each for each in found["generated"]) for key in generated}
    result["protocol"] = f"consistency[reference={reference},least=1/{round(1 / LEAST)},found={FOUND},n={len(masks)}]"
    return result


def iris_colour(image: Tensor, eye: Tensor) -> Tensor:
    """The colour of an iris, ``(3,)`` in [0, 1].

    Neither white nor the highlight count, as they are the brightest. Of the estimates that were tried on drawn faces
    with irises of one colour and of two, this one told them apart best after the autoencoder.

    Args:
        image: uint8 ``(3, h, w)``.
        eye: bool ``(h, w)``, where the eye is.
    """
    pixels = image[:, eye].float() / 255
    luma = pixels.mean(0)
    weight = luma.max() - luma + 1e-6
    return (pixels * weight).sum(1) / weight.sum()


def _of_image(image: Tensor, mask: Tensor, ids: Mapping[str, int]) -> dict[str, float]:
    """The figures of an image ``(3, h, w)`` whose mask ``(h, w)`` has the parts."""
    inside = {name: mask == id for name, id in ids.items()}
    large = {name for name, where in inside.items() if int(where.sum()) >= LEAST * mask.numel()}
    found = {}
    if large >= set(_EYES):
        left, right = (iris_colour(image, inside[name]) for name in _EYES)
        found["iris_distance"] = (left - right).norm().item()
    if large >= set(_BROWS):
        left, right = (image[:, inside[name]].float().mean(1) / 255 for name in _BROWS)
        found["brow_distance"] = (left - right).norm().item()
    if _HAIR in large:
        hair = image[:, inside[_HAIR]].float() / 255
        found["hair_chroma_variance"] = (hair - hair.mean(0)).var(1, correction=0).sum().item()
    return found


def _eyes_there(parsed: Tensor, mask: Tensor, eyes: Sequence[int]) -> dict[str, float]:
    """Whether the parser finds both eyes, 0 or 1; empty where the mask does not have both."""
    inside = [mask == eye for eye in eyes]
    if any(int(where.sum()) < LEAST * mask.numel() for where in inside):
        return {}
    shares = [(parsed[where] == eye).float().mean() for eye, where in zip(eyes, inside, strict=True)]
    return {"both_eyes": float(min(shares) >= FOUND)}


def _means(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    having = {key: [each[key] for each in figures if key in each] for key in FIGURES}
    return {key: sum(values) / len(values) for key, values in having.items() if values}
