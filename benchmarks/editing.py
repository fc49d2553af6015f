"""Where a local edit should start, measured: ``python -m benchmarks.editing [MODEL] [--json FILE]``.

Unseen drawn faces are edited by a changed mask (a hat in place of the upper hair, more hair, fuller lips) from both
starts of `ssmgen.pipeline.edit`, ``inversion`` and ``noise``, and judged on

- outside: RMS error of the pixels that should stay, of 255, as decoded and as returned;
- inside: share of the changed pixels in which the shipped parser finds the new class;
- colour: distance, of 255, between the mean colour of the new pixels of a class and of those that were there, where
  there were any: grown hair should have the colour of the hair it grows from.

The rows ``anew`` are the whole image drawn from the new mask, which keeps nothing.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import write
from recipes.sisma.evaluation.measure import load_named_parser
from recipes.sisma.pairs import HELD_OUT
from ssmgen import MaskToImage
from ssmgen.data import draw_face
from ssmgen.pipeline import STARTS, edit

MARGIN = 4


def main() -> None:
    """Print the table; write JSON if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="drawn-faces", help="what MaskToImage.from_pretrained takes")
    parser.add_argument("--faces", type=int, default=16, help="unseen faces, each edited in every way (default 16)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    pipe = MaskToImage.from_pretrained(arguments.model)
    rows = measure(pipe, arguments.faces)
    print(f"{'edit':<6} {'start':<10}{'decoded':>9}{'returned':>9}{'inside':>8}{'colour':>8}")
    for row in rows:
        colour = "-" if row["colour"] is None else f"{row['colour']:.1f}"
        print(
            f"{row['edit']:<6} {row['start']:<10}{row['outside_decoded']:>9.2f}{row['outside']:>9.2f}"
            f"{row['inside']:>8.3f}{colour:>8}"
        )
    command = shlex.join(["editing", str(arguments.model), "--faces", str(arguments.faces)])
    write(arguments.json, command, {"rows": rows, "faces": arguments.faces, "sampling": pipe.recipe.sampling})


def measure(pipe: MaskToImage, faces: int) -> list[dict[str, Any]]:
    """One row for each edit and start, means over the faces that the edit changes."""
    named = load_named_parser("drawn", pipe.recipe.labels)
    assert named is not None
    rows = []
    pairs = [draw_face(HELD_OUT + i, pipe.recipe.image_size) for i in range(faces)]
    for name, change in EDITS.items():
        edited = [(image, mask, change(mask, pipe.recipe.labels.classes)) for image, mask in pairs]
        edited = [(image, mask, new) for image, mask, new in edited if bool((mask != new).any())]
        for start in (*STARTS, "anew"):
            found = [judged(pipe, named.parser, start, *one, seed=index) for index, one in enumerate(edited)]
            row: dict[str, Any] = {"edit": name, "start": start, "faces": len(found)}
            for key in found[0]:
                values = [one[key] for one in found if one[key] is not None]
                row[key] = sum(values) / len(values) if values else None
            rows.append(row)
    return rows


class _Watched(MaskToImage):
    """Keeps what an edit looks like before the image is pasted around it."""

    def __init__(self, pipe: MaskToImage) -> None:
        super().__init__(pipe.model, pipe.autoencoder, pipe.recipe)

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded = super().decode(latents)
        return self.decoded


def judged(
    pipe: MaskToImage, parser: Any, start: str, image: Tensor, mask: Tensor, new: Tensor, *, seed: int
) -> dict[str, float | None]:
    """The figures of one edit of one face."""
    changed = mask != new
    stays = ~(F.max_pool2d(changed[None, None].float(), 2 * MARGIN + 1, 1, MARGIN)[0, 0] > 0)
    shown = _Watched(pipe)
    if start == "anew":
        result = shown(new, seed=seed, output_type="pt")[0]
    else:
        result = edit(shown, image, mask, new, start=start, seed=seed, margin=MARGIN, output_type="pt")[0]
    truth = image.float() / 255
    found = parser.parse(result[None] * 2 - 1)[0]
    return {
        "outside_decoded": _rms((shown.decoded[0] - truth)[:, stays]),
        "outside": _rms((result - truth)[:, stays]),
        "inside": float((found == new)[changed].float().mean()),
        "colour": _colour(result, truth, mask, new),
    }


def _colour(result: Tensor, truth: Tensor, mask: Tensor, new: Tensor) -> float | None:
    distances = []
    for label in new[mask != new].unique():
        grown, before = (mask != new) & (new == label), mask == label
        if bool(before.any()):
            distances.append((result[:, grown].mean(1) - truth[:, before].mean(1)).norm() * 255)
    return float(torch.stack(distances).mean()) if distances else None


def _rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt() * 255)


def hat(mask: Tensor, classes: tuple[str, ...]) -> Tensor:
    """The upper 40 % of the hair becomes a hat, where there is none."""
    hair, hat_id = mask == classes.index("hair"), classes.index("hat")
    rows = hair.any(1).nonzero()
    if not len(rows) or bool((mask == hat_id).any()):
        return mask
    edge = int(rows[0] + 0.4 * (rows[-1] - rows[0]))
    upper = hair & (torch.arange(len(mask)) < edge)[:, None]
    return torch.where(upper, hat_id, mask).to(mask.dtype)


def hair(mask: Tensor, classes: tuple[str, ...]) -> Tensor:
    """The hair grows by a sixteenth of the side over the background."""
    return _grown(mask, classes, ("hair",), len(mask) // 16, over="background")


def lips(mask: Tensor, classes: tuple[str, ...]) -> Tensor:
    """The lips grow by two pixels over the skin."""
    return _grown(mask, classes, ("u_lip", "l_lip"), 2, over="skin")


def _grown(mask: Tensor, classes: tuple[str, ...], names: tuple[str, ...], pixels: int, *, over: str) -> Tensor:
    for name in names:
        label = classes.index(name)
        near = F.max_pool2d((mask == label)[None, None].float(), 2 * pixels + 1, 1, pixels)[0, 0] > 0
        mask = torch.where(near & (mask == classes.index(over)), label, mask).to(mask.dtype)
    return mask


EDITS: dict[str, Callable[[Tensor, tuple[str, ...]], Tensor]] = {"hat": hat, "hair": hair, "lips": lips}


if __name__ == "__main__":
    main()
