"""The canvas that faces are painted on, colours per pixel, and the shapes that the parts are composed of.

A shape is a signed distance field on the pixel grid, ``(height, width)``, negative inside.
"""

import math
from copy import copy
from typing import Self

import torch
from torch import Tensor

from ssmgen.data.drawn_faces.appearance import Colour, Fabric
from ssmgen.data.drawn_faces.geometry import Pose
from ssmgen.data.labels import CELEBAMASK19

#: The points inside both shapes, and inside either.
intersect, union = torch.maximum, torch.minimum

CLASS_ID = {name: label for label, name in enumerate(CELEBAMASK19.classes)}


class Canvas:
    """Image ``(3, height, width)`` and mask ``(height, width)`` being painted; the grid as (x, y) and face (u, v)."""

    def __init__(self, size: int, pose: Pose, light: tuple[float, float]) -> None:
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

    def window(self, u: float, v: float, reach: tuple[float, float]) -> Self:
        """A view of the canvas around a point of the face, so that small parts are computed on few pixels."""
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
        """Coverage of each pixel in [0, 1]: the edge is one pixel wide."""
        return (0.5 - shape * self.size).clamp_(0.0, 1.0)

    def paint(self, shape: Tensor, colour: Tensor, label: str | None = None, opacity: float = 1.0) -> None:
        """Paint a shape and, where a label is given, assign that class to it."""
        self.image.lerp_(colour, (self.cover(shape) * opacity)[None].expand_as(self.image))
        if label is not None:
            self.mask.masked_fill_(shape < 0, CLASS_ID[label])

    def lit(self, x: Tensor, y: Tensor, strength: float = 0.35) -> Tensor:
        """Smooth shading of a bulge whose surface normal leans along ``(x, y)``, each about -1..1."""
        facing = (1.0 - x * x - y * y).clamp_(min=0.0).sqrt_()
        return 0.78 + strength * (x * self.light[0] + y * self.light[1]) + 0.26 * facing

    def fabric(self, fabric: Fabric, x: Tensor, y: Tensor) -> Tensor:
        """The pattern of a fabric on the grid, ``(3, height, width)``."""
        cos, sin = math.cos(fabric.angle), math.sin(fabric.angle)
        along, across = cos * x + sin * y, cos * y - sin * x
        wave, sharp = 2.0 * math.pi / fabric.pitch, 0.12 * self.size * fabric.pitch
        if fabric.kind == "stripes":
            share = (torch.sin(along * wave) * sharp + 0.5).clamp_(0.0, 1.0)
        elif fabric.kind == "dots":
            share = ((torch.sin(along * wave) * torch.sin(across * wave) - 0.45) * sharp + 0.5).clamp_(0.0, 1.0)
        elif fabric.kind == "gradient":
            share = torch.sigmoid(4.0 * (along - 0.5 * cos - 0.5 * sin))
        else:
            share = torch.zeros_like(along)
        return blend(fabric.first, fabric.second, share)


def rgb(colour: Colour) -> Tensor:
    """A colour as ``(3, 1, 1)``."""
    return torch.tensor(colour)[:, None, None]


def blend(first: Colour, second: Colour, share: Tensor) -> Tensor:
    """Per-pixel interpolation of two colours, ``(3, height, width)``."""
    return rgb(first) + (rgb(second) - rgb(first)) * share


def ellipse(x: Tensor, y: Tensor, rx: float, ry: float) -> Tensor:
    """Distance ``(height, width)`` to an axis-aligned ellipse, exact to first order at its edge."""
    p, q = x / rx, y / ry
    inner, slope = torch.sqrt(p * p + q * q), torch.sqrt((p / rx) ** 2 + (q / ry) ** 2)
    return inner * (inner - 1.0) / slope.clamp_(min=1e-6)


def box(x: Tensor, y: Tensor, rx: float, ry: float, corner: float) -> Tensor:
    """Distance ``(height, width)`` to a box with rounded corners."""
    p, q = x.abs() - (rx - corner), y.abs() - (ry - corner)
    outside = torch.sqrt(p.clamp(min=0.0) ** 2 + q.clamp(min=0.0) ** 2)
    return outside + torch.maximum(p, q).clamp(max=0.0) - corner


def bump(x: Tensor, width: float) -> Tensor:
    """A Gaussian of height one, elementwise for any shape of ``x``."""
    return torch.exp(-((x / width) ** 2))


def smooth_union(first: Tensor, second: Tensor, radius: float) -> Tensor:
    """Union of two ``(height, width)`` shapes whose inner corner is rounded with a radius."""
    overlap = (radius - (first - second).abs()).clamp_(min=0.0)
    return torch.minimum(first, second) - overlap * overlap / (4.0 * radius)
