"""The layout of the page, and which handler each button calls."""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from recipes.sisma.demo.exchange import MAX_BYTES, data_url, encode_png, to_text
from recipes.sisma.demo.handlers import Handlers, message_html
from recipes.sisma.demo.jobs import DEVICE, MAX_GUIDANCE, MAX_IMAGES, MAX_STEPS, JobRunner
from ssmgen.data import CELEBAMASK19, LABEL_SETS, LabelSet, draw_face
from ssmgen.data.drawn_faces import ATTRIBUTES, sentence
from ssmgen.data.transforms import center_crop_resize
from ssmgen.extras import require
from ssmgen.registry import divided

#: Jobs that may wait for their turn.
QUEUE = 16
_EXAMPLES = (2, 9, 19, 35, 14, 5)  # seeds of drawn faces
_LONGEST = 512  # pixels of an uploaded style picture's longer side
_ASSETS = Path(__file__).parent / "assets"

_LIMITS = (
    "**It can** draw pictures like its training images for any mask of its classes{able}, vary them, and redraw what "
    "you change while keeping the rest. **It cannot** {unable}keep a person's identity, or draw what was not in its "
    "training images. Masks unlike the training masks give poor pictures, and regions of a few pixels most often come "
    "out wrong."
)
#: Readable names of the 19 face classes whose short names need one. Left and right are the person's own.
READABLE = {
    **{"eye_g": "glasses", "l_eye": "left eye", "r_eye": "right eye", "l_brow": "left brow", "r_brow": "right brow"},
    **{"l_ear": "left ear", "r_ear": "right ear", "u_lip": "upper lip", "l_lip": "lower lip", "ear_r": "earring"},
    **{"neck_l": "necklace", "cloth": "clothes"},
}
_BUSY = (
    "The server did not accept the request; the notice in the corner says why. Your mask and pictures are still here: "
    "try again in a minute."
)
_STOPPED_HTML, _BUSY_HTML = json.dumps(message_html("Stopped.")), json.dumps(message_html(_BUSY, error=True))


def build_page(runner: JobRunner) -> Any:
    """The page as gradio Blocks; `serve` runs it."""
    # gradio and the hub's library that it brings read these when they are imported.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    gr = require("gradio", extra="demo")
    with gr.Blocks(analytics_enabled=False, title="ssmgen: paint a mask", elem_classes="ssmgen-page") as page:
        about = f"{runner.pipe.recipe.about} {limits(runner)}\n\n<small>{runner.about()}</small>"
        gr.Markdown(f"# Paint a mask, get a picture\n{about}")
        parts = SimpleNamespace()
        with gr.Row():
            with gr.Column(min_width=320):
                _add_painter(gr, runner, parts)
            with gr.Column(min_width=320):
                _add_settings(gr, runner, parts)
                with gr.Row():
                    parts.generate = gr.Button("Generate", variant="primary", elem_id="generate")
                    parts.stop = gr.Button("Stop", elem_id="stop")
                parts.settings_message = _message(gr, "settings-message")
                parts.progress = _custom_html(gr, "live", value=None)
                parts.results = _custom_html(gr, "results", value=None, store=_storage_key(runner))
                _add_edits(gr, parts)
        _connect(parts, Handlers(runner, parts))
    return page.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)


def limits(runner: JobRunner) -> str:
    """What the page says that the model can and cannot do."""
    able = [*(["the words"] if runner.texts else []), *(["the colours of another picture"] if runner.styles else [])]
    unable = [*([] if runner.texts else ["text"]), *([] if runner.styles else ["a photograph"])]
    given = f", with {' and '.join(able)} that you give it" if able else ""
    return _LIMITS.format(able=given, unable=f"follow {' or '.join(unable)}, " if unable else "")


def brushes(labels: LabelSet) -> list[dict[str, Any]]:
    """Id, colour and names of each class, for the painter."""
    return [
        {"id": i, "name": READABLE.get(name, name.replace("_", " ")), "class": name, "colour": list(colour)}
        for i, (name, colour) in enumerate(zip(labels.classes, labels.palette, strict=True))
    ]


def _add_painter(gr: Any, runner: JobRunner, parts: SimpleNamespace) -> None:
    """The mask painter, and the upload of a mask with its class order."""
    labels = runner.pipe.recipe.labels
    seeds = _EXAMPLES if labels == CELEBAMASK19 else ()
    parts.painter = _custom_html(
        gr,
        "painter",
        value="",
        brushes=brushes(labels),
        size=list(runner.size),
        examples=[to_text(_face(seed, runner)[1]) for seed in seeds],
        store=_storage_key(runner),
    )
    orders = list(LABEL_SETS) if labels in LABEL_SETS.values() else [labels.name]
    with gr.Row(equal_height=True):
        parts.order = gr.Dropdown(
            orders, value=labels.name, label="Class order of the file", min_width=200, visible=len(orders) > 1
        )
        parts.upload = _custom_html(gr, "upload", value="", max_bytes=MAX_BYTES, min_width=180)
    parts.mask_message = _message(gr, "mask-message")


def _face(seed: int, runner: JobRunner) -> tuple[Tensor, Tensor]:
    """A drawn face and its mask in the shape of the model's images."""
    return center_crop_resize(*draw_face(seed, max(runner.size)), runner.size)


def _add_settings(gr: Any, runner: JobRunner, parts: SimpleNamespace) -> None:
    """Seed, steps, solver, guidance and number of images, starting at the model's defaults."""
    defaults = runner.pipe.recipe.sampling
    with gr.Row():
        seed = gr.Number(value=0, precision=0, elem_id="seed", label="Seed", min_width=90)
        count = gr.Slider(1, MAX_IMAGES, value=4, step=1, label="Images", min_width=150)
    with gr.Row():
        steps = gr.Slider(1, MAX_STEPS, value=min(defaults.steps, MAX_STEPS), step=1, label="Steps", min_width=150)
        name = defaults.solver if defaults.solver in runner.solvers else runner.solvers[0]
        solver = gr.Dropdown(runner.solvers, value=name, label="Solver", min_width=110)
    info = "above 1, pictures follow the mask more closely" if runner.guided else "not available for this model"
    told = runner.texts or runner.styles
    guidance = _guidance(gr, runner, "mask", "Guidance of the mask" if told else "Guidance", info, runner.guided)
    parts.settings = [seed, steps, solver, guidance, count]
    _add_told(gr, runner, parts)


def _guidance(gr: Any, runner: JobRunner, name: str, label: str, info: str, interactive: bool = True) -> Any:
    """The slider of a condition's scale, at the model's default."""
    scale = runner.pipe.recipe.sampling.guidance_scale
    own = scale.get(name, 1.0) if isinstance(scale, Mapping) else scale
    given = {"value": min(own, MAX_GUIDANCE), "step": 0.1, "label": label, "info": info, "interactive": interactive}
    return gr.Slider(0, MAX_GUIDANCE, elem_id=f"guidance-{name}", **given)


def _add_told(gr: Any, runner: JobRunner, parts: SimpleNamespace) -> None:
    """What the model is told besides the mask: a field for each text, a choice for each style, and their guidance."""
    controls, scales, parts.styles = [], [], {}
    for name in runner.texts:
        given = {"label": name.replace("_", " ").capitalize(), "info": vocabulary(runner, name), "elem_id": name}
        controls.append(gr.Textbox("", lines=1, max_lines=1, placeholder="leave empty for none", **given))
        if name in runner.scaled:
            scales.append(
                _guidance(gr, runner, name, f"Guidance of {name}", "above 1, pictures follow the text more closely")
            )
    seeds = _EXAMPLES[:4] if runner.pipe.recipe.labels == CELEBAMASK19 else ()
    faces = [(f"example {i}", *_face(seed, runner)) for i, seed in enumerate(seeds, 1)]
    examples = [{"png": data_url(encode_png(image)), "mask": to_text(mask), "name": n} for n, image, mask in faces]
    for name in runner.styles:
        heading = f"{name.replace('_', ' ').capitalize()} from"
        control = _custom_html(gr, "style", name, value=None, heading=heading, examples=examples)
        limits = {"regional": runner.regional(name), "max_bytes": MAX_BYTES, "longest": _LONGEST}
        upload = _custom_html(gr, "style_upload", f"{name}-upload", value=None, **limits)
        message = _message(gr, f"{name}-message")
        parts.styles[name] = SimpleNamespace(control=control, upload=upload, message=message)
        controls.append(control)
        if name in runner.scaled:
            info = "above 1, pictures follow it more closely"
            scales.append(_guidance(gr, runner, name, f"Guidance of {name}", info))
    parts.settings += [*controls, *scales]


def vocabulary(runner: JobRunner, name: str) -> str:
    """A hint at the texts that a model knows: the words of drawn faces, where it reads fixed word vectors."""
    recipe = runner.pipe.recipe
    if divided(recipe.text_encoders[name])[0] != "word-vectors" or recipe.labels != CELEBAMASK19:
        return "A text like those of its training."
    said = []
    for attribute, values in ATTRIBUTES.items():
        noun = {"length": " hair", "glasses": "", "hat": ""}.get(attribute, f" {attribute}")
        said.append(" / ".join(value for value in values if value != "none") + noun)
    example = sentence({"hair": "black", "skin": "tan", "background": "blue"})
    return f"For example: {example}. It knows {'; '.join(said)}."


def _add_edits(gr: Any, parts: SimpleNamespace) -> None:
    """The ways to change a picture: the chosen picture, then controls and button of each."""
    with gr.Accordion("Change a picture", open=False, elem_id="edits"):
        parts.chosen = _custom_html(gr, "chosen", value=None)
        with gr.Tab("Redraw what I paint"):
            gr.Markdown("Change the mask: only what differs from the picture's own mask is redrawn.")
            starts = [("from new noise", "noise"), ("from the picture's own noise, slower", "inversion")]
            parts.start = gr.Radio(starts, value="noise", label="Start")
            parts.redraw = gr.Button("Redraw the change", elem_id="redraw")
        with gr.Tab("Variations"):
            parts.strength = gr.Slider(0.05, 1, value=0.6, step=0.05, label="How far from the picture")
            parts.vary = gr.Button("Draw variations", elem_id="vary")
        with gr.Tab("Between two seeds"):
            parts.last = gr.Number(value=1, precision=0, label="The other seed")
            parts.between = gr.Button("Draw the pictures between", elem_id="between")
        parts.edit_message = _message(gr, "edit-message")


def _connect(parts: SimpleNamespace, handlers: Handlers) -> None:
    """Let each button call its handler. The browser itself shows that a job waits, was stopped or was not accepted."""
    for control in (*parts.settings, parts.order, parts.start, parts.strength, parts.last):
        # gradio reports a bad value in a corner of the page; the handlers report it beside the control.
        control.preprocess = lambda value: value
    outputs = [parts.progress, parts.results, parts.mask_message, parts.settings_message, parts.edit_message]
    jobs = []
    for name, extra, message in [
        ("generate", [], parts.settings_message),
        ("redraw", [parts.chosen, parts.start], parts.edit_message),
        ("vary", [parts.chosen, parts.strength], parts.edit_message),
        ("between", [parts.last], parts.edit_message),
    ]:
        click, limits = getattr(parts, name).click, {"concurrency_id": DEVICE, "concurrency_limit": 1}
        _in_browser(click, {parts.progress: "(window.ssmgenStopped = false, {step: 0, steps: 1, images: []})"})
        inputs = [parts.painter, *parts.settings, *extra]
        jobs.append(click(getattr(handlers, name), inputs, outputs, show_progress="hidden", api_name=name, **limits))
        # A stopped job also ends as a failure.
        failed = {parts.progress: "null", message: f"window.ssmgenStopped ? {_STOPPED_HTML} : {_BUSY_HTML}"}
        _in_browser(jobs[-1].failure, failed)
    stopped = {parts.progress: "(window.ssmgenStopped = true, null)", parts.settings_message: _STOPPED_HTML}
    _in_browser(parts.stop.click, stopped, cancels=jobs)
    inputs, outputs = [parts.upload, parts.order], [parts.painter, parts.upload, parts.mask_message]
    parts.upload.upload(handlers.upload, inputs, outputs, concurrency_limit=2, api_name="upload")
    for name, style in parts.styles.items():
        outputs = [style.control, style.upload, style.message]
        read = partial(handlers.upload_style, name)
        style.upload.upload(read, [style.upload, parts.order], outputs, concurrency_limit=2, api_name=f"upload_{name}")


def _in_browser(event: Any, updates: dict[Any, str], **settings: Any) -> None:
    """On an event, set components to JavaScript expressions without asking the server."""
    script = f"() => [{', '.join(updates.values())}]"
    event(None, None, list(updates), js=script, api_visibility="private", **settings)


def _custom_html(gr: Any, name: str, elem_id: str = "", **props: Any) -> Any:
    """A component with its own markup and script from ``assets/``."""
    return gr.HTML(
        html_template=(_ASSETS / f"{name}.html").read_text(),
        js_on_load=(_ASSETS / f"{name}.js").read_text(),
        apply_default_css=False,
        elem_id=elem_id or name,
        **props,
    )


def _message(gr: Any, name: str) -> Any:
    return gr.HTML("", elem_id=name, elem_classes="message", apply_default_css=False)


def _storage_key(runner: JobRunner) -> str:
    """Where the browser keeps masks and results; models of other classes or sizes have another key."""
    return f"{runner.pipe.recipe.labels.name}-{runner.size[0]}x{runner.size[1]}"
