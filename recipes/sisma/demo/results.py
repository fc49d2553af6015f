"""What the browser is given: pictures as data addresses, and a zip of images, mask and settings, all made in memory."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from typing import Any

from torch import Tensor

import ssmgen
from recipes.sisma.demo.jobs import Pictures, Preview
from recipes.sisma.demo.masks import as_png, data_url, to_text
from ssmgen.data import LabelSet
from ssmgen.pipeline import Recipe

#: What the page says of a kind of pictures.
TITLES = {
    "generate": "Generated from the mask",
    "redraw": "Redrawn where the mask changed",
    "vary": "Variations of an image",
    "between": "From one seed to the other",
}


def progress(preview: Preview) -> dict[str, Any]:
    """How far the pictures are."""
    return {
        "step": preview.step,
        "steps": preview.steps,
        "images": [data_url(as_png(image)) for image in preview.images],
    }


def results(pictures: Pictures, mask: Tensor, recipe: Recipe, before: Tensor | None = None) -> dict[str, Any]:
    """Pictures of a mask ``(side, side)``, for the page.

    Args:
        pictures: the pictures.
        mask: their mask.
        recipe: of the model that drew them.
        before: the image they were made from, ``(3, side, side)`` uint8.
    """
    settings, labels = pictures.settings, recipe.labels
    files = zip(pictures.images, pictures.names, pictures.seeds, strict=True)
    return {
        "title": TITLES[settings["what"]],
        "caption": (
            f"{settings['steps']} steps of {settings['solver']}, guidance {settings['guidance_scale']:g}, "
            f"{pictures.seconds:.1f} s"
        ),
        "mask": to_text(mask),
        "mask_png": data_url(as_png(mask, labels)),
        "before": "" if before is None else data_url(as_png(before)),
        "images": [{"png": data_url(as_png(image)), "name": name, "seed": seed} for image, name, seed in files],
        "zip": base64.b64encode(archive(pictures, mask, recipe, before)).decode(),
    }


def archive(pictures: Pictures, mask: Tensor, recipe: Recipe, before: Tensor | None = None) -> bytes:
    """A zip of ``image-*.png``, ``mask.png`` (ids with a palette), ``before.png`` and ``settings.json``."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as zipped:  # PNGs are compressed already
        for number, image in enumerate(pictures.images):
            zipped.writestr(f"image-{number}.png", as_png(image))
        zipped.writestr("mask.png", as_png(mask, recipe.labels))
        if before is not None:
            zipped.writestr("before.png", as_png(before))
        zipped.writestr("settings.json", json.dumps(settings_of(pictures, recipe), indent=2) + "\n")
    return buffer.getvalue()


def settings_of(pictures: Pictures, recipe: Recipe) -> dict[str, Any]:
    """What made the pictures, with the call that makes generated ones again."""
    settings = dict(pictures.settings)
    content = {
        "ssmgen": ssmgen.__version__,
        "model": recipe.model,
        "about": recipe.about,
        **settings,
    }
    if settings["what"] == "generate":
        keys = ("steps", "solver", "guidance_scale", "seed", "num_images")
        content["call"] = f"pipe('mask.png', {', '.join(f'{key}={settings[key]!r}' for key in keys)})"
    return content


def brushes(labels: LabelSet) -> list[dict[str, Any]]:
    """Each class's id, colour and names, for the palette."""
    return [
        {"id": i, "name": READABLE.get(name, name.replace("_", " ")), "class": name, "colour": list(colour)}
        for i, (name, colour) in enumerate(zip(labels.classes, labels.palette, strict=True))
    ]


#: The data set's short names of the 19 face classes, spelled out. Left and right are the person's own.
READABLE = {
    **{"eye_g": "glasses", "l_eye": "left eye", "r_eye": "right eye", "l_brow": "left brow", "r_brow": "right brow"},
    **{"l_ear": "left ear", "r_ear": "right ear", "u_lip": "upper lip", "l_lip": "lower lip", "ear_r": "earring"},
    **{"neck_l": "necklace", "cloth": "clothes"},
}
