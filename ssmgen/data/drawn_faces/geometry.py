"""Random geometry of a face: pose, head, hair style, features, clothing and accessories. It alone fixes the mask."""

import math
import random
from dataclasses import dataclass

#: Increase it when a change alters any pixel: caches and checkpoints record which faces they were made from.
DRAWN_FACES_VERSION = 1
#: Side of the image (-1: left) for each side of the person (first letter of the class names).
SIDES = ((-1, "r"), (1, "l"))


@dataclass(frozen=True)
class Pose:
    """Placement of the features: near the middle, as in aligned photographs; yaw moves the head behind them."""

    shift: tuple[float, float]
    scale: float
    roll: float
    yaw: float  # -1..1, positive: turned to the image's right


@dataclass(frozen=True)
class Head:
    """Outline of the skin in the face frame, whose origin lies between nose and eyes."""

    centre: float
    half_width: float
    top: float
    chin: float
    jaw: float  # exponent of the lower outline: 2 is an ellipse, more is squarer
    ear: tuple[float, float]


@dataclass(frozen=True)
class Hair:
    """A mass around the head, with an opening for the face and locks that end at a given height on either side."""

    kind: str  # bald, ring, short, long
    volume: float
    crown: float
    length: float
    flare: float
    opening: tuple[float, float]  # half widths left and right of the head's centre
    locks: tuple[float, float]  # heights at which they end
    hairline: float
    part: float
    slope: float
    fringe: float
    teeth: float
    curl: float
    phase: float
    over_cloth: bool


@dataclass(frozen=True)
class Eyes:
    """Eyes and brows."""

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
class Mouth:
    """Mouth and nose."""

    half_width: float
    upper: float
    lower: float
    gap: float  # 0: closed
    smile: float
    bow: float
    nose_width: float
    nose_length: float


@dataclass(frozen=True)
class Body:
    """Neck, clothing and necklace."""

    centre: float
    neck: float
    flare: float
    shoulder: float | None  # None: no clothing in the picture
    slope: float
    neckline: float
    pointed: bool
    necklace: float | None


@dataclass(frozen=True)
class Accessories:
    """Glasses, hat and earrings."""

    glasses: tuple[float, float, float, float] | None  # half width, half height, corner, rim
    dark: bool
    hat: str | None  # beanie, brim, cap
    hat_line: float
    hat_size: float
    earring: str | None  # drop, hoop, stud
    earring_size: float
    earring_sides: tuple[bool, bool]


@dataclass(frozen=True)
class Geometry:
    """Everything that determines the mask."""

    pose: Pose
    head: Head
    hair: Hair
    eyes: Eyes
    mouth: Mouth
    body: Body
    accessories: Accessories


def random_stream(*key: object) -> random.Random:
    """The random stream of a key. Text seeds and ``random()`` are the same on every platform and Python version."""
    return random.Random(" ".join(map(str, ("ssmgen drawn face", DRAWN_FACES_VERSION, *key))))


def random_geometry(seed: int, index: int) -> Geometry:
    """The geometry of face ``index`` of a seed."""
    rng = random_stream("geometry", seed, index)
    pose = _random_pose(rng)
    head = _random_head(rng, pose.yaw)
    hair = _random_hair(rng, head)
    return Geometry(
        pose, head, hair, _random_eyes(rng), _random_mouth(rng), _random_body(rng, pose), _random_accessories(rng)
    )


def _random_pose(rng: random.Random) -> Pose:
    shift = (_normal(rng, 0.0, 0.01), _normal(rng, 0.0, 0.01))
    return Pose(shift, _normal(rng, 1.0, 0.03), _normal(rng, 0.0, 0.06), max(-1.0, min(1.0, rng.gauss(0.0, 0.5))))


def _random_head(rng: random.Random, yaw: float) -> Head:
    ear = (_log_normal(rng, 0.061, 0.2), _log_normal(rng, 0.095, 0.12))
    return Head(
        centre=-0.055 * yaw,
        half_width=_normal(rng, 0.283, 0.016),
        top=_normal(rng, -0.43, 0.02),
        chin=_normal(rng, 0.37, 0.018),
        jaw=rng.uniform(1.75, 2.3),
        ear=ear,
    )


def _random_hair(rng: random.Random, head: Head) -> Hair:
    kind = rng.choices(("bald", "ring", "short", "long"), (0.025, 0.035, 0.26, 0.68))[0]
    full = kind in ("short", "long")
    length = rng.choice((rng.uniform(0.15, 0.4), 0.7, 0.7)) if kind == "long" else 0.02
    widths, ends = [], []
    for _ in SIDES:
        hangs = kind == "long" and rng.random() < 0.78
        widths.append(head.half_width * (rng.uniform(0.72, 0.98) if hangs else rng.uniform(0.88, 1.0)))
        ends.append(length if hangs else rng.uniform(-0.1, 0.02))
    volume = _log_normal(rng, 0.1 if kind == "long" else 0.03, 0.45) if full else 0.012
    fringe = full and rng.random() < 0.25
    slope = 0.0 if fringe else rng.choice((0.0, rng.uniform(0.2, 0.9)))
    swept = rng.uniform(-0.25, 0.25)
    return Hair(
        kind=kind,
        volume=volume,
        crown=_log_normal(rng, 0.12, 0.35) if full else 0.012,
        length=length,
        flare=rng.uniform(-0.05, 0.4),
        opening=(widths[0], widths[1]),
        locks=(ends[0], ends[1]),
        hairline=rng.uniform(-0.24, -0.16) if fringe else _normal(rng, -0.34, 0.03) if full else -0.7,
        part=rng.uniform(-0.14, 0.14),
        slope=slope,
        fringe=swept if slope == 0.0 else 0.0,
        teeth=rng.choice((0.003, rng.uniform(0.005, 0.03))),
        curl=rng.choice((0.002, 0.006, rng.uniform(0.008, 0.018))),
        phase=rng.uniform(0.0, 6.3),
        over_cloth=rng.random() < 0.6,
    )


def _random_eyes(rng: random.Random) -> Eyes:
    return Eyes(
        spacing=_normal(rng, 0.105, 0.005),
        half_width=_normal(rng, 0.041, 0.004),
        half_height=_log_normal(rng, 0.0212, 0.24),
        tilt=_normal(rng, -0.03, 0.08),
        gaze=(_normal(rng, 0.0, 0.3), _normal(rng, 0.0, 0.15)),
        brow_length=_normal(rng, 0.081, 0.007),
        brow_thickness=_log_normal(rng, 0.0165, 0.3),
        brow_arch=rng.uniform(0.006, 0.03),
        brow_tilt=_normal(rng, 0.2, 0.12),
        brow_lift=_normal(rng, 0.064, 0.007),
    )


def _random_mouth(rng: random.Random) -> Mouth:
    opened = rng.random() < 0.56
    return Mouth(
        half_width=_normal(rng, 0.098, 0.009),
        upper=_log_normal(rng, 0.031, 0.28),
        lower=_log_normal(rng, 0.0505, 0.24),
        gap=_log_normal(rng, 0.035, 0.5) if opened else 0.0,
        smile=_normal(rng, 0.014 if opened else 0.004, 0.011),
        bow=rng.uniform(0.0, 0.35),
        nose_width=_normal(rng, 0.075, 0.007),
        nose_length=_normal(rng, 0.1, 0.008),
    )


def _random_body(rng: random.Random, pose: Pose) -> Body:
    cloth = rng.random() < 0.62
    return Body(
        centre=0.5 + pose.shift[0] - 0.04 * pose.yaw + _normal(rng, 0.0, 0.02),
        neck=_normal(rng, 0.19, 0.022),
        flare=rng.uniform(0.5, 2.0),
        shoulder=_normal(rng, 0.92, 0.06) if cloth else None,
        slope=rng.uniform(0.2, 0.5),
        neckline=rng.uniform(0.12, 0.23),
        pointed=rng.random() < 0.4,
        necklace=rng.uniform(1.02, 1.085) if rng.random() < 0.11 else None,
    )


def _random_accessories(rng: random.Random) -> Accessories:
    size = _log_normal(rng, 0.088, 0.12), _log_normal(rng, 0.06, 0.22)
    lens = (*size, rng.uniform(0.3, 1.0), rng.uniform(0.006, 0.012))
    sides = rng.choice(((True, True), (True, True), (True, False), (False, True)))
    return Accessories(
        glasses=lens if rng.random() < 0.08 else None,
        dark=rng.random() < 0.3,
        hat=rng.choice(("beanie", "brim", "cap")) if rng.random() < 0.08 else None,
        hat_line=rng.uniform(-0.27, -0.19),
        hat_size=rng.uniform(0.0, 1.0),
        earring=rng.choice(("drop", "drop", "hoop", "stud")) if rng.random() < 0.24 else None,
        earring_size=_log_normal(rng, 1.2, 0.5),
        earring_sides=sides,
    )


def _normal(rng: random.Random, mean: float, spread: float) -> float:
    """A normal draw clipped at two standard deviations, so that no face falls apart."""
    return mean + spread * max(-2.0, min(2.0, rng.gauss(0.0, 1.0)))


def _log_normal(rng: random.Random, mean: float, spread: float) -> float:
    """A log-normal draw with median ``mean`` and a relative spread."""
    return mean * math.exp(_normal(rng, 0.0, spread))


def ear_place(head: Head, pose: Pose, side: int) -> tuple[float, float]:
    """Centre of an ear: when the head turns, the far one slides behind it and the near one comes forward."""
    out = head.half_width + 0.004 - side * pose.yaw * (0.07 if side * pose.yaw > 0 else 0.02)
    return head.centre + side * out, 0.0


def eye_place(eyes: Eyes, pose: Pose, side: int) -> tuple[float, float]:
    """Centre and width factor of an eye: the far one is closer to the nose and narrower."""
    return side * eyes.spacing * (1.0 - 0.08 * side * pose.yaw), 1.0 - 0.14 * side * pose.yaw
