"""Random appearance of a face: colours, light and fabrics. It does not alter the mask."""

import colorsys
import math
import random
from dataclasses import dataclass, replace

from ssmgen.data.drawn_faces.geometry import random_stream

Colour = tuple[float, float, float]

_SKIN_TONES: tuple[Colour, ...] = (
    *((0.99, 0.87, 0.79), (0.96, 0.80, 0.69), (0.92, 0.74, 0.60), (0.85, 0.64, 0.49)),
    *((0.76, 0.55, 0.40), (0.62, 0.42, 0.29), (0.47, 0.31, 0.21), (0.33, 0.21, 0.15)),
)
_HAIR_TONES: tuple[Colour, ...] = (
    *((0.06, 0.05, 0.06), (0.13, 0.09, 0.07), (0.24, 0.15, 0.10), (0.36, 0.22, 0.13), (0.52, 0.34, 0.19)),
    *((0.70, 0.52, 0.30), (0.85, 0.71, 0.46), (0.45, 0.17, 0.09), (0.66, 0.30, 0.13), (0.62, 0.61, 0.60)),
)
_IRIS_TONES: tuple[Colour, ...] = (
    *((0.22, 0.13, 0.08), (0.35, 0.21, 0.10), (0.42, 0.40, 0.20), (0.25, 0.45, 0.30), (0.28, 0.47, 0.68)),
    (0.45, 0.52, 0.56),
)
_METALS: tuple[Colour, ...] = ((0.90, 0.73, 0.30), (0.80, 0.82, 0.86), (0.86, 0.60, 0.50), (0.95, 0.93, 0.88))


@dataclass(frozen=True)
class Fabric:
    """A pattern of two colours: plain, stripes, dots or gradient."""

    kind: str
    first: Colour
    second: Colour
    angle: float
    pitch: float


@dataclass(frozen=True)
class Appearance:
    """Everything that determines the image but not the mask."""

    skin: Colour
    lips: Colour
    blush: float
    hair: Colour
    brow: Colour
    iris: Colour
    strands: tuple[float, ...]
    gloss: float
    light: tuple[float, float]
    backdrop: Fabric
    blobs: tuple[tuple[float, float, float, Colour], ...]  # out-of-focus spots: x, y, radius, colour
    cloth: Fabric
    hat: Fabric
    frame: Colour
    lens: Colour
    metal: Colour
    stone: Colour
    grain: tuple[float, ...]


def random_appearance(seed: int, appearance: int) -> Appearance:
    """Appearance number ``appearance`` of a seed."""
    rng = random_stream("appearance", seed, appearance)
    skin = _between(rng, _SKIN_TONES)
    hair = _any_colour(rng) if rng.random() < 0.07 else _jitter(rng, rng.choice(_HAIR_TONES), 0.025)
    dye = rng.choice(((0.75, 0.15, 0.22), (0.80, 0.35, 0.38), (0.55, 0.12, 0.25), (0.72, 0.38, 0.30)))
    turn = rng.uniform(0.0, 2.0 * math.pi)
    return Appearance(
        skin=skin,
        lips=mix(mix(skin, (0.45, 0.12, 0.12), 0.25), dye, rng.uniform(0.15, 0.75)),
        blush=rng.uniform(0.0, 0.22),
        hair=hair,
        brow=mix(mix(hair, (0.12, 0.08, 0.06), rng.uniform(0.1, 0.6)), skin, 0.1),
        iris=_jitter(rng, rng.choice(_IRIS_TONES)),
        strands=tuple(rng.uniform(0.0, 6.3) for _ in range(6)),
        gloss=rng.uniform(0.05, 0.3),
        light=(0.8 * math.cos(turn), 0.5 * math.sin(turn) - 0.35),
        backdrop=replace(_fabric(rng, (skin, hair)), kind="gradient", pitch=1.0),
        blobs=tuple(
            (rng.random(), rng.random(), rng.uniform(0.05, 0.22), _any_colour(rng))
            for _ in range(rng.choice((0, 3, 5)))
        ),
        cloth=_fabric(rng, (skin, hair)),
        hat=_fabric(rng, (skin, hair)),
        frame=rng.choice(((0.05, 0.05, 0.06), (0.25, 0.14, 0.08), (0.75, 0.62, 0.35), _any_colour(rng))),
        lens=mix((0.08, 0.08, 0.10), _any_colour(rng), 0.35),
        metal=_jitter(rng, rng.choice(_METALS)),
        stone=_any_colour(rng),
        grain=tuple(rng.uniform(-1.0, 1.0) for _ in range(100)),
    )


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Interpolate two colours (a negative share extrapolates beyond the first), clipped to [0, 1]."""
    r, g, b = (min(1.0, max(0.0, p + share * (q - p))) for p, q in zip(first, second, strict=True))
    return r, g, b


def _jitter(rng: random.Random, colour: Colour, spread: float = 0.03) -> Colour:
    shift = rng.gauss(0.0, spread)
    r, g, b = (min(1.0, max(0.02, c + shift + rng.gauss(0.0, spread / 3))) for c in colour)
    return r, g, b


def _between(rng: random.Random, tones: tuple[Colour, ...]) -> Colour:
    """A tone between two neighbours in a list."""
    place = rng.random() * (len(tones) - 1)
    low = int(place)
    return _jitter(rng, mix(tones[low], tones[low + 1], place - low))


def _any_colour(rng: random.Random) -> Colour:
    """Any hue, mostly of moderate saturation, from dark to bright."""
    return colorsys.hsv_to_rgb(rng.random(), rng.random() ** 1.6 * 0.85, rng.uniform(0.12, 0.95))


def _fabric(rng: random.Random, similar: tuple[Colour, ...]) -> Fabric:
    """A random fabric. One in four resembles a colour already in the picture: colour alone must not reveal a class."""
    first = _jitter(rng, rng.choice(similar), 0.05) if rng.random() < 0.25 else _any_colour(rng)
    second = mix(first, _any_colour(rng), rng.uniform(0.3, 0.9))
    kind = rng.choice(("plain", "stripes", "dots", "gradient"))
    return Fabric(kind, first, second, rng.uniform(0.0, math.pi), rng.uniform(0.05, 0.12))
