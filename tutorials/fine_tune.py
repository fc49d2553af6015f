"""Go on training a saved model with other data: ``python -m tutorials.fine_tune``. See docs/tutorials/fine-tune.md."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import ssmgen
from ssmgen import MaskToImage
from ssmgen.data import CELEBAMASK19, DrawnFaces, LatentCache, draw_face, write_latent_cache
from ssmgen.data.images import to_pil
from ssmgen.training import TrainSettings, train


class SepiaFaces(DrawnFaces):
    """The new look to learn; in earnest a `PairFolder` with some hundred pairs of your own."""

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, mask = super().__getitem__(i)
        grey = image.float().mean(dim=0)
        tone = torch.tensor([1.0, 0.82, 0.62]).view(3, 1, 1)
        return (grey * tone).round().to(torch.uint8), mask

    def fingerprint(self) -> str:
        return f"sepia-{super().fingerprint()}"


def main() -> None:
    options = parse()
    pipe = MaskToImage.from_pretrained(options.model)
    size = pipe.recipe.image_size
    masks = [draw_face(1_000_000 + index, size)[1] for index in range(options.masks)]
    before = pipe(masks, output_type="pt")

    cache = options.out / "cache"
    if not cache.exists():
        write_latent_cache(SepiaFaces(options.faces, size), pipe.autoencoder, cache)
    model = pipe.model.requires_grad_(True)  # a pipeline freezes its model
    settings = TrainSettings(steps=options.steps, batch_size=16, lr=3e-4, warmup=20, ema_decay=0.98, precision="auto")
    objective = ssmgen.build("flow-matching", t_sampling="logit-normal")
    result = train(model, objective, LatentCache(cache, CELEBAMASK19), settings, options.out / "run", resume="auto")

    recipe = replace(pipe.recipe, about=f"{pipe.recipe.about} Fine-tuned on sepia faces for {result.step} steps.")
    MaskToImage(result.ema, pipe.autoencoder, recipe).save_pretrained(options.out / "model")
    after = MaskToImage.from_pretrained(options.out / "model")(masks, output_type="pt")
    real = torch.stack([SepiaFaces(1, size, start=1_000_000 + i)[0][0] for i in range(options.masks)]) / 255
    for name, images in (("before", before), ("after", after), ("wanted", real)):
        print(f"{name}: {away_from_sepia(images):.4f} away from sepia")
    rows = [torch.cat([*images], dim=2) for images in (before, after)]
    to_pil((torch.cat(rows, dim=1) * 255).round().to(torch.uint8)).save(options.out / "before-after.png")


def away_from_sepia(images: Tensor) -> float:
    """Mean distance of the colours of ``(n, 3, h, w)`` in [0, 1] from the sepia of the same brightness."""
    tone = torch.tensor([1.0, 0.82, 0.62]).view(3, 1, 1)
    brightness = images.sum(dim=1, keepdim=True) / tone.sum()
    return (images - brightness * tone).abs().mean().item()


def with_other_classes(pipe: MaskToImage, count: int) -> nn.Module:
    """A model for ``count`` classes of your own, with all weights of ``pipe`` but those that belong to its classes."""
    model = ssmgen.build(pipe.recipe.model, **pipe.recipe.model_args | {"num_classes": count})
    fresh = model.state_dict()
    kept = {key: value for key, value in pipe.model.state_dict().items() if value.shape == fresh[key].shape}
    model.load_state_dict(fresh | kept)
    return model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="drawn-faces", help="what MaskToImage.from_pretrained takes")
    parser.add_argument("--out", type=Path, default=Path("runs/sepia"), help="folder to write")
    parser.add_argument("--faces", type=int, default=256, help="faces to draw")
    parser.add_argument("--masks", type=int, default=4, help="unseen masks to measure on")
    parser.add_argument("--steps", type=int, default=150, help="steps to train")
    return parser.parse_args()


if __name__ == "__main__":
    main()
