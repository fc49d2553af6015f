"""Drawn faces: portraits with exact 19-class masks, made from a number, for tests, tutorials and the demo.

A face has a geometry (pose, head, hair style, glasses, ...) and an appearance (colours, light, patterns), drawn from
two independent random streams: one mask has as many images as there are appearances. Everything is given in units of
the picture's side, so one index is the same face at every size.

Each part is a signed distance field on the pixel grid, negative inside. The same field gives the hard label and the
soft edge of the image, so the edges of the picture lie where the mask says.

The layout follows real masks: the median area of every class lies close to that of 808 CelebAMask-HQ masks (the table
is in the tests). The frequency of the parts follows them too, except hats, glasses and necklaces (5 % each there, 7 to
9 % here), so that a few thousand faces hold enough of them to learn from.
"""

from __future__ import annotations

import colorsys
import math
import random
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from ssmgen.data.images import to_pil, write_png
from ssmgen.data.labels import CELEBAMASK19

__all__ = ["DRAWN_FACES_VERSION", "DrawnFaces", "draw_face", "write_official_layout"]

#: Raised whenever a change alters any pixel, so that a cache or a checkpoint can tell which faces it saw.
DRAWN_FACES_VERSION = 1

Colour = tuple[float, float, float]
_ID = {name: label for label, name in enumerate(CELEBAMASK19.classes)}
#: Image side of each of the person's own sides: -1 is the image's left.
_SIDES = ((-1, "r"), (1, "l"))

# ----------------------------------------------------------------------------------------------- geometry: random draws


def _stream(*key: object) -> random.Random:
    """A random stream for a key. Text seeds and ``random()`` are the same on every platform and Python version."""
    return random.Random(" ".join(map(str, ("ssmgen drawn face", DRAWN_FACES_VERSION, *key))))


def _about(rng: random.Random, mean: float, spread: float) -> float:
    """A normal draw cut at two deviations, so that no face falls apart."""
    return mean + spread * max(-2.0, min(2.0, rng.gauss(0.0, 1.0)))


def _scaled(rng: random.Random, mean: float, spread: float) -> float:
    """A positive draw with a relative spread and median ``mean``."""
    return mean * math.exp(_about(rng, 0.0, spread))


@dataclass(frozen=True)
class _Pose:
    """Where the features sit. They stay near the middle, as in aligned photographs; yaw moves the head behind them."""

    shift: tuple[float, float]
    scale: float
    roll: float
    yaw: float  # -1..1, positive: turned to the image's right


@dataclass(frozen=True)
class _Head:
    """Outline of the skin in the face frame, whose origin lies between nose and eyes."""

    centre: float
    half_width: float
    top: float
    chin: float
    jaw: float  # exponent of the lower outline: 2 is an ellipse, more is squarer
    ear: tuple[float, float]


@dataclass(frozen=True)
class _Hair:
    """A mass around the head, an opening for the face in it, and locks that end at a height on either side."""

    kind: str  # bald, ring, short, long
    volume: float
    crown: float
    length: float
    flare: float
    opening: tuple[float, float]  # half widths left and right of the head's centre
    locks: tuple[float, float]
    hairline: float
    part: float
    slope: float
    fringe: float
    teeth: float
    curl: float
    phase: float
    over_cloth: bool


@dataclass(frozen=True)
class _Eyes:
    spacing: float
    half_width: float
    half_height: float
    tilt: float
    gaze: tuple[float, float]
    brow_length: float
    brow_thickness: float
    brow_arch: float
    brow_tilt: float
    brow_lift: float


@dataclass(frozen=True)
class _Mouth:
    half_width: float
    upper: float
    lower: float
    gap: float  # 0: closed
    smile: float
    bow: float
    nose_width: float
    nose_length: float


@dataclass(frozen=True)
class _Body:
    centre: float
    neck: float
    flare: float
    shoulder: float | None  # None: no cloth in the picture
    slope: float
    neckline: float
    pointed: bool
    necklace: float | None


@dataclass(frozen=True)
class _Extras:
    glasses: tuple[float, float, float, float] | None  # half width, half height, corner, rim
    dark: bool
    hat: str | None  # beanie, brim, cap
    hat_line: float
    hat_size: float
    earring: str | None  # drop, hoop, stud
    earring_size: float
    earring_sides: tuple[bool, bool]


@dataclass(frozen=True)
class _Geometry:
    pose: _Pose
    head: _Head
    hair: _Hair
    eyes: _Eyes
    mouth: _Mouth
    body: _Body
    extras: _Extras


def _random_pose(rng: random.Random) -> _Pose:
    shift = (_about(rng, 0.0, 0.01), _about(rng, 0.0, 0.01))
    return _Pose(shift, _about(rng, 1.0, 0.03), _about(rng, 0.0, 0.06), max(-1.0, min(1.0, rng.gauss(0.0, 0.5))))


def _random_head(rng: random.Random, yaw: float) -> _Head:
    ear = (_scaled(rng, 0.061, 0.2), _scaled(rng, 0.095, 0.12))
    return _Head(
        centre=-0.055 * yaw,
        half_width=_about(rng, 0.283, 0.016),
        top=_about(rng, -0.43, 0.02),
        chin=_about(rng, 0.37, 0.018),
        jaw=rng.uniform(1.75, 2.3),
        ear=ear,
    )


def _random_locks(rng: random.Random, kind: str, head: _Head, length: float) -> list[tuple[float, float]]:
    """For the left and the right side: half width of the face opening, height at which the front hair ends."""
    sides = []
    for _ in _SIDES:
        if kind == "long" and rng.random() < 0.78:
            sides.append((head.half_width * rng.uniform(0.72, 0.98), length))
        else:
            sides.append((head.half_width * rng.uniform(0.88, 1.0), rng.uniform(-0.1, 0.02)))
    return sides


def _random_hair(rng: random.Random, head: _Head) -> _Hair:
    kind = rng.choices(("bald", "ring", "short", "long"), (0.025, 0.035, 0.26, 0.68))[0]
    full = kind in ("short", "long")
    length = rng.choice((rng.uniform(0.15, 0.4), 0.7, 0.7)) if kind == "long" else 0.02
    (left, lock_left), (right, lock_right) = _random_locks(rng, kind, head, length)
    volume = _scaled(rng, 0.1 if kind == "long" else 0.03, 0.45) if full else 0.012
    fringe = full and rng.random() < 0.25
    slope = 0.0 if fringe else rng.choice((0.0, rng.uniform(0.2, 0.9)))
    swept = rng.uniform(-0.25, 0.25)
    return _Hair(
        kind=kind,
        volume=volume,
        crown=_scaled(rng, 0.12, 0.35) if full else 0.012,
        length=length,
        flare=rng.uniform(-0.05, 0.4),
        opening=(left, right),
        locks=(lock_left, lock_right),
        hairline=rng.uniform(-0.24, -0.16) if fringe else _about(rng, -0.34, 0.03) if full else -0.7,
        part=rng.uniform(-0.14, 0.14),
        slope=slope,
        fringe=swept if slope == 0.0 else 0.0,
        teeth=rng.choice((0.003, rng.uniform(0.005, 0.03))),
        curl=rng.choice((0.002, 0.006, rng.uniform(0.008, 0.018))),
        phase=rng.uniform(0.0, 6.3),
        over_cloth=rng.random() < 0.6,
    )


def _random_eyes(rng: random.Random) -> _Eyes:
    return _Eyes(
        spacing=_about(rng, 0.105, 0.005),
        half_width=_about(rng, 0.041, 0.004),
        half_height=_scaled(rng, 0.0212, 0.24),
        tilt=_about(rng, -0.03, 0.08),
        gaze=(_about(rng, 0.0, 0.3), _about(rng, 0.0, 0.15)),
        brow_length=_about(rng, 0.081, 0.007),
        brow_thickness=_scaled(rng, 0.0165, 0.3),
        brow_arch=rng.uniform(0.006, 0.03),
        brow_tilt=_about(rng, 0.2, 0.12),
        brow_lift=_about(rng, 0.064, 0.007),
    )


def _random_mouth(rng: random.Random) -> _Mouth:
    opened = rng.random() < 0.56
    return _Mouth(
        half_width=_about(rng, 0.098, 0.009),
        upper=_scaled(rng, 0.031, 0.28),
        lower=_scaled(rng, 0.0505, 0.24),
        gap=_scaled(rng, 0.035, 0.5) if opened else 0.0,
        smile=_about(rng, 0.014 if opened else 0.004, 0.011),
        bow=rng.uniform(0.0, 0.35),
        nose_width=_about(rng, 0.075, 0.007),
        nose_length=_about(rng, 0.1, 0.008),
    )


def _random_body(rng: random.Random, pose: _Pose) -> _Body:
    cloth = rng.random() < 0.62
    return _Body(
        centre=0.5 + pose.shift[0] - 0.04 * pose.yaw + _about(rng, 0.0, 0.02),
        neck=_about(rng, 0.19, 0.022),
        flare=rng.uniform(0.5, 2.0),
        shoulder=_about(rng, 0.92, 0.06) if cloth else None,
        slope=rng.uniform(0.2, 0.5),
        neckline=rng.uniform(0.12, 0.23),
        pointed=rng.random() < 0.4,
        necklace=rng.uniform(1.02, 1.085) if rng.random() < 0.11 else None,
    )


def _random_extras(rng: random.Random) -> _Extras:
    lens = (_scaled(rng, 0.088, 0.12), _scaled(rng, 0.06, 0.22), rng.uniform(0.3, 1.0), rng.uniform(0.006, 0.012))
    sides = rng.choice(((True, True), (True, True), (True, False), (False, True)))
    return _Extras(
        glasses=lens if rng.random() < 0.08 else None,
        dark=rng.random() < 0.3,
        hat=rng.choice(("beanie", "brim", "cap")) if rng.random() < 0.08 else None,
        hat_line=rng.uniform(-0.27, -0.19),
        hat_size=rng.uniform(0.0, 1.0),
        earring=rng.choice(("drop", "drop", "hoop", "stud")) if rng.random() < 0.24 else None,
        earring_size=_scaled(rng, 1.2, 0.5),
        earring_sides=sides,
    )


def _random_geometry(seed: int, index: int) -> _Geometry:
    rng = _stream("geometry", seed, index)
    pose = _random_pose(rng)
    head = _random_head(rng, pose.yaw)
    hair = _random_hair(rng, head)
    return _Geometry(
        pose, head, hair, _random_eyes(rng), _random_mouth(rng), _random_body(rng, pose), _random_extras(rng)
    )


# --------------------------------------------------------------------------------------------- appearance: random draws

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
class _Fabric:
    """A pattern of two colours: plain, stripes, dots or gradient."""

    kind: str
    first: Colour
    second: Colour
    angle: float
    pitch: float


@dataclass(frozen=True)
class _Appearance:
    skin: Colour
    lips: Colour
    blush: float
    hair: Colour
    brow: Colour
    iris: Colour
    strands: tuple[float, ...]
    gloss: float
    light: tuple[float, float]
    backdrop: _Fabric
    blobs: tuple[tuple[float, float, float, Colour], ...]
    cloth: _Fabric
    hat: _Fabric
    frame: Colour
    lens: Colour
    metal: Colour
    stone: Colour
    grain: tuple[float, ...]


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    """Between two colours; a negative share goes beyond the first. Kept inside the displayable range."""
    r, g, b = (min(1.0, max(0.0, p + share * (q - p))) for p, q in zip(first, second, strict=True))
    return r, g, b


def _jitter(rng: random.Random, colour: Colour, spread: float = 0.03) -> Colour:
    shift = rng.gauss(0.0, spread)
    r, g, b = (min(1.0, max(0.02, c + shift + rng.gauss(0.0, spread / 3))) for c in colour)
    return r, g, b


def _between(rng: random.Random, tones: tuple[Colour, ...]) -> Colour:
    """A tone between two neighbours of a list."""
    place = rng.random() * (len(tones) - 1)
    low = int(place)
    return _jitter(rng, _mix(tones[low], tones[low + 1], place - low))


def _any_colour(rng: random.Random) -> Colour:
    """Any hue, mostly of moderate saturation, from dark to bright."""
    return colorsys.hsv_to_rgb(rng.random(), rng.random() ** 1.6 * 0.85, rng.uniform(0.12, 0.95))


def _hair_colour(rng: random.Random) -> Colour:
    return _any_colour(rng) if rng.random() < 0.07 else _jitter(rng, rng.choice(_HAIR_TONES), 0.025)


def _fabric(rng: random.Random, similar: tuple[Colour, ...]) -> _Fabric:
    """A pattern. One in four is near a colour already in the picture: colour alone must not give a class away."""
    first = _jitter(rng, rng.choice(similar), 0.05) if rng.random() < 0.25 else _any_colour(rng)
    second = _mix(first, _any_colour(rng), rng.uniform(0.3, 0.9))
    kind = rng.choice(("plain", "stripes", "dots", "gradient"))
    return _Fabric(kind, first, second, rng.uniform(0.0, math.pi), rng.uniform(0.05, 0.12))


def _backdrop(rng: random.Random, similar: tuple[Colour, ...]) -> _Fabric:
    fabric = _fabric(rng, similar)
    return _Fabric("gradient", fabric.first, fabric.second, fabric.angle, 1.0)


def _random_blobs(rng: random.Random) -> tuple[tuple[float, float, float, Colour], ...]:
    """Out-of-focus spots of the background: centre, radius, colour."""
    return tuple(
        (rng.random(), rng.random(), rng.uniform(0.05, 0.22), _any_colour(rng)) for _ in range(rng.choice((0, 3, 5)))
    )


def _random_appearance(seed: int, appearance: int) -> _Appearance:
    rng = _stream("appearance", seed, appearance)
    skin, hair = _between(rng, _SKIN_TONES), _hair_colour(rng)
    dye = rng.choice(((0.75, 0.15, 0.22), (0.80, 0.35, 0.38), (0.55, 0.12, 0.25), (0.72, 0.38, 0.30)))
    turn = rng.uniform(0.0, 2.0 * math.pi)
    return _Appearance(
        skin=skin,
        lips=_mix(_mix(skin, (0.45, 0.12, 0.12), 0.25), dye, rng.uniform(0.15, 0.75)),
        blush=rng.uniform(0.0, 0.22),
        hair=hair,
        brow=_mix(_mix(hair, (0.12, 0.08, 0.06), rng.uniform(0.1, 0.6)), skin, 0.1),
        iris=_jitter(rng, rng.choice(_IRIS_TONES)),
        strands=tuple(rng.uniform(0.0, 6.3) for _ in range(6)),
        gloss=rng.uniform(0.05, 0.3),
        light=(0.8 * math.cos(turn), 0.5 * math.sin(turn) - 0.35),
        backdrop=_backdrop(rng, (skin, hair)),
        blobs=_random_blobs(rng),
        cloth=_fabric(rng, (skin, hair)),
        hat=_fabric(rng, (skin, hair)),
        frame=rng.choice(((0.05, 0.05, 0.06), (0.25, 0.14, 0.08), (0.75, 0.62, 0.35), _any_colour(rng))),
        lens=_mix((0.08, 0.08, 0.10), _any_colour(rng), 0.35),
        metal=_jitter(rng, rng.choice(_METALS)),
        stone=_any_colour(rng),
        grain=tuple(rng.uniform(-1.0, 1.0) for _ in range(100)),
    )


# ------------------------------------------------------------------------------------------------------- canvas, shapes


class _Canvas:
    """The picture being painted: image, labels, and the grid in picture (x, y) and face (u, v) coordinates."""

    def __init__(self, size: int, pose: _Pose, light: tuple[float, float]) -> None:
        steps = (torch.arange(size) + 0.5) / size
        self.size, self.pose = size, pose
        self.x, self.y = steps[None, :], steps[:, None]
        x, y = (self.x - 0.5 - pose.shift[0]) / pose.scale, (self.y - 0.55 - pose.shift[1]) / pose.scale
        cos, sin = math.cos(pose.roll), math.sin(pose.roll)
        self.u, self.v = cos * x + sin * y, cos * y - sin * x
        self.light = light
        self.place = (slice(None), slice(None))
        self.image = torch.zeros(3, size, size)
        self.mask = torch.zeros(size, size, dtype=torch.uint8)

    def window(self, u: float, v: float, reach: tuple[float, float]) -> _Canvas:
        """The part of the canvas around a place in the face: small parts need not be worked out on the whole grid."""
        cos, sin, scale = math.cos(self.pose.roll), math.sin(self.pose.roll), self.pose.scale
        x = 0.5 + self.pose.shift[0] + scale * (cos * u - sin * v)
        y = 0.55 + self.pose.shift[1] + scale * (cos * v + sin * u)
        wide, high = (1.1 * reach[i] + 0.25 * reach[1 - i] + 2.0 / self.size for i in (0, 1))
        cols, rows = (slice(*(int(self.size * max(0.0, e)) for e in (m - r, m + r))) for m, r in ((x, wide), (y, high)))
        part = copy(self)
        part.x, part.y, part.u, part.v = self.x[:, cols], self.y[rows], self.u[rows, cols], self.v[rows, cols]
        part.image, part.mask, part.place = self.image[:, rows, cols], self.mask[rows, cols], (rows, cols)
        return part

    def cover(self, shape: Tensor) -> Tensor:
        """How much of each pixel lies inside: the edge is one pixel wide."""
        return (0.5 - shape * self.size).clamp_(0.0, 1.0)

    def paint(self, shape: Tensor, colour: Tensor, label: str | None = None, opacity: float = 1.0) -> None:
        """Paint a shape; with a label, it becomes that class."""
        self.image.lerp_(colour, (self.cover(shape) * opacity)[None].expand_as(self.image))
        if label is not None:
            self.mask.masked_fill_(shape < 0, _ID[label])

    def lit(self, x: Tensor, y: Tensor, strength: float = 0.35) -> Tensor:
        """Smooth shading of a bulge whose surface leans along ``(x, y)``, each about -1..1."""
        facing = (1.0 - x * x - y * y).clamp_(min=0.0).sqrt_()
        return 0.78 + strength * (x * self.light[0] + y * self.light[1]) + 0.26 * facing


def _rgb(colour: Colour) -> Tensor:
    return torch.tensor(colour)[:, None, None]


def _blend(first: Colour, second: Colour, share: Tensor) -> Tensor:
    """Per-pixel mixture of two colours, ``(3, height, width)``."""
    return _rgb(first) + (_rgb(second) - _rgb(first)) * share


def _ellipse(x: Tensor, y: Tensor, rx: float, ry: float) -> Tensor:
    """Distance to an axis-aligned ellipse, exact to first order at its edge."""
    p, q = x / rx, y / ry
    inner, slope = torch.sqrt(p * p + q * q), torch.sqrt((p / rx) ** 2 + (q / ry) ** 2)
    return inner * (inner - 1.0) / slope.clamp_(min=1e-6)


def _box(x: Tensor, y: Tensor, rx: float, ry: float, corner: float) -> Tensor:
    """Distance to a box with rounded corners."""
    p, q = x.abs() - (rx - corner), y.abs() - (ry - corner)
    outside = torch.sqrt(p.clamp(min=0.0) ** 2 + q.clamp(min=0.0) ** 2)
    return outside + torch.maximum(p, q).clamp(max=0.0) - corner


def _bump(x: Tensor, width: float) -> Tensor:
    """A soft hill of height one."""
    return torch.exp(-((x / width) ** 2))


def _both(first: Tensor, second: Tensor) -> Tensor:
    return torch.maximum(first, second)


def _either(first: Tensor, second: Tensor) -> Tensor:
    return torch.minimum(first, second)


def _joined(first: Tensor, second: Tensor, radius: float) -> Tensor:
    """Union whose inner corner is filled with a radius."""
    overlap = (radius - (first - second).abs()).clamp_(min=0.0)
    return torch.minimum(first, second) - overlap * overlap / (4.0 * radius)


def _pattern(canvas: _Canvas, fabric: _Fabric, x: Tensor, y: Tensor) -> Tensor:
    """The two colours of a fabric laid over the grid."""
    along = math.cos(fabric.angle) * x + math.sin(fabric.angle) * y
    across = math.cos(fabric.angle) * y - math.sin(fabric.angle) * x
    wave = 2.0 * math.pi / fabric.pitch
    sharp = 0.12 * canvas.size * fabric.pitch
    draw: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: torch.zeros_like(along),
        "stripes": lambda: (torch.sin(along * wave) * sharp + 0.5).clamp_(0.0, 1.0),
        "dots": lambda: ((torch.sin(along * wave) * torch.sin(across * wave) - 0.45) * sharp + 0.5).clamp_(0.0, 1.0),
        "gradient": lambda: torch.sigmoid(4.0 * (along - 0.5 * math.cos(fabric.angle) - 0.5 * math.sin(fabric.angle))),
    }
    return _blend(fabric.first, fabric.second, draw[fabric.kind]())


# -------------------------------------------------------------------------------------------------- shapes of the parts


def _head_shape(c: _Canvas, head: _Head) -> Tensor:
    """Two half outlines: a round top, and a jaw of its own squareness."""
    p = (c.u - head.centre).abs() / (head.half_width * (1.0 - 0.25 * c.v.clamp(min=0.0)))
    jaw = (p**head.jaw + (c.v.clamp(min=0.0) / head.chin) ** head.jaw) ** (1.0 / head.jaw)
    top = torch.sqrt(p * p + (c.v / head.top) ** 2)
    return (torch.where(c.v > 0, jaw, top) - 1.0) * head.half_width


def _wobble(c: _Canvas, hair: _Hair, head: _Head) -> Tensor:
    """The uneven edge of hair, as a function of the angle around the head."""
    angle = torch.atan2(c.u - head.centre, -c.v)
    fine = torch.sin(17.0 * angle + 2.0 * hair.phase) + 0.6 * torch.sin(29.0 * angle + hair.phase)
    return hair.curl * fine + 0.012 * torch.sin(5.0 * angle + hair.phase)


def _skull_shape(c: _Canvas, hair: _Hair, head: _Head) -> Tensor:
    """Hair as far as it follows the skull."""
    reach = -head.top + hair.crown
    return _ellipse(c.u - head.centre, c.v + 0.12, head.half_width + hair.volume, reach - 0.12)


def _hair_mass(c: _Canvas, hair: _Hair, head: _Head) -> Tensor:
    """All hair, as if there were no face in front of it."""
    skull = _both(_skull_shape(c, hair, head), c.v - 0.12) if hair.kind != "long" else _skull_shape(c, hair, head)
    if hair.kind == "long":
        width = head.half_width + hair.volume + hair.flare * (c.v + 0.12)
        sides = (c.u - head.centre).abs() - width
        ends = c.v - hair.length + 0.03 * torch.cos(9.0 * c.u + hair.phase)
        skull = _joined(skull, _both(_both(sides, ends), -c.v - 0.12), 0.05)
    return skull + _wobble(c, hair, head)


def _face_opening(c: _Canvas, hair: _Hair, head: _Head) -> Tensor:
    """The window in the hair through which the face is seen: side edges, and a hairline with parting or fringe."""
    u = c.u - head.centre
    width = torch.where(u < 0, hair.opening[0], hair.opening[1])
    p, q = u / width, (c.v - 0.05) / 0.5
    sides = ((p * p + q * q).sqrt() - 1.0) * head.half_width
    away = (c.u - hair.part).abs()
    line = hair.hairline + hair.slope * away * away * 3.0 + hair.fringe * c.u
    teeth = hair.teeth * torch.sin(31.0 * c.u + hair.phase) * torch.sin(53.0 * c.u + 2.0 * hair.phase)
    return _both(torch.where(c.v > 0.05, u.abs() - width, sides), line + teeth - c.v)


def _front_hair(c: _Canvas, hair: _Hair, head: _Head, mass: Tensor) -> Tensor:
    """The hair in front of the face: the mass without the opening, down to where the locks end."""
    end = torch.where(c.u < head.centre, hair.locks[0], hair.locks[1])
    return _both(_both(mass, -_face_opening(c, hair, head)), c.v - end)


def _ear_place(head: _Head, pose: _Pose, side: int) -> tuple[float, float]:
    """The far ear slides behind the head as it turns, the near one comes forward."""
    out = head.half_width + 0.004 - side * pose.yaw * (0.07 if side * pose.yaw > 0 else 0.02)
    return head.centre + side * out, 0.0


def _eye_place(eyes: _Eyes, pose: _Pose, side: int) -> tuple[float, float]:
    """Centre and width factor of an eye: the far one is closer to the nose and narrower."""
    return side * eyes.spacing * (1.0 - 0.08 * side * pose.yaw), 1.0 - 0.14 * side * pose.yaw


# --------------------------------------------------------------------------------------------------- painting the parts


def _grain(c: _Canvas, look: _Appearance) -> Tensor:
    """Slow random unevenness, about -1..1."""
    coarse = torch.tensor(look.grain).view(1, 1, 10, 10)
    return interpolate(coarse, size=(c.size, c.size), mode="bilinear", align_corners=True)[0, 0]


def _paint_backdrop(c: _Canvas, look: _Appearance) -> None:
    image = _pattern(c, look.backdrop, c.x, c.y)
    for x, y, radius, colour in look.blobs:
        image = torch.lerp(image, _rgb(colour), 0.6 * torch.sigmoid(25.0 * (radius - torch.hypot(c.x - x, c.y - y))))
    c.image.copy_(image)


def _hair_colours(c: _Canvas, g: _Geometry, look: _Appearance) -> Tensor:
    """Strands that fall from the parting, with a glossy band around the head."""
    a = look.strands
    wave = 3.0 * g.hair.curl * torch.sin(22.0 * c.v + 6.0 * c.u + a[0])
    along = (c.u - g.hair.part + wave) / (c.v + 0.95).clamp(min=0.2)
    strands = torch.sin(38.0 * along + a[1]) + torch.sin(67.0 * along + a[2]) + 0.7 * torch.sin(131.0 * along + a[3])
    gloss = _bump(torch.hypot(c.u - g.head.centre, 0.8 * c.v) - 0.31 - 0.02 * torch.sin(23.0 * along + a[4]), 0.05)
    lit = c.lit((c.u - g.head.centre) * 2.0, (c.v + 0.1) * 1.3, 0.3)
    light = (lit * (1.0 + 0.06 * strands)).clamp_(min=0.25)
    return _rgb(look.hair) * light + (0.04 * strands + look.gloss * gloss) * (_rgb(look.hair) * 0.6 + 0.12)


def _paint_back_hair(c: _Canvas, g: _Geometry, mass: Tensor, colours: Tensor) -> None:
    """Hair behind the neck lies in the shade."""
    if g.hair.kind != "bald":
        shade = 1.0 - 0.4 * torch.sigmoid(14.0 * (c.v - 0.1)) * _bump(c.u - g.head.centre, 0.25)
        c.paint(mass, colours * shade, "hair")


def _neck_shape(c: _Canvas, body: _Body) -> Tensor:
    width = body.neck + body.flare * (c.y - 0.93).clamp(min=0.0) ** 2 * 12.0
    return _both((c.x - body.centre).abs() - width, 0.7 - c.y)


def _paint_neck(c: _Canvas, g: _Geometry, look: _Appearance, head: Tensor) -> None:
    """The neck is a cylinder under the shadow of the chin."""
    lit = c.lit((c.x - g.body.centre) / 0.24, torch.zeros_like(c.y), 0.3)
    shade = lit * (0.92 - 0.35 * torch.exp(-head.clamp(min=0.0) / 0.05))
    c.paint(_neck_shape(c, g.body), _rgb(look.skin) * shade, "neck")


def _cloth_shape(c: _Canvas, body: _Body, shoulder: float) -> Tensor:
    """Shoulders that fall to the sides, with a round or pointed neckline."""
    x = (c.x - body.centre).abs()
    top = shoulder + body.slope * (x - 0.18).clamp(min=0.0) ** 1.5
    dip = (1.0 - x / body.neckline) if body.pointed else (1.0 - (x / body.neckline) ** 2)
    return (top + 0.5 * body.neckline * dip.clamp(min=0.0) - c.y) * 0.9


def _paint_cloth(c: _Canvas, g: _Geometry, look: _Appearance, head: Tensor) -> None:
    if g.body.shoulder is None:
        return
    shape = _both(_cloth_shape(c, g.body, g.body.shoulder), -head)
    x = c.x - g.body.centre
    fold = 0.06 * torch.sin(30.0 * x / (c.y - 0.5).clamp(min=0.1) + look.strands[5])
    shade = c.lit(x * 1.6, torch.full_like(c.y, 0.3), 0.3) + fold - 0.25 * torch.exp(shape.clamp(max=0.0) / 0.012)
    c.paint(shape, _pattern(c, look.cloth, c.x, c.y) * shade, "cloth")


def _paint_necklace(c: _Canvas, g: _Geometry, look: _Appearance, head: Tensor) -> None:
    """A thin chain of beads around the neck. The picture ends at the neck, so often only its sides are seen."""
    if g.body.necklace is None:
        return
    x = c.x - g.body.centre
    hang = c.y - g.body.necklace + 2.4 * x * x
    shape = _both(_both(hang.abs() - 0.0034, x.abs() - g.body.neck + 0.01), -head)
    beads = 0.8 + 0.35 * torch.sin(300.0 * x)
    c.paint(shape, _rgb(look.metal) * beads, "neck_l")


def _paint_body(c: _Canvas, g: _Geometry, look: _Appearance, head: Tensor) -> None:
    _paint_cloth(c, g, look, head)
    _paint_necklace(c, g, look, head)


def _paint_ears(c: _Canvas, g: _Geometry, look: _Appearance) -> None:
    for side, own in _SIDES:
        u, v = _ear_place(g.head, c.pose, side)
        near = c.window(u, v, (0.14, 0.17))
        x, y = near.u - u - side * 0.15 * (0.05 - near.v), near.v - v
        shape = _ellipse(x, y, *g.head.ear)
        fold = _bump(_ellipse(x, y, 0.5 * g.head.ear[0], 0.6 * g.head.ear[1]), 0.01)
        shade = near.lit((near.u - g.head.centre) * 2.6, near.v * 2.0) - 0.22 * fold
        near.paint(shape, _rgb(_mix(look.skin, (0.8, 0.3, 0.25), 0.12)) * shade, f"{own}_ear")


def _skin_colours(c: _Canvas, g: _Geometry, look: _Appearance, hair: Tensor) -> Tensor:
    """The face: a lit bulge with blushed cheeks, eye sockets, and the shadow that the hair throws."""
    x, y = (c.u - g.head.centre) / (1.12 * g.head.half_width), c.v / 0.46
    shade = c.lit(x, y) + 0.02 * _grain(c, look)
    shade = shade - 0.16 * torch.exp(-hair.clamp(min=0.0) / 0.018)
    for side, _ in _SIDES:
        u, _ = _eye_place(g.eyes, c.pose, side)
        shade = shade - 0.10 * torch.exp(-(((c.u - u) / 0.07) ** 2) - ((c.v + 0.085) / 0.035) ** 2)
    cheeks = torch.exp(-(((c.u.abs() - 0.15) / 0.06) ** 2) - ((c.v - 0.08) / 0.055) ** 2)
    return _blend(look.skin, (0.85, 0.35, 0.32), look.blush * cheeks) * shade


def _nose_shape(c: _Canvas, g: _Geometry) -> Tensor:
    """A bridge that widens into the tip and two wings."""
    length, width = g.mouth.nose_length, g.mouth.nose_width
    u = c.u - 0.03 * c.pose.yaw * ((c.v + 0.08) / 0.18).clamp(0.0, 1.0)
    down = ((c.v + 0.085) / (length + 0.085)).clamp(0.0, 1.0)
    bridge = _both(u.abs() - 0.032 - 0.7 * (width - 0.032) * down**1.6, c.v - length + 0.02)
    bridge = _both(bridge, -0.085 - c.v)
    wings = _ellipse(u, c.v - length + 0.036, width, 0.042)
    return _joined(bridge, wings, 0.035)


def _paint_nose(c: _Canvas, g: _Geometry, look: _Appearance, skin: Tensor) -> None:
    shape = _nose_shape(c, g)
    u, length = c.u - 0.03 * c.pose.yaw * ((c.v + 0.08) / 0.18).clamp(0.0, 1.0), g.mouth.nose_length
    side = u / 0.06 * (1.0 if c.light[0] < 0 else -1.0)
    edge = torch.exp(shape.clamp(max=0.0) / 0.014)
    shade = 1.0 - (0.10 + 0.16 * torch.sigmoid(3.0 * side)) * edge - 0.12 * _bump(c.v - length, 0.02)
    ridge = 0.12 * _bump(u, 0.014) + 0.14 * torch.exp(-((u / 0.02) ** 2) - ((c.v - length + 0.035) / 0.02) ** 2)
    c.paint(shape, skin * shade + ridge * 0.8 * skin.clamp(0.0, 1.0), "nose")
    for wing in (-1, 1):
        hole = _ellipse(u - wing * 0.5 * g.mouth.nose_width, c.v - length + 0.012, 0.016, 0.0085)
        c.paint(_both(hole, shape), skin * 0.4, opacity=0.85)


def _paint_brow(c: _Canvas, g: _Geometry, look: _Appearance, side: int, own: str) -> None:
    """An arched band, thicker towards the nose."""
    eyes = g.eyes
    u, narrow = _eye_place(eyes, c.pose, side)
    p = side * (c.u - u * 1.02) / (eyes.brow_length * narrow)
    middle = -0.075 - eyes.brow_lift + eyes.brow_tilt * 0.08 * p - eyes.brow_arch * (1.0 - (p - 0.15) ** 2) + 0.016
    thickness = eyes.brow_thickness * (1.0 - 0.45 * p) * (1.0 - p.clamp(-1.0, 1.0) ** 6)
    shape = _both((c.v - middle).abs() - thickness, (p.abs() - 1.0) * eyes.brow_length)
    hairs = 0.95 + 0.12 * torch.sin(110.0 * (c.u + 0.6 * side * c.v) + look.strands[0])
    c.paint(shape, _rgb(look.brow) * hairs, f"{own}_brow")


def _eye_shape(c: _Canvas, eyes: _Eyes, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """An almond; with it, the coordinates inside it."""
    u, narrow = _eye_place(eyes, c.pose, side)
    x = c.u - u
    y = c.v + 0.077 + side * eyes.tilt * -x
    p = x / (eyes.half_width * narrow)
    lid = eyes.half_height * (1.0 - p * p)
    return _both(-y - 1.12 * lid, y - 0.88 * lid), x, y


def _paint_eye(c: _Canvas, g: _Geometry, look: _Appearance, side: int, own: str) -> None:
    """White, iris, pupil, highlight, and the dark edge of the upper lid."""
    shape, x, y = _eye_shape(c, g.eyes, side)
    x, y = x - 0.014 * g.eyes.gaze[0] - 0.012 * c.pose.yaw, y + 0.002 - 0.01 * g.eyes.gaze[1]
    ball = 0.93 - 6.0 * (x * x) * 8.0 - 0.25 * _bump(y + g.eyes.half_height, 0.012)
    c.paint(shape, _rgb((1.0, 0.98, 0.96)) * ball, f"{own}_eye")
    radius = torch.hypot(x, y)
    iris = _rgb(look.iris) * (0.75 + 18.0 * (y + 0.01).clamp(0.0, 0.03))
    c.paint(_both(shape, radius - 0.0195), iris)
    c.paint(_both(shape, radius - 0.0085), _rgb((0.03, 0.03, 0.03)))
    c.paint(
        _both(shape, torch.hypot(x - 0.007 * (1 if c.light[0] > 0 else -1), y + 0.007) - 0.0052), _rgb((1.0, 1.0, 1.0))
    )
    lash = _both(shape, -(shape + 0.0035))
    c.paint(_both(lash, y), _rgb((0.10, 0.06, 0.05)), opacity=0.85)


def _mouth_curves(c: _Canvas, g: _Geometry) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Height over the mouth line, and over it the edges: upper lip top, half the gap, lower lip bottom."""
    m = g.mouth
    p = (c.u - 0.012 * c.pose.yaw) / m.half_width
    y = c.v - 0.187 - m.smile * (0.5 - p * p) * 1.6 + 0.25 * m.gap - 0.012
    arch = 1.0 - p * p
    bow = 1.0 - m.bow * _bump(p, 0.16)
    return y, -m.upper * arch * bow - 0.5 * m.gap * arch, 0.5 * m.gap * arch, m.lower * arch + 0.5 * m.gap * arch


def _paint_mouth(c: _Canvas, g: _Geometry, look: _Appearance) -> None:
    y, top, half, bottom = _mouth_curves(c, g)
    if g.mouth.gap > 0:
        inside = _both(-half - y, y - half)
        teeth = torch.sigmoid((0.3 * half - y) * 220.0)
        gaps = 1.0 - 0.10 * _bump(torch.sin(75.0 * (c.u - 0.012 * c.pose.yaw)), 0.25)
        interior = _blend((0.30, 0.06, 0.07), (0.95, 0.93, 0.88), teeth) * gaps
        c.paint(inside, interior * (0.75 + 0.25 * torch.sigmoid((y + half - 0.006) * 400.0)), "mouth")
    lower = _both(half - y, y - bottom)
    shine = _bump(y - 0.55 * (half + bottom), 0.009) * _bump(c.u, 0.05)
    c.paint(
        lower, _rgb(look.lips) * (0.95 - 0.2 * torch.exp((y - bottom).clamp(max=0.0) / 0.01)) + 0.16 * shine, "l_lip"
    )
    upper = _both(top - y, y + half)
    c.paint(upper, _rgb(look.lips) * (0.72 + 4.0 * (top * 0.5 - half * 0.5 - y).clamp(-0.04, 0.04)), "u_lip")


def _glasses_shapes(c: _Canvas, g: _Geometry, lens: tuple[float, float, float, float]) -> tuple[Tensor, Tensor]:
    """All of the glasses, and the lenses within their rims."""
    half, height, corner, rim = lens
    outer, inner = [], []
    for side, _ in _SIDES:
        u, narrow = _eye_place(g.eyes, c.pose, side)
        x, y = c.u - u * 1.04, c.v + 0.066
        edge = _box(x, y, half * narrow, height, corner * min(half * narrow, height))
        outer.append(edge - rim)
        inner.append(edge)
    bars = _both((c.v + 0.085).abs() - 0.9 * rim, (c.u - g.head.centre).abs() - g.head.half_width)
    eyes_apart = _either(c.u.abs() - 0.04, 0.12 - c.u.abs())
    return _either(_either(*outer), _both(bars, eyes_apart)), _either(*inner)


def _paint_glasses(c: _Canvas, g: _Geometry, look: _Appearance) -> None:
    """Clear lenses let the eyes through, and the eyes keep their labels; dark ones hide them."""
    if g.extras.glasses is None:
        return
    shape, lenses = _glasses_shapes(c, g, g.extras.glasses)
    glare = 0.25 * torch.sigmoid(60.0 * (torch.sin(18.0 * (c.u + 0.6 * c.v)) - 0.75))
    eyes = ((c.mask == _ID["l_eye"]) | (c.mask == _ID["r_eye"])) & (lenses < 0)
    seen = c.mask[eyes]
    c.paint(lenses, _rgb(look.lens) + glare, opacity=0.9 if g.extras.dark else 0.2)
    c.paint(_both(shape, -lenses), _rgb(look.frame) + 0.6 * glare)
    c.mask.masked_fill_(shape < 0, _ID["eye_g"])
    if not g.extras.dark:
        c.mask[eyes] = seen


def _paint_earrings(c: _Canvas, g: _Geometry, look: _Appearance) -> None:
    extras = g.extras
    for (side, _), worn in zip(_SIDES, extras.earring_sides, strict=True):
        if extras.earring is None or not worn or side * c.pose.yaw > 0.55:
            continue
        u, v = _ear_place(g.head, c.pose, side)
        near = c.window(u, v + 0.25, (0.2, 0.3))
        x = near.u - u - side * 0.01
        shape = _earring_shape(x, near.v - v - g.head.ear[1] + 0.012, extras)
        shine = 0.8 + 0.5 * _bump(x + 0.006, 0.008)
        near.paint(shape, _rgb(look.stone if extras.earring == "drop" else look.metal) * shine, "ear_r")


def _earring_shape(x: Tensor, y: Tensor, extras: _Extras) -> Tensor:
    size = extras.earring_size
    if extras.earring == "stud":
        return torch.hypot(x, y) - 0.017 * size
    if extras.earring == "hoop":
        return (torch.hypot(x, y - 0.05 * size) - 0.045 * size).abs() - 0.0075
    drop = _ellipse(x, y - 0.06 * size, 0.02 * size, 0.045 * size)
    return _joined(drop, _both(x.abs() - 0.006, _both(-y, y - 0.06 * size)), 0.012)


def _hat_shape(c: _Canvas, g: _Geometry) -> tuple[Tensor, Tensor]:
    """The hat, and within it the band or brim. It always covers the hair above its line."""
    e, head, u = g.extras, g.head, c.u - g.head.centre
    line = e.hat_line + 0.35 * u * u
    cover = _both(_skull_shape(c, g.hair, head) - 0.035, c.v - line)
    if e.hat == "beanie":
        return cover, _both(cover, line - 0.075 - c.v)
    crown = _both(u.abs() - 0.25 - 0.1 * e.hat_size - 0.15 * (c.v + 0.3), c.v - line)
    if e.hat == "brim":
        reach = 0.42 + 0.14 * e.hat_size
        brim = _ellipse(u, c.v - line + 0.02 - 0.25 * u.abs() * u.abs(), reach, 0.05)
        return _either(_either(crown, cover), brim), brim
    visor = _ellipse(u - 0.1 * c.pose.yaw, c.v - line + 0.01, 0.27, 0.055)
    return _joined(cover, visor, 0.02), visor


def _paint_hat(c: _Canvas, g: _Geometry, look: _Appearance) -> None:
    if g.extras.hat is None:
        return
    shape, band = _hat_shape(c, g)
    u = c.u - g.head.centre
    shade = c.lit(u * 2.2, (c.v + 0.3) * 1.5, 0.35)
    shade = shade - 0.22 * c.cover(band) - 0.15 * torch.exp(shape.clamp(max=0.0) / 0.01)
    c.paint(shape, _pattern(c, look.hat, c.u, c.v) * shade, "hat")


def _paint_face(c: _Canvas, g: _Geometry, look: _Appearance, head: Tensor, hair: Tensor) -> None:
    skin = _skin_colours(c, g, look, hair)
    c.paint(head, skin, "skin")
    nose = c.window(0.0, 0.01, (0.15, 0.13))
    _paint_nose(nose, g, look, skin[:, *nose.place])
    for side, own in _SIDES:
        u, _ = _eye_place(g.eyes, c.pose, side)
        _paint_eye(c.window(u, -0.077, (0.07, 0.06)), g, look, side, own)
        _paint_brow(c.window(u, -0.14, (0.13, 0.1)), g, look, side, own)
    _paint_mouth(c.window(0.0, 0.2, (0.14, 0.2)), g, look)
    _paint_glasses(c.window(0.0, -0.066, (0.4, 0.14)), g, look)


def _paint_all(c: _Canvas, g: _Geometry, look: _Appearance) -> None:
    """Back to front."""
    head, mass = _head_shape(c, g.head), _hair_mass(c, g.hair, g.head)
    front, strands = _front_hair(c, g.hair, g.head, mass), _hair_colours(c, g, look)
    _paint_backdrop(c, look)
    _paint_back_hair(c, g, mass, strands)
    _paint_neck(c, g, look, head)
    if g.hair.over_cloth:
        _paint_body(c, g, look, head)
    _paint_ears(c, g, look)
    _paint_face(c, g, look, head, front)
    if g.hair.kind != "bald":
        c.paint(front, strands, "hair")
    if not g.hair.over_cloth:
        _paint_body(c, g, look, head)
    _paint_earrings(c, g, look)
    _paint_hat(c, g, look)


# --------------------------------------------------------------------------------------------------------- public names


@torch.no_grad()
def draw_face(index: int, size: int = 128, seed: int = 0, appearance: int | None = None) -> tuple[Tensor, Tensor]:
    """Draw one face.

    Args:
        index: which face; with ``seed`` it fixes the geometry and so the mask.
        size: side of the square picture in pixels. The same index is the same face at every size.
        seed: another seed is another endless set of faces.
        appearance: which colours, light and patterns; by default the index itself.

    Returns:
        Image ``(3, size, size)`` uint8 RGB and mask ``(size, size)`` uint8 in the order of ``CELEBAMASK19``.
    """
    geometry = _random_geometry(seed, index)
    look = _random_appearance(seed, index if appearance is None else appearance)
    canvas = _Canvas(size, geometry.pose, look.light)
    _paint_all(canvas, geometry, look)
    return canvas.image.clamp_(0.0, 1.0).mul_(255.0).round_().to(torch.uint8), canvas.mask


class DrawnFaces(Dataset[tuple[Tensor, Tensor]]):
    """Faces ``start`` to ``start + count`` of a seed, drawn when asked for.

    Args:
        count: how many faces.
        size: side of the pictures in pixels.
        seed: which set of faces.
        start: first index, so that training and validation can share a seed without sharing a face.
    """

    labels = CELEBAMASK19

    def __init__(self, count: int, size: int = 128, seed: int = 0, start: int = 0) -> None:
        self.count, self.size, self.seed, self.start = count, size, seed, start

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not -self.count <= i < self.count:
            raise IndexError(f"face {i} of {self.count}")
        return draw_face(self.start + i % self.count, self.size, self.seed)

    def fingerprint(self) -> str:
        """Names the exact pictures, for caches and checkpoints."""
        faces = f"seed{self.seed}-start{self.start}-count{self.count}-size{self.size}"
        return f"drawn_faces-v{DRAWN_FACES_VERSION}-{faces}"


def _write_parts(mask: Tensor, folder: Path, number: int) -> None:
    """One black and white picture per part that is present, as the dataset's authors ship them."""
    for label, part in enumerate(CELEBAMASK19.classes[1:], start=1):
        inside = mask == label
        if inside.any():
            white = inside.to(torch.uint8).mul_(255).expand(3, -1, -1)
            write_png(folder / f"{number:05d}_{part}.png", white)


def _mapping_line(number: int) -> str:
    """A row of the mapping to CelebA. The step is coprime to CelebA's 202599, so ids scatter and none occurs twice."""
    original = (119613 + 7919 * number) % 202599
    return f"{number:<13}{original:<13}{original + 1:06d}.jpg"


def write_official_layout(target: Path, count: int, size: int = 512, seed: int = 0, start: int = 0) -> None:
    """Write faces in the layout of the official CelebAMask-HQ archive; face ``i`` gets the id ``i``.

    Args:
        target: folder that will hold ``CelebA-HQ-img``, ``CelebAMask-HQ-mask-anno`` and the mapping to CelebA. The
            mapping's original numbers are made up, but spread over CelebA's three partitions.
        count: how many faces.
        size: side of the masks; the images have twice as many pixels a side (512 and 1024 in the original).
        seed: which set of faces.
        start: first index.
    """
    target, ids = Path(target), range(start, start + count)
    images = target / "CelebA-HQ-img"
    images.mkdir(parents=True, exist_ok=True)
    for number in ids:
        parts = target / "CelebAMask-HQ-mask-anno" / str(number // 2000)
        parts.mkdir(parents=True, exist_ok=True)
        to_pil(draw_face(number, 2 * size, seed)[0]).save(images / f"{number}.jpg", quality=92)
        _write_parts(draw_face(number, size, seed)[1], parts, number)
    lines = ["idx          orig_idx     orig_file", *map(_mapping_line, ids)]
    (target / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
