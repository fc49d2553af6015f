"""One face: its parts painted back to front."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmgen.data.drawn_faces.accessories import paint_earrings, paint_glasses, paint_hat
from ssmgen.data.drawn_faces.appearance import Appearance, random_appearance
from ssmgen.data.drawn_faces.body import paint_body, paint_neck
from ssmgen.data.drawn_faces.canvas import Canvas, fabric_colours, rgb
from ssmgen.data.drawn_faces.face import head_shape, paint_ears, paint_face
from ssmgen.data.drawn_faces.geometry import Geometry, random_geometry
from ssmgen.data.drawn_faces.hair import front_hair, hair_colours, hair_mass, paint_back_hair


@torch.no_grad()
def draw_face(index: int, size: int = 128, seed: int = 0, appearance: int | None = None) -> tuple[Tensor, Tensor]:
    """Draw one face.

    Args:
        index: number of the face; with ``seed`` it determines the geometry and so the mask.
        size: side of the square image in pixels. An index is the same face at every size.
        seed: each seed is an unlimited set of faces.
        appearance: number of the appearance (colours, light, patterns); by default ``index``.

    Returns:
        Image ``(3, size, size)`` uint8 RGB and mask ``(size, size)`` uint8 in the order of ``CELEBAMASK19``.
    """
    geometry = random_geometry(seed, index)
    colours = random_appearance(seed, index if appearance is None else appearance)
    canvas = Canvas(size, geometry.pose, colours.light)
    _paint_all(canvas, geometry, colours)
    return canvas.image.clamp_(0.0, 1.0).mul_(255.0).round_().to(torch.uint8), canvas.mask


def _paint_all(c: Canvas, g: Geometry, a: Appearance) -> None:
    """Paint all parts back to front. Letters: ``c`` canvas, ``g`` geometry, ``a`` appearance."""
    head, mass = head_shape(c, g.head), hair_mass(c, g.hair, g.head)
    front, strands = front_hair(c, g.hair, g.head, mass), hair_colours(c, g, a)
    _paint_backdrop(c, a)
    paint_back_hair(c, g, mass, strands)
    paint_neck(c, g, a, head)
    if g.hair.over_cloth:
        paint_body(c, g, a, head)
    paint_ears(c, g, a)
    paint_face(c, g, a, head, front)
    paint_glasses(c.window(0.0, -0.066, (0.4, 0.14)), g, a)
    if g.hair.kind != "bald":
        c.paint(front, strands, "hair")
    if not g.hair.over_cloth:
        paint_body(c, g, a, head)
    paint_earrings(c, g, a)
    paint_hat(c, g, a)


def _paint_backdrop(c: Canvas, a: Appearance) -> None:
    image = fabric_colours(c, a.backdrop, c.x, c.y)
    for x, y, radius, colour in a.blobs:
        image = torch.lerp(image, rgb(colour), 0.6 * torch.sigmoid(25.0 * (radius - torch.hypot(c.x - x, c.y - y))))
    c.image.copy_(image)
