"""Drawn street scenes with six classes: data for the tutorials that is not faces and needs no download.

Where things stand (the mask) and how they look (the image) are drawn by two generators, so one mask has many images.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

CLASSES = ("sky", "building", "tree", "pavement", "road", "car")
SKY, BUILDING, TREE, PAVEMENT, ROAD, CAR = range(6)
_FACADES = ((178, 98, 76), (214, 190, 150), (150, 156, 168), (120, 128, 110), (196, 150, 110))
_CARS = ((190, 40, 40), (40, 80, 170), (235, 235, 235), (60, 60, 66), (220, 180, 50))
_SKIES = (((96, 156, 226), (206, 226, 246)), ((44, 52, 100), (232, 150, 110)), ((150, 156, 166), (206, 208, 212)))


def draw_scene(index: int, size: int = 64, look: int | None = None) -> tuple[Image.Image, Image.Image]:
    """A square image ``RGB`` and its mask ``L`` of class ids; another ``look`` paints the same mask differently."""
    place, paint = Random(f"place {index}"), Random(f"look {index if look is None else look}")
    image, mask = Image.new("RGB", (size, size)), Image.new("L", (size, size), SKY)
    on_image, on_mask = ImageDraw.Draw(image), ImageDraw.Draw(mask)

    def both(kind: str, box: list[float], label: int, colour: tuple[int, int, int]) -> None:
        points = [round(value * size) for value in box]
        getattr(on_image, kind)(points, fill=colour)
        getattr(on_mask, kind)(points, fill=label)

    top, bottom = paint.choice(_SKIES)
    for y in range(size):
        share = y / size
        colour = tuple(round(a + (b - a) * share) for a, b in zip(top, bottom, strict=True))
        on_image.line([0, y, size, y], fill=colour)

    ground, x = place.uniform(0.55, 0.68), -0.05
    while x < 1:
        width, roof = place.uniform(0.15, 0.32), place.uniform(0.12, 0.42)
        if place.random() < 0.85:
            both("rectangle", [x, roof, x + width, ground], BUILDING, _near(paint.choice(_FACADES), paint))
            _windows(on_image, paint, [x, roof, x + width, ground], size)
        x += width + place.uniform(0, 0.06)
    grey = paint.randint(60, 105)
    both("rectangle", [0, ground, 1, 1], PAVEMENT, (grey + 70, grey + 66, grey + 58))
    centre = place.uniform(0.4, 0.6)
    both("polygon", [centre - 0.2, ground, centre + 0.2, ground, 1.1, 1, -0.1, 1], ROAD, (grey, grey, grey + 4))
    for dash in range(3):
        y = ground + (1 - ground) * (0.1 + 0.33 * dash)
        on_image.line([centre * size, y * size, centre * size, (y + 0.05) * size], fill=(236, 230, 200))
    for _ in range(place.randint(0, 3)):
        x, height = place.uniform(0.05, 0.95), place.uniform(0.2, 0.34)
        green = _near((58, 118, 52), paint)
        both("rectangle", [x - 0.02, ground - height / 2, x + 0.02, ground + 0.05], TREE, (92, 66, 44))
        both("ellipse", [x - 0.11, ground - height, x + 0.11, ground - height / 3], TREE, green)
    for _ in range(place.randint(0, 3)):
        x, y, colour = place.uniform(0.05, 0.75), place.uniform(ground + 0.05, 0.85), _near(paint.choice(_CARS), paint)
        long = 0.12 + 0.4 * (y - ground)
        both("rectangle", [x, y, x + long, y + long / 3], CAR, colour)
        both("rectangle", [x + long / 5, y - long / 5, x + long * 4 / 5, y], CAR, (150, 176, 190))
        for wheel in (0.22, 0.78):
            middle = x + long * wheel
            both(
                "ellipse", [middle - 0.025, y + long / 3 - 0.02, middle + 0.025, y + long / 3 + 0.03], CAR, (24, 24, 26)
            )
    return image, mask


def write_folder(root: Path, count: int, size: int = 64, start: int = 0) -> None:
    """``root/images/<name>.png`` and ``root/masks/<name>.png`` for ``count`` scenes."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for index in range(start, start + count):
        image, mask = draw_scene(index, size)
        image.save(root / "images" / f"scene-{index:05d}.png")
        mask.save(root / "masks" / f"scene-{index:05d}.png")


def _near(colour: tuple[int, ...], paint: Random) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, value + paint.randint(-18, 18))) for value in colour)
    return red, green, blue


def _windows(on_image: ImageDraw.ImageDraw, paint: Random, box: list[float], size: int) -> None:
    left, top, right, bottom = box
    lit = paint.random() < 0.4
    y = top + 0.05
    while y < bottom - 0.07:
        x = left + 0.04
        while x < right - 0.05:
            colour = (250, 220, 130) if lit and paint.random() < 0.6 else (52, 62, 78)
            on_image.rectangle([round(v * size) for v in (x, y, x + 0.03, y + 0.04)], fill=colour)
            x += 0.07
        y += 0.1
