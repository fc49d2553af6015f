"""Sample at sizes a model was not trained at: ``python -m tutorials.change_resolution``. See docs/tutorials/size.md."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.sisma.parser import SHIPPED, load_parser
from ssmgen import MaskToImage
from ssmgen.data import CELEBAMASK19, draw_face
from ssmgen.data.images import to_pil
from ssmgen.metrics import MaskAgreement

TRAINED = 128
SIZES = ((64, 64), (96, 96), (128, 128), (160, 160), (192, 192), (256, 256), (128, 96), (96, 128))


def main() -> None:
    options = parse()
    pipe = MaskToImage.from_pretrained(options.model)
    parser, _ = load_parser(SHIPPED)
    print("height x width   mIoU of samples   mIoU of real faces after the autoencoder")
    for height, width in SIZES[: options.sizes]:
        images, masks = faces(options.count, height, width)
        made = sample(pipe, masks)
        real = pipe.decode(pipe.autoencoder.encode(images.float() / 127.5 - 1))
        scores = [agreement(parser, some, height, width) for some in (made, real)]
        print(f"{height:6} x {width:<10}{scores[0]:.3f}{scores[1]:20.3f}")
        options.out.mkdir(parents=True, exist_ok=True)
        row = torch.cat([CELEBAMASK19.colorize(masks[0]), *(made[:4] * 255).round().to(torch.uint8)], dim=2)
        to_pil(row).save(options.out / f"{height}x{width}.png")


def sample(pipe: MaskToImage, masks: Tensor) -> Tensor:
    """Images ``(n, 3, h, w)`` in [0, 1] for masks ``(n, h, w)`` of any size that the patches fill."""
    made: Tensor = pipe.resized(masks.shape[1:])(masks, output_type="pt")
    return made


def faces(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Unseen faces: the centre of a square drawing with the longer side."""
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    pairs = [draw_face(1_000_000 + index, side) for index in range(count)]
    images, masks = (torch.stack(part) for part in zip(*pairs, strict=True))
    return images[..., top : top + height, left : left + width], masks[:, top : top + height, left : left + width]


@torch.no_grad()
def agreement(parser: torch.nn.Module, images: Tensor, height: int, width: int) -> float:
    """mIoU against the masks, both brought to the scale that the parser knows."""
    scale = TRAINED / max(height, width)
    known = int(height * scale), int(width * scale)
    seen = F.interpolate(images, known, mode="bilinear", antialias=True)
    found = MaskAgreement(CELEBAMASK19.classes)
    found.update(parser(seen * 2 - 1).argmax(1), faces(len(images), *known)[1])
    return found.result()["miou"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="drawn-faces", help="what MaskToImage.from_pretrained takes")
    parser.add_argument("--out", type=Path, default=Path("runs/sizes"), help="folder for a row of samples of each size")
    parser.add_argument("--count", type=int, default=32, help="unseen faces of each size")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many of the sizes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
