"""Shape and painting of the hair. Letters: ``c`` canvas, ``g`` geometry, ``a`` appearance."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmgen.data.drawn_faces.appearance import Appearance
from ssmgen.data.drawn_faces.canvas import Canvas, bump, ellipse, intersect, rgb, smooth_union
from ssmgen.data.drawn_faces.geometry import Geometry, Hair, Head


def skull_shape(c: Canvas, hair: Hair, head: Head) -> Tensor:
    """The hair that follows the skull."""
    reach = -head.top + hair.crown
    return ellipse(c.u - head.centre, c.v + 0.12, head.half_width + hair.volume, reach - 0.12)


def hair_mass(c: Canvas, hair: Hair, head: Head) -> Tensor:
    """All hair, ignoring the face in front of it."""
    skull = intersect(skull_shape(c, hair, head), c.v - 0.12) if hair.kind != "long" else skull_shape(c, hair, head)
    if hair.kind == "long":
        width = head.half_width + hair.volume + hair.flare * (c.v + 0.12)
        sides = (c.u - head.centre).abs() - width
        ends = c.v - hair.length + 0.03 * torch.cos(9.0 * c.u + hair.phase)
        skull = smooth_union(skull, intersect(intersect(sides, ends), -c.v - 0.12), 0.05)
    return skull + _wobble(c, hair, head)


def front_hair(c: Canvas, hair: Hair, head: Head, mass: Tensor) -> Tensor:
    """The hair in front of the face: the mass without the opening, cut where the locks end."""
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


def _wobble(c: Canvas, hair: Hair, head: Head) -> Tensor:
    """The uneven edge of hair, as a function of the angle around the head."""
    angle = torch.atan2(c.u - head.centre, -c.v)
    fine = torch.sin(17.0 * angle + 2.0 * hair.phase) + 0.6 * torch.sin(29.0 * angle + hair.phase)
    return hair.curl * fine + 0.012 * torch.sin(5.0 * angle + hair.phase)


def hair_colours(c: Canvas, g: Geometry, a: Appearance) -> Tensor:
    """Strands that fall from the parting, with a band of gloss around the head."""
    sway, p, q, r, band = a.strands[:5]
    wave = 3.0 * g.hair.curl * torch.sin(22.0 * c.v + 6.0 * c.u + sway)
    along = (c.u - g.hair.part + wave) / (c.v + 0.95).clamp(min=0.2)
    strands = torch.sin(38.0 * along + p) + torch.sin(67.0 * along + q) + 0.7 * torch.sin(131.0 * along + r)
    gloss = bump(torch.hypot(c.u - g.head.centre, 0.8 * c.v) - 0.31 - 0.02 * torch.sin(23.0 * along + band), 0.05)
    lit = c.lit((c.u - g.head.centre) * 2.0, (c.v + 0.1) * 1.3, 0.3)
    light = (lit * (1.0 + 0.06 * strands)).clamp_(min=0.25)
    return rgb(a.hair) * light + (0.04 * strands + a.gloss * gloss) * (rgb(a.hair) * 0.6 + 0.12)


def paint_back_hair(c: Canvas, g: Geometry, mass: Tensor, colours: Tensor) -> None:
    """Paint the hair behind the head; it is in shadow behind the neck."""
    if g.hair.kind != "bald":
        shade = 1.0 - 0.4 * torch.sigmoid(14.0 * (c.v - 0.1)) * bump(c.u - g.head.centre, 0.25)
        c.paint(mass, colours * shade, "hair")
