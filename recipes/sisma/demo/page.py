"""The page itself: controls, what they call, and the server they run on."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from recipes.sisma.demo.guard import LOCAL, Guard
from recipes.sisma.demo.jobs import MAX_GUIDANCE, MAX_IMAGES, MAX_STEPS, Job, Pictures, Stopped, Studio, Wish
from recipes.sisma.demo.masks import MAX_BYTES, Refused, from_text, from_upload, image_from, to_text
from recipes.sisma.demo.results import brushes, progress, results
from ssmgen.data import CELEBAMASK19, LABEL_SETS, draw_face
from ssmgen.extras import require

#: Jobs that may wait, and sessions the server remembers.
QUEUE, SESSIONS = 16, 32
_EXAMPLES = (2, 9, 19, 35, 14, 5)
_ASSETS = Path(__file__).parent / "assets"

LIMITS = (
    "**Can:** draw such pictures for any mask of its classes, vary one, redraw what you change and keep the rest. "
    "**Cannot:** follow words or a photograph, keep a person's identity, or draw what its training data did not have. "
    "Masks unlike those give poor pictures, and parts of a few pixels come out wrong most often."
)

BUSY = (
    "The server did not take the request: the note in the corner says why. Your mask and pictures are still here; try "
    "again in a minute."
)


def build_page(studio: Studio) -> Any:
    """The page as gradio Blocks; `serve` runs it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, too
    gr = require("gradio", extra="demo")
    about = studio.pipe.recipe.about
    with gr.Blocks(analytics_enabled=False, title="ssmgen: paint a mask", elem_classes="ssmgen-page") as page:
        gr.Markdown(f"# Paint a mask, get a picture\n{about} {LIMITS}\n\n<small>{studio.about()}</small>")
        with gr.Row():
            with gr.Column(min_width=320):
                painter, order, upload, mask_message = _painting(gr, studio)
            with gr.Column(min_width=320):
                controls = _controls(gr, studio)
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", elem_id="stop")
                message = _message(gr, "settings-message")
                live = _part(gr, "live", value=None)
                shown = _part(gr, "results", value=None, store=_store(studio))
                changes = _changes(gr)

        for one in (*controls, order, changes.start, changes.strength, changes.last):
            one.preprocess = _as_sent
        served = _Served(studio)
        given, outputs = [painter, *controls], [live, shown, mask_message, message, changes.message]
        running = [
            _job(generate, served.generate, given, outputs, message),
            _job(changes.redraw, served.redraw, [*given, changes.chosen, changes.start], outputs, changes.message),
            _job(changes.vary, served.vary, [*given, changes.chosen, changes.strength], outputs, changes.message),
            _job(changes.between, served.between, [*given, changes.last], outputs, changes.message),
        ]
        stopped = f"() => {{ window.ssmgenStopped = true; return [null, {_STOPPED}]; }}"
        stop.click(None, None, [live, message], js=stopped, cancels=running, api_visibility="private")
        upload.upload(
            served.upload, [upload, order], [painter, upload, mask_message], concurrency_limit=2, api_name="upload"
        )
    return page.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)


def serve(page: Any, *, host: str, port: int, open_browser: bool = False) -> str:
    """Serve the page; returns its address.

    Args:
        page: of `build_page`.
        host: the address to serve at.
        port: of the server; 0 takes a free one.
        open_browser: open the page in a browser.

    Raises:
        OSError: the port is taken, or the host is not one of this machine's addresses.
    """
    port = _checked_port(host, port)
    gr = require("gradio", extra="demo")
    starlette = require("starlette.middleware", extra="demo")
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Helvetica", "Arial", "sans-serif"]
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"], primary_hue="indigo")
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        share=False,
        quiet=True,
        show_error=True,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        blocked_paths=[],
        max_file_size=MAX_BYTES,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        state_session_capacity=SESSIONS,
        app_kwargs={
            "middleware": [starlette.Middleware(Guard, local=host in LOCAL)],
            "docs_url": None,
            "redoc_url": None,
        },
        theme=theme,
        css=(_ASSETS / "page.css").read_text(),
        prevent_thread_lock=True,
    )
    return str(address)


class _Served:
    """What the buttons call. Each yields the values of live, shown and the three messages, None for no change."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def generate(self, painted: Any, *controls: Any) -> Iterator[Any]:
        def start(mask: Tensor, wish: Wish) -> tuple[Job, Tensor, None]:
            return self.studio.generate(mask, wish), mask, None

        yield from self._run(painted, controls, start)

    def redraw(self, painted: Any, *given: Any) -> Iterator[Any]:
        *controls, chosen, begin = given

        def start(mask: Tensor, wish: Wish) -> tuple[Job, Tensor, Tensor]:
            image, old = self._chosen(chosen)
            return self.studio.redraw(image, old, mask, wish, begin), mask, image

        yield from self._run(painted, controls, start, editing=True)

    def vary(self, painted: Any, *given: Any) -> Iterator[Any]:
        *controls, chosen, strength = given

        def start(_: Tensor, wish: Wish) -> tuple[Job, Tensor, Tensor]:
            image, old = self._chosen(chosen)
            return self.studio.vary(image, old, strength, wish), old, image

        yield from self._run(painted, controls, start, editing=True)

    def between(self, painted: Any, *given: Any) -> Iterator[Any]:
        *controls, last = given

        def start(mask: Tensor, wish: Wish) -> tuple[Job, Tensor, None]:
            return self.studio.between(mask, last, wish), mask, None

        yield from self._run(painted, controls, start, editing=True)

    def upload(self, encoded: Any, order: Any) -> tuple[Any, str, str]:
        gr = require("gradio", extra="demo")
        labels = self.studio.pipe.recipe.labels
        try:
            if order not in (*LABEL_SETS, labels.name):
                raise Refused(f"The class order must be one of {', '.join(LABEL_SETS)}.")
            found = from_upload(encoded, labels, self.studio.size, order)
        except Refused as error:
            return gr.skip(), "", _words(str(error), bad=True)
        count = len(found.mask.unique())
        words = " ".join((f"Uploaded: {count} of {len(labels)} classes.", *found.notes))
        return to_text(found.mask), "", _words(words)

    def _run(self, painted: Any, controls: Any, start: Any, editing: bool = False) -> Iterator[Any]:
        """Run a job; what is refused is said below the control that caused it, and what was shown stays."""
        skip = require("gradio", extra="demo").skip()

        def said(place: int, text: str) -> list[Any]:
            return [None, skip, *("" if i != place else _words(text, bad=True) for i in range(3))]

        in_settings = 2 if editing else 1
        try:
            mask = from_text(painted, self.studio.pipe.recipe.labels)
        except Refused as error:
            yield said(0, str(error))
            return
        try:
            wish = self.studio.checked(*controls)
        except Refused as error:
            yield said(1, str(error))
            return
        try:
            mask = self.studio.pipe.labels_of(mask)
            job, mask, before = start(mask, wish)
            with closing(job):  # what is stopped here stops there
                for news in job:
                    if isinstance(news, Pictures):
                        yield [None, results(news, mask, self.studio.pipe.recipe, before), "", "", ""]
                    else:
                        yield [progress(news), skip, "", "", ""]
        except (Refused, Stopped) as error:
            yield said(in_settings, str(error))
        except Exception as error:  # a fault of ours or of the machine; the page and what it shows go on
            print(f"error: {type(error).__name__}: {error}", flush=True)
            yield said(
                in_settings,
                f"The picture could not be drawn ({str(error).rstrip('.')}). Your mask and pictures are still here.",
            )

    def _chosen(self, chosen: Any) -> tuple[Tensor, Tensor]:
        """The image to change and its mask."""
        if not isinstance(chosen, dict):
            raise Refused("There is no image to change yet: generate one first.")
        size = self.studio.size
        return image_from(chosen.get("png"), size), from_text(chosen.get("mask"), self.studio.pipe.recipe.labels)


def _painting(gr: Any, studio: Studio) -> tuple[Any, Any, Any, Any]:
    """The painter; class order and button of an upload; and the message below them."""
    labels = studio.pipe.recipe.labels
    drawn = _EXAMPLES if labels == CELEBAMASK19 else ()
    painter = _part(
        gr,
        "painter",
        value="",
        brushes=brushes(labels),
        side=studio.size,
        examples=[to_text(draw_face(seed, studio.size)[1]) for seed in drawn],
        store=_store(studio),
    )
    orders = list(LABEL_SETS) if labels in LABEL_SETS.values() else [labels.name]
    with gr.Row(equal_height=True):
        order = gr.Dropdown(
            orders, value=labels.name, label="Class order of the file", min_width=200, visible=len(orders) > 1
        )
        upload = _part(gr, "upload", value="", max_bytes=MAX_BYTES, min_width=180)
    return painter, order, upload, _message(gr, "mask-message")


def _store(studio: Studio) -> str:
    """Under which name the browser keeps masks and results: those of another model would not fit."""
    return f"{studio.pipe.recipe.labels.name}-{studio.size}"


def _changes(gr: Any) -> SimpleNamespace:
    """The controls that change a picture: ``chosen``, ``start``, ``redraw``, ``strength``, ``vary`` and so on."""
    with gr.Accordion("Change a picture", open=False, elem_id="edits"):
        chosen = _part(gr, "chosen", value=None)
        with gr.Tab("Redraw what I paint"):
            gr.Markdown("Change the mask: only what differs from the picture's mask is drawn anew.")
            starts = [("from new noise", "noise"), ("from the picture's own noise, slower", "inversion")]
            start = gr.Radio(starts, value="noise", label="Start")
            redraw = gr.Button("Redraw the change", elem_id="redraw")
        with gr.Tab("Variations"):
            strength = gr.Slider(0.05, 1, value=0.6, step=0.05, label="How far from the picture")
            vary = gr.Button("Draw variations", elem_id="vary")
        with gr.Tab("Between two seeds"):
            last = gr.Number(value=1, precision=0, label="The other seed")
            between = gr.Button("Draw the way between", elem_id="between")
        message = _message(gr, "edit-message")
    return SimpleNamespace(
        chosen=chosen,
        start=start,
        redraw=redraw,
        strength=strength,
        vary=vary,
        last=last,
        between=between,
        message=message,
    )


def _controls(gr: Any, studio: Studio) -> list[Any]:
    """Seed, steps, solver, guidance and number of images; the model's own values to begin with."""
    own = studio.pipe.sampling()
    with gr.Row():
        seed = gr.Number(value=0, precision=0, elem_id="seed", label="Seed", min_width=90)
        count = gr.Slider(1, MAX_IMAGES, value=4, step=1, label="Images", min_width=150)
    with gr.Row():
        steps = gr.Slider(1, MAX_STEPS, value=min(own["steps"], MAX_STEPS), step=1, label="Steps", min_width=150)
        preset = own["solver"] if own["solver"] in studio.solvers else studio.solvers[0]
        solver = gr.Dropdown(studio.solvers, value=preset, label="Solver", min_width=110)
    guidance = gr.Slider(
        0,
        MAX_GUIDANCE,
        value=min(own["guidance_scale"], MAX_GUIDANCE),
        step=0.1,
        label="Guidance",
        info="above 1 the mask is followed more closely" if studio.guided else "this model has none",
        interactive=studio.guided,
    )
    return [seed, steps, solver, guidance, count]


def _as_sent(value: Any) -> Any:
    """Instead of gradio's own check, which speaks in a corner of the page and not beside the control; ours follows."""
    return value


def _job(button: Any, call: Any, inputs: list[Any], outputs: list[Any], message: Any) -> Any:
    """Let a button run a job; in the browser alone: that it waits, and that the server did not take it."""
    live = outputs[0]
    waits = "() => { window.ssmgenStopped = false; return {step: 0, steps: 1, images: []}; }"
    button.click(None, None, [live], js=waits, api_visibility="private")
    job = button.click(
        call,
        inputs,
        outputs,
        concurrency_id="device",
        concurrency_limit=1,
        show_progress="hidden",
        api_name=call.__name__,
    )
    # A job that was stopped ends as a failure, too.
    failed = f"() => [null, window.ssmgenStopped ? {_STOPPED} : {json.dumps(_words(BUSY, bad=True))}]"
    job.failure(None, None, [live, message], js=failed, api_visibility="private")
    return job


def _part(gr: Any, name: str, **props: Any) -> Any:
    """A part of the page with markup and script of its own, from ``assets/``."""
    return gr.HTML(
        html_template=(_ASSETS / f"{name}.html").read_text(),
        js_on_load=(_ASSETS / f"{name}.js").read_text(),
        apply_default_css=False,
        elem_id=name,
        **props,
    )


def _message(gr: Any, name: str) -> Any:
    return gr.HTML("", elem_id=name, elem_classes="message", apply_default_css=False)


def _words(text: str, bad: bool = False) -> str:
    return f'<p role="{"alert" if bad else "status"}" class="{"bad" if bad else "good"}">{html.escape(text)}</p>'


_STOPPED = json.dumps(_words("Stopped."))


def _checked_port(host: str, port: int) -> int:
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            hint = "give another port=, or port=0 for a free one"
            raise OSError(f"cannot serve at {host}, port {port} ({error.strerror or error}): {hint}") from error
        return int(probe.getsockname()[1])
