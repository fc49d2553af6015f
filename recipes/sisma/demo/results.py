"""Job results for the browser: images as data URLs, and a zip of images, mask and settings, all made in memory."""

import base64
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import ssmgen
from recipes.sisma.demo.exchange import data_url, encode_png, to_text
from recipes.sisma.demo.jobs import JobResult, Preview, StylePicture
from ssmgen.pipeline import Recipe
from ssmgen.sampling import SETTINGS

#: Headings of the results, by kind of job.
TITLES = {
    "generate": "Generated from the mask",
    "redraw": "Redrawn where the mask changed",
    "vary": "Variations of a picture",
    "between": "From one seed to the other",
}


def show_progress(preview: Preview) -> dict[str, Any]:
    """Value of the progress component."""
    images = [data_url(encode_png(image)) for image in preview.images]
    return {"step": preview.step, "steps": preview.steps, "images": images}


def show_result(result: JobResult, recipe: Recipe) -> dict[str, Any]:
    """Value of the results component: images, mask, caption and zip."""
    settings = result.settings
    images = zip(result.images, result.names, result.seeds, strict=True)
    return {
        "title": TITLES[settings["what"]],
        "caption": (
            f"{settings['steps']} steps of {settings['solver']}, guidance {_scales(settings['guidance_scale'])}, "
            f"{result.seconds:.1f} s{_told(result)}"
        ),
        "mask": to_text(result.mask),
        "mask_png": data_url(encode_png(result.mask, recipe.labels)),
        "before": "" if result.before is None else data_url(encode_png(result.before)),
        "images": [{"png": data_url(encode_png(image)), "name": name, "seed": seed} for image, name, seed in images],
        "zip": base64.b64encode(archive(result, recipe)).decode(),
    }


def _scales(scale: Any) -> str:
    """A guidance scale, or those of several conditions, as the page shows them."""
    if isinstance(scale, Mapping):
        return ", ".join(f"{name} {value:g}" for name, value in scale.items())
    return f"{scale:g}"


def _told(result: JobResult) -> str:
    """What the model was told besides the mask, as the page shows it."""
    said = [f"{name}: {what if isinstance(what, str) else what.name}" for name, what in result.told.items()]
    return "".join(f"; {each}" for each in said)


def archive(result: JobResult, recipe: Recipe) -> bytes:
    """A zip of ``image-*.png``, ``mask.png`` (ids with a palette) and ``settings.json``.

    Also of ``before.png`` for an edit, and for a style its picture and mask.
    """
    files = {f"image-{number}.png": encode_png(image) for number, image in enumerate(result.images)}
    files["mask.png"] = encode_png(result.mask, recipe.labels)
    if result.before is not None:
        files["before.png"] = encode_png(result.before)
    for name, what in result.told.items():
        if isinstance(what, StylePicture):
            files |= {f"{name}.png": encode_png(what.image), f"{name}-mask.png": encode_png(what.mask, recipe.labels)}
    files["settings.json"] = (json.dumps(describe(result, recipe), indent=2) + "\n").encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as zipped:  # PNGs are already compressed
        for name, content in files.items():
            zipped.writestr(name, content)
    return buffer.getvalue()


def describe(result: JobResult, recipe: Recipe) -> dict[str, Any]:
    """The settings of a result; for generated images, also the call that reproduces them."""
    settings = result.settings
    content = {"ssmgen": ssmgen.__version__, "model": recipe.model, "about": recipe.about, **settings}
    told: dict[str, str] = {}
    for name, what in result.told.items():
        told |= {name: what} if isinstance(what, str) else {name: f"{name}.png"}
        if isinstance(what, StylePicture) and what.regional:
            told[f"{name}_mask"] = f"{name}-mask.png"
    content |= told
    if settings["what"] == "generate":
        given = {**told, **{key: settings[key] for key in (*SETTINGS, "seed", "num_images")}}
        content["call"] = f"pipe('mask.png', {', '.join(f'{key}={value!r}' for key, value in given.items())})"
    return content
