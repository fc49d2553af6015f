"""Shapes and painting of head, features, neck and hair. Letters: ``c`` canvas, ``g`` geometry, ``a`` appearance."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ssmgen.data.drawn_faces.appearance import Appearance, mix
from ssmgen.data.drawn_faces.canvas import Canvas, blend, bump, ellipse, intersect, rgb, smooth_union
from ssmgen.data.drawn_faces.geometry import SIDES, Geometry, Hair, Head, ear_place, eye_place


def head_shape(c: Canvas, head: Head) -> Tensor:
    """Two half outlines ``(height, width)``: an elliptic top, and a jaw whose squareness varies."""
    p = (c.u - head.centre).abs() / (head.half_width * (1.0 - 0.25 * c.v.clamp(min=0.0)))
    jaw = (p**head.jaw + (c.v.clamp(min=0.0) / head.chin) ** head.jaw) ** (1.0 / head.jaw)
    top = torch.sqrt(p * p + (c.v / head.top) ** 2)
    return (torch.where(c.v > 0, jaw, top) - 1.0) * head.half_width


def paint_face(c: Canvas, g: Geometry, a: Appearance, head: Tensor, hair: Tensor) -> None:
    """Paint skin, nose, eyes, brows and mouth; ``hair`` casts a shadow. Shapes are ``(height, width)``."""
    skin = _skin_colours(c, g, a, hair)
    c.paint(head, skin, "skin")
    nose = c.window(0.0, 0.01, (0.15, 0.13))
    _paint_nose(nose, g, skin[:, *nose.place])
    for side, letter in SIDES:
        u, _ = eye_place(g.eyes, c.pose, side)
        _paint_eye(c.window(u, -0.077, (0.07, 0.06)), g, a, side, letter)
        _paint_brow(c.window(u, -0.14, (0.13, 0.1)), g, a, side, letter)
    _paint_mouth(c.window(0.0, 0.2, (0.14, 0.2)), g, a)


def _skin_colours(c: Canvas, g: Geometry, a: Appearance, hair: Tensor) -> Tensor:
    """The skin of the face: a lit bulge with blush, eye sockets, and the shadow of the hair."""
    x, y = (c.u - g.head.centre) / (1.12 * g.head.half_width), c.v / 0.46
    coarse = torch.tensor(a.grain).view(1, 1, 10, 10)
    grain = interpolate(coarse, size=(c.size, c.size), mode="bilinear", align_corners=True)[0, 0]  # about -1..1
    shade = c.lit(x, y) + 0.02 * grain - 0.16 * torch.exp(-hair.clamp(min=0.0) / 0.018)
    for side, _ in SIDES:
        u, _ = eye_place(g.eyes, c.pose, side)
        shade = shade - 0.10 * torch.exp(-(((c.u - u) / 0.07) ** 2) - ((c.v + 0.085) / 0.035) ** 2)
    cheeks = torch.exp(-(((c.u.abs() - 0.15) / 0.06) ** 2) - ((c.v - 0.08) / 0.055) ** 2)
    return blend(a.skin, (0.85, 0.35, 0.32), a.blush * cheeks) * shade


def paint_ears(c: Canvas, g: Geometry, a: Appearance) -> None:
    """Paint both ears with their inner fold."""
    for side, letter in SIDES:
        u, v = ear_place(g.head, c.pose, side)
        near = c.window(u, v, (0.14, 0.17))
        x, y = near.u - u - side * 0.15 * (0.05 - near.v), near.v - v
        shape = ellipse(x, y, *g.head.ear)
        fold = bump(ellipse(x, y, 0.5 * g.head.ear[0], 0.6 * g.head.ear[1]), 0.01)
        shade = near.lit((near.u - g.head.centre) * 2.6, near.v * 2.0) - 0.22 * fold
        near.paint(shape, rgb(mix(a.skin, (0.8, 0.3, 0.25), 0.12)) * shade, f"{letter}_ear")


def _paint_nose(c: Canvas, g: Geometry, skin: Tensor) -> None:
    """Paint a bridge that widens into the tip, with two wings."""
    length, width = g.mouth.nose_length, g.mouth.nose_width
    u = c.u - 0.03 * c.pose.yaw * ((c.v + 0.08) / 0.18).clamp(0.0, 1.0)
    down = ((c.v + 0.085) / (length + 0.085)).clamp(0.0, 1.0)
    bridge = intersect(u.abs() - 0.032 - 0.7 * (width - 0.032) * down**1.6, c.v - length + 0.02)
    wings = ellipse(u, c.v - length + 0.036, width, 0.042)
    shape = smooth_union(intersect(bridge, -0.085 - c.v), wings, 0.035)
    side = u / 0.06 * (1.0 if c.light[0] < 0 else -1.0)
    edge = torch.exp(shape.clamp(max=0.0) / 0.014)
    shade = 1.0 - (0.10 + 0.16 * torch.sigmoid(3.0 * side)) * edge - 0.12 * bump(c.v - length, 0.02)
    ridge = 0.12 * bump(u, 0.014) + 0.14 * torch.exp(-((u / 0.02) ** 2) - ((c.v - length + 0.035) / 0.02) ** 2)
    c.paint(shape, skin * shade + ridge * 0.8 * skin.clamp(0.0, 1.0), "nose")
    for wing in (-1, 1):
        hole = ellipse(u - wing * 0.5 * width, c.v - length + 0.012, 0.016, 0.0085)
        c.paint(intersect(hole, shape), skin * 0.4, opacity=0.85)


def _paint_brow(c: Canvas, g: Geometry, a: Appearance, side: int, letter: str) -> None:
    """Paint an arched band, thicker towards the nose."""
    eyes = g.eyes
    u, narrow = eye_place(eyes, c.pose, side)
    p = side * (c.u - u * 1.02) / (eyes.brow_length * narrow)
    middle = -0.075 - eyes.brow_lift + eyes.brow_tilt * 0.08 * p - eyes.brow_arch * (1.0 - (p - 0.15) ** 2) + 0.016
    thickness = eyes.brow_thickness * (1.0 - 0.45 * p) * (1.0 - p.clamp(-1.0, 1.0) ** 6)
    shape = intersect((c.v - middle).abs() - thickness, (p.abs() - 1.0) * eyes.brow_length)
    hairs = 0.95 + 0.12 * torch.sin(110.0 * (c.u + 0.6 * side * c.v) + a.strands[0])
    c.paint(shape, rgb(a.brow) * hairs, f"{letter}_brow")


def _paint_eye(c: Canvas, g: Geometry, a: Appearance, side: int, letter: str) -> None:
    """Paint white, iris, pupil, highlight, and the dark edge of the upper lid."""
    u, narrow = eye_place(g.eyes, c.pose, side)
    x = c.u - u
    y = c.v + 0.077 + side * g.eyes.tilt * -x
    p = x / (g.eyes.half_width * narrow)
    lid = g.eyes.half_height * (1.0 - p * p)
    shape = intersect(-y - 1.12 * lid, y - 0.88 * lid)  # an almond
    x, y = x - 0.014 * g.eyes.gaze[0] - 0.012 * c.pose.yaw, y + 0.002 - 0.01 * g.eyes.gaze[1]
    ball = 0.93 - 6.0 * (x * x) * 8.0 - 0.25 * bump(y + g.eyes.half_height, 0.012)
    c.paint(shape, rgb((1.0, 0.98, 0.96)) * ball, f"{letter}_eye")
    radius = torch.hypot(x, y)
    iris = rgb(a.iris) * (0.75 + 18.0 * (y + 0.01).clamp(0.0, 0.03))
    c.paint(intersect(shape, radius - 0.0195), iris)
    c.paint(intersect(shape, radius - 0.0085), rgb((0.03, 0.03, 0.03)))
    highlight = torch.hypot(x - 0.007 * (1 if c.light[0] > 0 else -1), y + 0.007) - 0.0052
    c.paint(intersect(shape, highlight), rgb((1.0, 1.0, 1.0)))
    lash = intersect(shape, -(shape + 0.0035))
    c.paint(intersect(lash, y), rgb((0.10, 0.06, 0.05)), opacity=0.85)


def _paint_mouth(c: Canvas, g: Geometry, a: Appearance) -> None:
    """Paint teeth and lips. All edges are heights above or below the line of the mouth."""
    m = g.mouth
    p = (c.u - 0.012 * c.pose.yaw) / m.half_width
    y = c.v - 0.187 - m.smile * (0.5 - p * p) * 1.6 + 0.25 * m.gap - 0.012
    arch, bow = 1.0 - p * p, 1.0 - m.bow * bump(p, 0.16)
    half = 0.5 * m.gap * arch
    top, bottom = -m.upper * arch * bow - half, m.lower * arch + half
    if m.gap > 0:
        inside = intersect(-half - y, y - half)
        teeth = torch.sigmoid((0.3 * half - y) * 220.0)
        gaps = 1.0 - 0.10 * bump(torch.sin(75.0 * (c.u - 0.012 * c.pose.yaw)), 0.25)
        interior = blend((0.30, 0.06, 0.07), (0.95, 0.93, 0.88), teeth) * gaps
        c.paint(inside, interior * (0.75 + 0.25 * torch.sigmoid((y + half - 0.006) * 400.0)), "mouth")
    lower = intersect(half - y, y - bottom)
    shine = bump(y - 0.55 * (half + bottom), 0.009) * bump(c.u, 0.05)
    c.paint(lower, rgb(a.lips) * (0.95 - 0.2 * torch.exp((y - bottom).clamp(max=0.0) / 0.01)) + 0.16 * shine, "l_lip")
    upper = intersect(top - y, y + half)
    c.paint(upper, rgb(a.lips) * (0.72 + 4.0 * (top * 0.5 - half * 0.5 - y).clamp(-0.04, 0.04)), "u_lip")


def paint_neck(c: Canvas, g: Geometry, a: Appearance, head: Tensor) -> None:
    """Paint the neck as a cylinder in the shadow of the chin of ``head``, ``(height, width)``."""
    x = c.x - g.body.centre
    width = g.body.neck + g.body.flare * (c.y - 0.93).clamp(min=0.0) ** 2 * 12.0
    shade = c.lit(x / 0.24, torch.zeros_like(c.y), 0.3) * (0.92 - 0.35 * torch.exp(-head.clamp(min=0.0) / 0.05))
    c.paint(intersect(x.abs() - width, 0.7 - c.y), rgb(a.skin) * shade, "neck")


def skull_shape(c: Canvas, hair: Hair, head: Head) -> Tensor:
    """The hair that follows the skull, ``(height, width)``."""
    reach = -head.top + hair.crown
    return ellipse(c.u - head.centre, c.v + 0.12, head.half_width + hair.volume, reach - 0.12)


def hair_mass(c: Canvas, hair: Hair, head: Head) -> Tensor:
    """All hair with its uneven edge, ``(height, width)``, ignoring the face in front of it."""
    shape = skull_shape(c, hair, head)
    if hair.kind == "long":
        width = head.half_width + hair.volume + hair.flare * (c.v + 0.12)
        sides = (c.u - head.centre).abs() - width
        ends = c.v - hair.length + 0.03 * torch.cos(9.0 * c.u + hair.phase)
        shape = smooth_union(shape, intersect(intersect(sides, ends), -c.v - 0.12), 0.05)
    else:
        shape = intersect(shape, c.v - 0.12)
    angle = torch.atan2(c.u - head.centre, -c.v)
    fine = torch.sin(17.0 * angle + 2.0 * hair.phase) + 0.6 * torch.sin(29.0 * angle + hair.phase)
    return shape + (hair.curl * fine + 0.012 * torch.sin(5.0 * angle + hair.phase))


def front_hair(c: Canvas, hair: Hair, head: Head, mass: Tensor) -> Tensor:
    """The hair in front of the face, ``(height, width)``: the mass without the opening, cut where the locks end."""
    end = torch.where(c.u < head.centre, hair.locks[0], hair.locks[1])
    return intersect(intersect(mass, -_face_opening(c, hair, head)), c.v - end)


def _face_opening(c: Canvas, hair: Hair, head: Head) -> Tensor:
    """The opening of the hair for the face: side edges, and a hairline with a parting or a fringe."""
    u = c.u - head.centre
    width = torch.where(u < 0, hair.opening[0], hair.opening[1])
    p, q = u / width, (c.v - 0.05) / 0.5
    sides = ((p * p + q * q).sqrt() - 1.0) * head.half_width
    away = (c.u - hair.part).abs()
    line = hair.hairline + hair.slope * away * away * 3.0 + hair.fringe * c.u
    teeth = hair.teeth * torch.sin(31.0 * c.u + hair.phase) * torch.sin(53.0 * c.u + 2.0 * hair.phase)
    return intersect(torch.where(c.v > 0.05, u.abs() - width, sides), line + teeth - c.v)


def hair_colours(c: Canvas, g: Geometry, a: Appearance) -> Tensor:
    """Strands that fall from the parting, with a band of gloss around the head, ``(3, height, width)``."""
    sway, p, q, r, band = a.strands[:5]
    wave = 3.0 * g.hair.curl * torch.sin(22.0 * c.v + 6.0 * c.u + sway)
    along = (c.u - g.hair.part + wave) / (c.v + 0.95).clamp(min=0.2)
    strands = torch.sin(38.0 * along + p) + torch.sin(67.0 * along + q) + 0.7 * torch.sin(131.0 * along + r)
    gloss = bump(torch.hypot(c.u - g.head.centre, 0.8 * c.v) - 0.31 - 0.02 * torch.sin(23.0 * along + band), 0.05)
    lit = c.lit((c.u - g.head.centre) * 2.0, (c.v + 0.1) * 1.3, 0.3)
    light = (lit * (1.0 + 0.06 * strands)).clamp_(min=0.25)
    return rgb(a.hair) * light + (0.04 * strands + a.gloss * gloss) * (rgb(a.hair) * 0.6 + 0.12)


def paint_back_hair(c: Canvas, g: Geometry, mass: Tensor, colours: Tensor) -> None:
    """Paint the hair behind the head, ``mass`` ``(height, width)``; it is in shadow behind the neck."""
    if g.hair.kind != "bald":
        shade = 1.0 - 0.4 * torch.sigmoid(14.0 * (c.v - 0.1)) * bump(c.u - g.head.centre, 0.25)
        c.paint(mass, colours * shade, "hair")
