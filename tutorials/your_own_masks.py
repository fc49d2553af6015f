"""Train on your own masks: ``python -m tutorials.your_own_masks``. Explained in docs/tutorials/your-own-masks.md."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import ssmgen
from ssmgen import MaskToImage
from ssmgen.data import LabelSet, LatentCache, PairFolder, write_latent_cache
from ssmgen.pipeline import Recipe
from ssmgen.training import TrainSettings, train
from tutorials.drawn_street import CLASSES, write_folder

PALETTE = ((135, 190, 235), (170, 90, 70), (60, 130, 60), (200, 190, 170), (90, 90, 95), (220, 40, 40))
STREET = LabelSet("street6", CLASSES, PALETTE)


def main() -> None:
    options = parse()
    work, size = options.out, 64

    # 1. A folder with images/ and masks/. Yours is there already; this one is drawn.
    write_folder(work / "street", options.scenes, size)
    pairs = PairFolder(work / "street", STREET, size)

    # 2. Encode every image once. Pixels are small enough here; larger images want an autoencoder.
    autoencoder = ssmgen.build("identity")
    if not (work / "cache").exists():
        write_latent_cache(pairs, autoencoder, work / "cache")

    # 3. Train. A token is a patch of 4 x 4 pixels with 3 colours: 48 values, so 96 is the least width.
    model_args = {
        "num_classes": len(STREET),
        "in_channels": autoencoder.channels,
        "mask_scale": autoencoder.factor,
        "patch_size": 4,
        "dim": 96,
        "depth": 4,
        "mask_input": "add",
        "mask_dropout": 0.1,
    }
    torch.manual_seed(0)
    model = ssmgen.build("sisma-s", **model_args)
    settings = TrainSettings(
        steps=options.steps,
        batch_size=16,
        lr=2e-3,
        warmup=50,
        lr_decay_steps=options.steps,
        ema_decay=0.995,
        precision="auto",
    )
    objective = ssmgen.build("flow-matching", t_sampling="logit-normal")
    result = train(model, objective, LatentCache(work / "cache", STREET), settings, work / "run", resume="auto")
    print(f"trained to step {result.step} in {result.seconds:.0f} s")

    # 4. Save the averaged weights as a pipeline, load it, use it.
    sampling = {"solver": "ab3", "steps": 24, "guidance_scale": 2.0}
    recipe = Recipe("sisma-s", model_args, "identity", size, STREET, sampling, "Drawn street scenes, 64 pixels.")
    MaskToImage(result.ema, autoencoder, recipe).save_pretrained(work / "model")

    pipe = MaskToImage.from_pretrained(work / "model")
    write_folder(work / "unseen", options.unseen, size, start=1_000_000)
    masks = sorted((work / "unseen" / "masks").glob("*.png"))[:6]
    images = pipe(masks, seed=0, num_images=4)
    save_picture(work / "street.png", masks, images)

    # 5. Does it obey? Its loss on unseen scenes, with their own masks and with those of other scenes.
    unseen = PairFolder(work / "unseen", STREET, size)
    own, others = (unseen_loss(pipe, unseen, objective, shift) for shift in (0, 1))
    print(f"loss on {len(unseen)} unseen scenes: {own:.4f} with their masks, {others:.4f} with those of others")
    print(f"saved {work / 'model'} and {work / 'street.png'}")


@torch.no_grad()
def unseen_loss(pipe: MaskToImage, pairs: PairFolder, objective: Any, shift: int) -> float:
    """The training loss on all pairs at once, each image with the mask that comes ``shift`` pairs later."""
    images, masks = (torch.stack(part) for part in zip(*(pairs[i] for i in range(len(pairs))), strict=True))
    data = pipe.autoencoder.encode(images.float() / 127.5 - 1)
    same_noise = torch.Generator().manual_seed(0)
    return objective.loss(pipe.model, data, generator=same_noise, mask=masks.roll(-shift, dims=0)).item()


def save_picture(file: Path, masks: list[Path], images: list[Image.Image], side: int = 96) -> None:
    """A row for each mask: the mask in colours, what was made of it, and the image it was drawn with."""
    columns = len(images) // len(masks) + 2
    sheet = Image.new("RGB", (columns * side, len(masks) * side), "white")
    for row, mask in enumerate(masks):
        drawn = Image.open(mask.parents[1] / "images" / mask.name)
        labels = Image.open(mask)
        labels.putpalette([value for colour in PALETTE for value in colour])
        made = images[row * (columns - 2) : (row + 1) * (columns - 2)]
        for column, image in enumerate([labels.convert("RGB"), *made, drawn]):
            sheet.paste(
                image.resize((side - 4, side - 4), Image.Resampling.LANCZOS), (column * side + 2, row * side + 2)
            )
    sheet.save(file)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/street"), help="folder to write")
    parser.add_argument("--scenes", type=int, default=2048, help="scenes to draw")
    parser.add_argument("--unseen", type=int, default=64, help="more scenes, to look at and to measure")
    parser.add_argument("--steps", type=int, default=1500, help="steps to train")
    return parser.parse_args()


if __name__ == "__main__":
    main()
