"""What the page's buttons call. Handlers return ``{component: value}``; a component left out keeps its value."""

import html
from collections.abc import Callable, Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from recipes.sisma.demo.exchange import (
    InvalidRequest,
    data_url,
    decode_png,
    encode_png,
    from_text,
    from_upload,
    ids_of_upload,
    image_from_url,
    to_text,
)
from recipes.sisma.demo.jobs import GenerationRequest, Job, JobRunner, JobStopped, Preview
from recipes.sisma.demo.results import show_progress, show_result
from ssmgen.data import LABEL_SETS
from ssmgen.data.images import from_pil
from ssmgen.data.transforms import check_same_shape
from ssmgen.pipeline.values import scaled_to

Updates = dict[Any, Any]
StartJob = Callable[[Tensor, GenerationRequest], Job]


class Handlers:
    """One method per button; ``settings`` are the arguments of `JobRunner.checked`, in its order.

    Args:
        runner: runs the jobs.
        parts: the page's components by name: ``painter``, ``upload``, ``progress``, ``results``, ``mask_message``,
            ``settings_message`` and ``edit_message``; and ``styles``, for each style of the model its ``control``,
            ``upload`` and ``message``.
    """

    def __init__(self, runner: JobRunner, parts: SimpleNamespace) -> None:
        self.runner, self.recipe, self.parts = runner, runner.pipe.recipe, parts

    def generate(self, mask: Any, *settings: Any) -> Iterator[Updates]:
        yield from self._run(mask, settings, self.runner.generate, self.parts.settings_message)

    def redraw(self, mask: Any, *inputs: Any) -> Iterator[Updates]:
        *settings, chosen, noise = inputs
        yield from self._run(
            mask, settings, lambda new, request: self.runner.redraw(*self._image(chosen), new, request, noise)
        )

    def vary(self, mask: Any, *inputs: Any) -> Iterator[Updates]:
        *settings, chosen, strength = inputs
        yield from self._run(
            mask, settings, lambda _, request: self.runner.vary(*self._image(chosen), strength, request)
        )

    def between(self, mask: Any, *inputs: Any) -> Iterator[Updates]:
        *settings, last = inputs
        yield from self._run(mask, settings, lambda labels, request: self.runner.between(labels, last, request))

    def upload(self, encoded: Any, order: Any) -> Updates:
        parts, labels = self.parts, self.recipe.labels
        try:
            self._check_order(order)
            upload = from_upload(encoded, labels, self.runner.size, order)
        except InvalidRequest as error:
            return {parts.upload: "", parts.mask_message: message_html(str(error), error=True)}
        count = len(upload.mask.unique())
        text = " ".join((f"Uploaded: {count} of {len(labels)} classes.", *upload.notes))
        return {parts.painter: to_text(upload.mask), parts.upload: "", parts.mask_message: message_html(text)}

    def upload_style(self, name: str, files: Any, order: Any) -> Updates:
        """Take a picture and its mask as the style ``name``; if they are none, the present one stays."""
        styles, labels = self.parts.styles[name], self.recipe.labels
        try:
            self._check_order(order)
            if not isinstance(files, dict) or not files.get("picture"):
                raise InvalidRequest("The picture cannot be read: choose a PNG, JPEG or WebP file.")
            image = from_pil(decode_png(files["picture"]).convert("RGB"))
            notes: tuple[str, ...] = ()
            mask = torch.zeros(image.shape[1:], dtype=torch.uint8)
            if self.runner.regional(name):
                upload = ids_of_upload(files.get("mask"), labels, order)
                mask, notes = upload.mask, upload.notes
            check_same_shape(image, mask)
        except InvalidRequest as error:
            return {styles.upload: None, styles.message: message_html(str(error), error=True)}
        except ValueError:
            said = f"The picture is {image.shape[2]} x {image.shape[1]} and its mask {mask.shape[1]} x {mask.shape[0]}"
            text = f"{said}: they must have the same shape and show the same part."
            return {styles.upload: None, styles.message: message_html(text, error=True)}
        image, mask = (scaled_to(each, self.runner.size) for each in (image, mask))
        value = {"png": data_url(encode_png(image)), "mask": to_text(mask), "name": "your picture"}
        text = " ".join(("The style is now that of your picture.", *notes))
        return {styles.control: value, styles.upload: None, styles.message: message_html(text)}

    def _check_order(self, order: Any) -> None:
        if order not in (*LABEL_SETS, self.recipe.labels.name):
            raise InvalidRequest(f"The class order must be one of {', '.join(LABEL_SETS)}.")

    def _run(self, mask: Any, settings: Any, start: StartJob, job_message: Any = None) -> Iterator[Updates]:
        """Run a job. An error appears below the control that caused it, and the results shown so far stay."""
        parts = self.parts
        idle = {parts.progress: None, parts.mask_message: "", parts.settings_message: "", parts.edit_message: ""}
        place = parts.mask_message
        try:
            labels = from_text(mask, self.recipe.labels)
            place = parts.settings_message
            request = self.runner.checked(*settings)
            place = parts.edit_message if job_message is None else job_message
            with closing(start(self.runner.pipe.labels_of(labels), request)) as job:
                for item in job:
                    if isinstance(item, Preview):
                        yield idle | {parts.progress: show_progress(item)}
                    else:
                        yield idle | {parts.results: show_result(item, self.recipe)}
        except (InvalidRequest, JobStopped) as error:
            yield idle | {place: message_html(str(error), error=True)}
        except Exception as error:  # a bug or a fault of the machine must not end the page
            print(f"error: {type(error).__name__}: {error}", flush=True)
            text = f"Drawing failed ({str(error).rstrip('.')}). Your mask and pictures are still here."
            yield idle | {place: message_html(text, error=True)}

    def _image(self, chosen: Any) -> tuple[Tensor, Tensor]:
        """The image to change and its mask."""
        if not isinstance(chosen, dict):
            raise InvalidRequest("There is no picture to change yet: generate one first.")
        image = image_from_url(chosen.get("png"), self.runner.size)
        return image, from_text(chosen.get("mask"), self.recipe.labels)


def message_html(text: str, error: bool = False) -> str:
    """A message as the page shows it."""
    return f'<p role="{"alert" if error else "status"}" class="{"bad" if error else "good"}">{html.escape(text)}</p>'
