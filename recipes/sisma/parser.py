"""Train a small parser, from image to labels, that measures whether generated images follow their masks.

    python -m recipes.sisma.parser out=runs/parser.safetensors            # drawn faces, as the one in assets/
    python -m recipes.sisma.parser data=PREPARED out=runs/parser.safetensors steps=1500

The safetensors file of this U-Net has its settings and its held-out score in the header. The score is on 512 unseen
drawn faces, or on the test split of the prepared folder, which is used for nothing else.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.sisma.arguments import UsageError, command_line, from_command_line, run_command
from recipes.sisma.autoencoder import rarity_weights, take_step
from recipes.sisma.pairs import held_out_pairs, in_memory, training_pairs
from recipes.sisma.presets import ASSETS, Config, checked_size, sides_of, size_of
from ssmgen.data import Pairs, flip_pair
from ssmgen.metrics import MaskAgreement
from ssmgen.precision import choose_precision
from ssmgen.training import StepOrder, derived_seed
from ssmgen.weights import load_weights, open_weights, tensors_of, write_weights

SHIPPED = ASSETS / "drawn-parser.safetensors"


@dataclass
class Settings:
    """Keys of the command line.

    Attributes:
        out: the file to write.
        data: ``drawn``, or a folder made by recipes.sisma.prepare.
        faces: drawn faces to train on.
        steps: optimiser steps.
        batch_size: images per step.
        lr: peak learning rate; it decays to zero.
        width: channels at full resolution; the coarsest of four has four times as many.
        image_size: side of the images in pixels, or height x width such as ``192x96``.
        precision: ``bf16`` autocast, ``no`` (float32), or ``auto``: bf16 if it is faster on this machine.
        held_out: unseen drawn faces to score it on; with a prepared folder, all test images are used.
        seed: of weights, order and augmentation.
    """

    out: str = "runs/parser.safetensors"
    data: str = "drawn"
    faces: int = 8192
    steps: int = 3000
    batch_size: int = 16
    lr: float = 3e-3
    width: int = 20
    image_size: int | str = 128
    precision: str = "auto"
    held_out: int = 512
    seed: int = 0


class UNetParser(nn.Module):
    """U-Net with four resolutions: ``width`` channels at the full one, four times as many at the coarsest."""

    multiple = 16  # of which the sides of images must be multiples

    def __init__(self, num_classes: int = 19, width: int = 16) -> None:
        super().__init__()
        widths = (width, 2 * width, 3 * width, 4 * width, 4 * width)
        self.down = nn.ModuleList(_block(a, b) for a, b in zip((3, *widths), widths, strict=False))
        pairs = list(zip(widths[1:], widths[:-1], strict=True))[::-1]
        self.up = nn.ModuleList(_block(deep + skip, skip) for deep, skip in pairs)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes, h, w)`` of images ``(batch, 3, h, w)`` in [-1, 1]; sides are multiples of 16."""
        x, skips = images, []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skips.pop()], dim=1))
        return self.head(x)

    @torch.no_grad()
    def parse(self, images: Tensor) -> Tensor:
        """Labels ``(batch, height, width)`` uint8 of images in [-1, 1]."""
        return self(images.contiguous(memory_format=torch.channels_last)).argmax(1).to(torch.uint8)


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        convolution = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(out_channels), nn.SiLU()]
    return nn.Sequential(*layers)


def load_parser(path: Path) -> tuple[UNetParser, dict[str, Any]]:
    """Load a parser and its card (settings and held-out score).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or holds no parser.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such parser; train one with {command_line('parser', f'out={path}')}")
    with open_weights(path) as file:
        header = file.metadata() or {}
    try:
        card = json.loads(header["card"])
        parser = UNetParser(card["num_classes"], card["width"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: is not a parser written by recipes.sisma.parser ({error!r})") from error
    load_weights(parser, path)
    return parser.eval().to(memory_format=torch.channels_last), card  # as in training: no copies


def save_parser(parser: UNetParser, path: Path, card: dict[str, Any]) -> None:
    """Write weights, in float16, and card into one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half() for name, value in tensors_of(parser).items()}
    write_weights(path, weights, {"card": json.dumps(card)})


def main(argv: list[str]) -> None:
    """Train a parser, score it on held-out images and save it."""
    settings = from_command_line(Settings(), argv)
    size = size_of(checked_size(settings.image_size))
    if isinstance(size, list):
        raise UsageError(f"image_size={settings.image_size}: a parser trains on one size, and takes others afterwards")
    if any(side % UNetParser.multiple for side in sides_of(size)):
        raise UsageError(f"image_size must be a multiple of {UNetParser.multiple}, got {settings.image_size}")
    if min(settings.steps, settings.batch_size, settings.width, settings.held_out) < 1:
        raise UsageError("steps, batch_size, width and held_out must be at least 1")
    choice = choose_precision(settings.precision)
    settings.precision = choice.precision
    torch.manual_seed(settings.seed)
    data = Config(data=settings.data, image_size=settings.image_size, drawn_count=settings.faces)
    unseen = held_out_pairs(data, settings.held_out)
    Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
    parser = UNetParser(len(unseen.labels), settings.width).to(memory_format=torch.channels_last)
    print(choice, file=sys.stderr)
    started = time.monotonic()
    _train(parser, settings, training_pairs(data))
    score = evaluate_parser(parser, unseen)
    card = {
        "num_classes": len(unseen.labels),
        "width": settings.width,
        "image_size": data.image_size,
        "data": "drawn faces" if settings.data == "drawn" else "prepared folder",
        "command": command_line("parser", *argv),
        "precision": settings.precision,
        "seconds": round(time.monotonic() - started),
        "held_out": score,
    }
    save_parser(parser, Path(settings.out), card)
    print(json.dumps(score, indent=2))
    print(f"saved {settings.out}")


def evaluate_parser(parser: UNetParser, pairs: Pairs) -> dict[str, Any]:
    """Score a parser on real images: ``miou``, ``pixel_accuracy``, ``iou`` by class, and their number ``n``."""
    agreement = MaskAgreement(pairs.labels.classes)
    for index in range(len(pairs)):
        image, mask = pairs[index]
        agreement.update(parser.parse(image.unsqueeze(0).float() / 127.5 - 1), mask.unsqueeze(0))
    result = agreement.result()
    return {key: result[key] for key in ("miou", "pixel_accuracy", "iou", "n")}


def _train(parser: UNetParser, settings: Settings, pairs: Pairs) -> None:
    optimizer = torch.optim.AdamW(parser.parameters(), lr=settings.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, settings.steps, pct_start=0.1)
    started = time.monotonic()
    parser.train()
    pool, labels = in_memory(pairs)
    weights = rarity_weights(labels, len(pairs.labels))
    order = StepOrder(len(pool), settings.batch_size, settings.seed)
    for step in range(settings.steps):
        chosen = [index for index, _ in order.batch(step)]
        images, masks = pool[chosen], labels[chosen].long()
        if derived_seed(settings.seed, "flip", step) % 2:
            images, masks = flip_pair(images, masks, pairs.labels)
        torch.manual_seed(derived_seed(settings.seed, "step", step))
        images = _degrade(images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = parser(images).float()
        loss = F.cross_entropy(logits, masks, weights) + 0.5 * _dice_loss(logits, masks)
        take_step(parser, optimizer, loss, step, started)
        schedule.step()
    parser.eval()


def _degrade(images: Tensor) -> Tensor:
    """Add noise, blur and a shift of tone, one amount per image: generated faces are softer than real ones."""
    count = len(images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, torch.rand(count, 1, 1, 1))
    gain = 1 + 0.2 * (torch.rand(count, 1, 1, 1) - 0.5)
    tone = 0.2 * (torch.rand(count, 3, 1, 1) - 0.5)
    return images * gain + tone + 0.1 * torch.rand(count, 1, 1, 1) * torch.randn_like(images)


def _dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """One minus the soft Dice coefficient over the classes in the batch: small classes count as much as large ones."""
    probabilities = logits.softmax(1)
    truth = F.one_hot(masks, logits.shape[1]).movedim(-1, 1).float()
    overlap, total = (probabilities * truth).sum((0, 2, 3)), (probabilities + truth).sum((0, 2, 3))
    present = truth.sum((0, 2, 3)) > 0
    return 1 - (2 * overlap / total.clamp(min=1))[present].mean()


if __name__ == "__main__":
    run_command(main)
