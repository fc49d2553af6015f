"""Words for drawn faces: the attributes that a face was drawn with, and a sentence that states them.

The attributes come from the geometry and the appearance, not from the pixels, so they are exact and cost no drawing.
"""

import colorsys
import math
from collections.abc import Mapping

from ssmgen.data.drawn_faces.appearance import Appearance, Colour, mix, random_appearance
from ssmgen.data.drawn_faces.geometry import Geometry, random_geometry
from ssmgen.registry import closest

#: The attributes and their values. The class id of a value is its place in the tuple.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "hair": ("none", "black", "brown", "blond", "ginger", "grey", "dyed"),
    "length": ("bald", "receding", "short", "long"),
    "skin": ("pale", "tan", "bronze", "dark"),
    "glasses": ("none", "glasses", "sunglasses"),
    "hat": ("none", "beanie", "hat", "cap"),
    "background": ("black", "grey", "white", "red", "orange", "yellow", "green", "blue", "purple"),
}

# Each hair colour that is drawn and is not dyed, and its name.
_HAIR: tuple[tuple[Colour, str], ...] = (
    *(((0.06, 0.05, 0.06), "black"), ((0.13, 0.09, 0.07), "black"), ((0.24, 0.15, 0.10), "brown")),
    *(((0.36, 0.22, 0.13), "brown"), ((0.52, 0.34, 0.19), "brown"), ((0.70, 0.52, 0.30), "blond")),
    *(((0.85, 0.71, 0.46), "blond"), ((0.45, 0.17, 0.09), "ginger"), ((0.66, 0.30, 0.13), "ginger")),
    ((0.62, 0.61, 0.60), "grey"),
)
_DYED_BEYOND = 0.15  # three standard deviations of a natural tone's jitter
_SKIN = ((0.80, "pale"), (0.63, "tan"), (0.42, "bronze"))  # brighter than
_HUES = ((20, "red"), (45, "orange"), (70, "yellow"), (170, "green"), (255, "blue"), (330, "purple"), (361, "red"))
_LENGTHS = {"bald": "bald", "ring": "receding", "short": "short", "long": "long"}
_HATS = {None: "none", "beanie": "beanie", "brim": "hat", "cap": "cap"}


def attributes_of(index: int, seed: int = 0, appearance: int | None = None) -> dict[str, int]:
    """Class ids of a face's attributes, by the names in `ATTRIBUTES`.

    Args:
        index: number of the face, as in `draw_face`.
        seed: the set of faces.
        appearance: number of the appearance; ``index`` where None. Length, glasses and hat belong to the geometry, the
            colours and whether the lenses are dark to what is painted.
    """
    g, a = random_geometry(seed, index), random_appearance(seed, index if appearance is None else appearance)
    values = _values(g, a)
    return {name: ATTRIBUTES[name].index(value) for name, value in values.items()}


def words_of(index: int, seed: int = 0, appearance: int | None = None) -> str:
    """A sentence that states a face's attributes; arguments as those of `attributes_of`."""
    return sentence(attributes_of(index, seed, appearance))


def sentence(attributes: Mapping[str, int | str]) -> str:
    """A sentence such as ``"a face, short black hair, tan skin, sunglasses, grey background"``.

    Args:
        attributes: class ids or values by name. One that is left out is not mentioned, so ``{"hair": "black"}`` asks
            for that alone.

    Raises:
        ValueError: no such attribute or value; names the closest.
    """
    said = {name: _value(name, value) for name, value in attributes.items()}
    hair = [said[name] for name in ("length", "hair") if said.get(name, "none") != "none"]
    phrases = ["a face", " ".join(hair if hair in ([], ["bald"]) else [*hair, "hair"])]
    for name in ("skin", "glasses", "hat", "background"):
        value = said.get(name, "none")
        phrases.append("" if value == "none" else f"{value} {name}" if name in ("skin", "background") else value)
    return ", ".join(phrase for phrase in phrases if phrase)


def _value(attribute: str, value: int | str) -> str:
    if attribute not in ATTRIBUTES:
        raise ValueError(f"no attribute {attribute!r}{closest(attribute, ATTRIBUTES)} All: {', '.join(ATTRIBUTES)}.")
    values = ATTRIBUTES[attribute]
    if isinstance(value, int) and 0 <= value < len(values):
        return values[value]
    if value not in values:
        raise ValueError(
            f"{attribute} has no value {value!r}{closest(str(value), values)} It has: {', '.join(values)}, or their "
            f"class ids 0 to {len(values) - 1}."
        )
    return str(value)


def _values(g: Geometry, a: Appearance) -> dict[str, str]:
    glasses = "none" if g.accessories.glasses is None else "sunglasses" if g.accessories.dark else "glasses"
    bright = sum(weight * channel for weight, channel in zip((0.299, 0.587, 0.114), a.skin, strict=True))
    return {
        "hair": "none" if g.hair.kind == "bald" else _hair_colour(a.hair),
        "length": _LENGTHS[g.hair.kind],
        "skin": next((name for above, name in _SKIN if bright > above), "dark"),
        "glasses": glasses,
        "hat": _HATS[g.accessories.hat],
        "background": _colour_name(mix(a.backdrop.first, a.backdrop.second, 0.5)),
    }


def _hair_colour(colour: Colour) -> str:
    distance, name = min((math.dist(colour, tone), name) for tone, name in _HAIR)
    return name if distance <= _DYED_BEYOND else "dyed"


def _colour_name(colour: Colour) -> str:
    """The name of a colour in [0, 1]: black, grey or white where it has little of a hue."""
    hue, saturation, brightness = colorsys.rgb_to_hsv(*colour)
    if brightness < 0.25:
        return "black"
    if saturation < 0.2:
        return "grey" if brightness < 0.7 else "white"
    return next(name for below, name in _HUES if 360 * hue < below)
