"""Shapes and painting of neck, clothing and necklace. Letters: ``c`` canvas, ``g`` geometry, ``a`` appearance."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmgen.data.drawn_faces.appearance import Appearance
from ssmgen.data.drawn_faces.canvas import Canvas, fabric_colours, intersect, rgb
from ssmgen.data.drawn_faces.geometry import Body, Geometry


def paint_neck(c: Canvas, g: Geometry, a: Appearance, head: Tensor) -> None:
    """Paint the neck as a cylinder in the shadow of the chin."""
    lit = c.lit((c.x - g.body.centre) / 0.24, torch.zeros_like(c.y), 0.3)
    shade = lit * (0.92 - 0.35 * torch.exp(-head.clamp(min=0.0) / 0.05))
    c.paint(_neck_shape(c, g.body), rgb(a.skin) * shade, "neck")


def _neck_shape(c: Canvas, body: Body) -> Tensor:
    width = body.neck + body.flare * (c.y - 0.93).clamp(min=0.0) ** 2 * 12.0
    return intersect((c.x - body.centre).abs() - width, 0.7 - c.y)


def paint_body(c: Canvas, g: Geometry, a: Appearance, head: Tensor) -> None:
    """Paint clothing and necklace below the head."""
    _paint_cloth(c, g, a, head)
    _paint_necklace(c, g, a, head)


def _paint_cloth(c: Canvas, g: Geometry, a: Appearance, head: Tensor) -> None:
    if g.body.shoulder is None:
        return
    shape = intersect(_cloth_shape(c, g.body, g.body.shoulder), -head)
    x = c.x - g.body.centre
    fold = 0.06 * torch.sin(30.0 * x / (c.y - 0.5).clamp(min=0.1) + a.strands[5])
    shade = c.lit(x * 1.6, torch.full_like(c.y, 0.3), 0.3) + fold - 0.25 * torch.exp(shape.clamp(max=0.0) / 0.012)
    c.paint(shape, fabric_colours(c, a.cloth, c.x, c.y) * shade, "cloth")


def _cloth_shape(c: Canvas, body: Body, shoulder: float) -> Tensor:
    """Sloping shoulders with a round or pointed neckline."""
    x = (c.x - body.centre).abs()
    top = shoulder + body.slope * (x - 0.18).clamp(min=0.0) ** 1.5
    dip = (1.0 - x / body.neckline) if body.pointed else (1.0 - (x / body.neckline) ** 2)
    return (top + 0.5 * body.neckline * dip.clamp(min=0.0) - c.y) * 0.9


def _paint_necklace(c: Canvas, g: Geometry, a: Appearance, head: Tensor) -> None:
    """Paint a thin chain of beads. The picture ends at the neck, so often only its sides are visible."""
    if g.body.necklace is None:
        return
    x = c.x - g.body.centre
    hang = c.y - g.body.necklace + 2.4 * x * x
    shape = intersect(intersect(hang.abs() - 0.0034, x.abs() - g.body.neck + 0.01), -head)
    beads = 0.8 + 0.35 * torch.sin(300.0 * x)
    c.paint(shape, rgb(a.metal) * beads, "neck_l")
