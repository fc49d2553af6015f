"""Drawing a face from its parts, back to front; a data set of faces; and their files as CelebAMask-HQ has them.

Letters: ``c`` canvas, ``g`` geometry, ``a`` appearance.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssmgen.data.drawn_faces.appearance import Appearance, random_appearance
from ssmgen.data.drawn_faces.canvas import Canvas, rgb
from ssmgen.data.drawn_faces.clothing import paint_body, paint_earrings, paint_glasses, paint_hat
from ssmgen.data.drawn_faces.face import (
    front_hair,
    hair_colours,
    hair_mass,
    head_shape,
    paint_back_hair,
    paint_ears,
    paint_face,
    paint_neck,
)
from ssmgen.data.drawn_faces.geometry import DRAWN_FACES_VERSION, random_geometry
from ssmgen.data.drawn_faces.words import attributes_of, words_of
from ssmgen.data.images import to_pil, write_png
from ssmgen.data.labels import CELEBAMASK19


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
    g, a = random_geometry(seed, index), random_appearance(seed, index if appearance is None else appearance)
    c = Canvas(size, g.pose, a.light)
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
    return c.image.clamp_(0.0, 1.0).mul_(255.0).round_().to(torch.uint8), c.mask


def _paint_backdrop(c: Canvas, a: Appearance) -> None:
    image = c.fabric(a.backdrop, c.x, c.y)
    for x, y, radius, colour in a.blobs:
        image = torch.lerp(image, rgb(colour), 0.6 * torch.sigmoid(25.0 * (radius - torch.hypot(c.x - x, c.y - y))))
    c.image.copy_(image)


class DrawnFaces(Dataset[tuple[Tensor, Tensor]]):
    """Faces ``start`` to ``start + count`` of a seed, each drawn when it is accessed.

    Args:
        count: number of faces.
        size: side of the images in pixels.
        seed: the set of faces.
        start: index of the first face, so that training and validation can share a seed without sharing a face.
    """

    labels = CELEBAMASK19

    def __init__(self, count: int, size: int = 128, seed: int = 0, start: int = 0) -> None:
        self.count, self.size, self.seed, self.start = count, size, seed, start

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return draw_face(self._index(i), self.size, self.seed)

    def words(self, i: int) -> str:
        """A sentence that states the attributes of face ``i``, which need not be drawn for it."""
        return words_of(self._index(i), self.seed)

    def attributes(self, i: int) -> dict[str, int]:
        """Class ids of the attributes of face ``i``, by the names in `ATTRIBUTES`."""
        return attributes_of(self._index(i), self.seed)

    def fingerprint(self) -> str:
        """Identifies the exact images, for caches and checkpoints."""
        faces = f"seed{self.seed}-start{self.start}-count{self.count}-size{self.size}"
        return f"drawn_faces-v{DRAWN_FACES_VERSION}-{faces}"

    def _index(self, i: int) -> int:
        if not -self.count <= i < self.count:
            raise IndexError(f"face {i} of {self.count}")
        return self.start + i % self.count


def write_official_layout(target: Path, count: int, size: int = 512, seed: int = 0, start: int = 0) -> None:
    """Write drawn faces in the layout of the official CelebAMask-HQ archive; face ``i`` gets the id ``i``.

    Args:
        target: folder for ``CelebA-HQ-img``, ``CelebAMask-HQ-mask-anno`` and the mapping to CelebA. The original
            numbers in the mapping are fictitious, but spread over CelebA's three partitions.
        count: number of faces.
        size: side of the masks in pixels; images are twice as large (512 and 1024 in the archive).
        seed: the set of faces.
        start: index of the first face.
    """
    target = Path(target)
    images = target / "CelebA-HQ-img"
    images.mkdir(parents=True, exist_ok=True)
    mapping = ["idx          orig_idx     orig_file"]
    for number in range(start, start + count):
        to_pil(draw_face(number, 2 * size, seed)[0]).save(images / f"{number}.jpg", quality=92)
        parts = target / "CelebAMask-HQ-mask-anno" / str(number // 2000)
        parts.mkdir(parents=True, exist_ok=True)
        mask = draw_face(number, size, seed)[1]
        for label, part in enumerate(CELEBAMASK19.classes):
            inside = mask == label
            if label > 0 and inside.any():  # each part that is present has a black-and-white image
                write_png(parts / f"{number:05d}_{part}.png", (inside * 255).to(torch.uint8).expand(3, -1, -1))
        # The step is coprime to CelebA's 202599 images, so the original numbers are scattered and unique.
        original = (119613 + 7919 * number) % 202599
        mapping.append(f"{number:<13}{original:<13}{original + 1:06d}.jpg")
    (target / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(mapping) + "\n", encoding="utf-8")
