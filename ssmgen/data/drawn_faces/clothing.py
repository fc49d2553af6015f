"""Shapes and painting of clothes and accessories. Letters: ``c`` canvas, ``g`` geometry, ``a`` appearance."""

import torch
from torch import Tensor

from ssmgen.data.drawn_faces.appearance import Appearance
from ssmgen.data.drawn_faces.canvas import CLASS_ID, Canvas, box, bump, ellipse, intersect, rgb, smooth_union, union
from ssmgen.data.drawn_faces.face import skull_shape
from ssmgen.data.drawn_faces.geometry import SIDES, Accessories, Geometry, ear_place, eye_place


def paint_body(c: Canvas, g: Geometry, a: Appearance, head: Tensor) -> None:
    """Paint clothes, with a round or pointed neckline, and a necklace below the head ``(height, width)``."""
    x = c.x - g.body.centre
    if g.body.shoulder is not None:
        away, neckline = x.abs(), g.body.neckline
        top = g.body.shoulder + g.body.slope * (away - 0.18).clamp(min=0.0) ** 1.5
        dip = (1.0 - away / neckline) if g.body.pointed else (1.0 - (away / neckline) ** 2)
        shape = intersect((top + 0.5 * neckline * dip.clamp(min=0.0) - c.y) * 0.9, -head)
        fold = 0.06 * torch.sin(30.0 * x / (c.y - 0.5).clamp(min=0.1) + a.strands[5])
        shade = c.lit(x * 1.6, torch.full_like(c.y, 0.3), 0.3) + fold - 0.25 * torch.exp(shape.clamp(max=0.0) / 0.012)
        c.paint(shape, c.fabric(a.cloth, c.x, c.y) * shade, "cloth")
    if g.body.necklace is not None:  # a thin chain of beads, of which often only the sides are in the picture
        hang = c.y - g.body.necklace + 2.4 * x * x
        shape = intersect(intersect(hang.abs() - 0.0034, x.abs() - g.body.neck + 0.01), -head)
        c.paint(shape, rgb(a.metal) * (0.8 + 0.35 * torch.sin(300.0 * x)), "neck_l")


def paint_glasses(c: Canvas, g: Geometry, a: Appearance) -> None:
    """Paint glasses. Behind clear lenses the eyes keep their labels; dark lenses hide them."""
    if g.accessories.glasses is None:
        return
    shape, lenses = _glasses_shapes(c, g, g.accessories.glasses)
    glare = 0.25 * torch.sigmoid(60.0 * (torch.sin(18.0 * (c.u + 0.6 * c.v)) - 0.75))
    eyes = ((c.mask == CLASS_ID["l_eye"]) | (c.mask == CLASS_ID["r_eye"])) & (lenses < 0)
    visible = c.mask[eyes]
    c.paint(lenses, rgb(a.lens) + glare, opacity=0.9 if g.accessories.dark else 0.2)
    c.paint(intersect(shape, -lenses), rgb(a.frame) + 0.6 * glare)
    c.mask.masked_fill_(shape < 0, CLASS_ID["eye_g"])
    if not g.accessories.dark:
        c.mask[eyes] = visible


def _glasses_shapes(c: Canvas, g: Geometry, lens: tuple[float, float, float, float]) -> tuple[Tensor, Tensor]:
    """The whole glasses, and the lenses within the rims."""
    half, height, corner, rim = lens
    outer, inner = [], []
    for side, _ in SIDES:
        u, narrow = eye_place(g.eyes, c.pose, side)
        x, y = c.u - u * 1.04, c.v + 0.066
        edge = box(x, y, half * narrow, height, corner * min(half * narrow, height))
        outer.append(edge - rim)
        inner.append(edge)
    bars = intersect((c.v + 0.085).abs() - 0.9 * rim, (c.u - g.head.centre).abs() - g.head.half_width)
    eyes_apart = union(c.u.abs() - 0.04, 0.12 - c.u.abs())
    return union(union(*outer), intersect(bars, eyes_apart)), union(*inner)


def paint_earrings(c: Canvas, g: Geometry, a: Appearance) -> None:
    """Paint the earrings, except on an ear that is turned away."""
    accessories = g.accessories
    for (side, _), worn in zip(SIDES, accessories.earring_sides, strict=True):
        if accessories.earring is None or not worn or side * c.pose.yaw > 0.55:
            continue
        u, v = ear_place(g.head, c.pose, side)
        near = c.window(u, v + 0.25, (0.2, 0.3))
        x = near.u - u - side * 0.01
        shape = _earring_shape(x, near.v - v - g.head.ear[1] + 0.012, accessories)
        shine = 0.8 + 0.5 * bump(x + 0.006, 0.008)
        near.paint(shape, rgb(a.stone if accessories.earring == "drop" else a.metal) * shine, "ear_r")


def _earring_shape(x: Tensor, y: Tensor, accessories: Accessories) -> Tensor:
    size = accessories.earring_size
    if accessories.earring == "stud":
        return torch.hypot(x, y) - 0.017 * size
    if accessories.earring == "hoop":
        return (torch.hypot(x, y - 0.05 * size) - 0.045 * size).abs() - 0.0075
    drop = ellipse(x, y - 0.06 * size, 0.02 * size, 0.045 * size)
    return smooth_union(drop, intersect(x.abs() - 0.006, intersect(-y, y - 0.06 * size)), 0.012)


def paint_hat(c: Canvas, g: Geometry, a: Appearance) -> None:
    """Paint the hat, shaded at its band or brim."""
    if g.accessories.hat is None:
        return
    shape, band = _hat_shape(c, g)
    u = c.u - g.head.centre
    shade = c.lit(u * 2.2, (c.v + 0.3) * 1.5, 0.35)
    shade = shade - 0.22 * c.cover(band) - 0.15 * torch.exp(shape.clamp(max=0.0) / 0.01)
    c.paint(shape, c.fabric(a.hat, c.u, c.v) * shade, "hat")


def _hat_shape(c: Canvas, g: Geometry) -> tuple[Tensor, Tensor]:
    """The hat, and its band or brim. It always covers the hair above its line."""
    e, head, u = g.accessories, g.head, c.u - g.head.centre
    line = e.hat_line + 0.35 * u * u
    cover = intersect(skull_shape(c, g.hair, head) - 0.035, c.v - line)
    if e.hat == "beanie":
        return cover, intersect(cover, line - 0.075 - c.v)
    crown = intersect(u.abs() - 0.25 - 0.1 * e.hat_size - 0.15 * (c.v + 0.3), c.v - line)
    if e.hat == "brim":
        reach = 0.42 + 0.14 * e.hat_size
        brim = ellipse(u, c.v - line + 0.02 - 0.25 * u.abs() * u.abs(), reach, 0.05)
        return union(union(crown, cover), brim), brim
    visor = ellipse(u - 0.1 * c.pose.yaw, c.v - line + 0.01, 0.27, 0.055)
    return smooth_union(cover, visor, 0.02), visor
