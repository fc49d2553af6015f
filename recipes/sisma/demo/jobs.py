"""Sampling jobs: each runs in a thread, reports previews, and ends when it is done, closed or out of time."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ssmgen
from recipes.sisma.demo.exchange import InvalidRequest, from_text, image_from_url
from ssmgen import MaskToImage, Sampling
from ssmgen.ops import backends
from ssmgen.pipeline import STARTS, edit, interpolate, variations
from ssmgen.pipeline.mask_to_image import to_output

MAX_STEPS, MAX_IMAGES, MAX_GUIDANCE, MAX_SEED = 100, 8, 10.0, 2**31 - 1
#: Letters of a text.
MAX_TEXT = 500
#: Name of the queue in which jobs wait for the device.
DEVICE = "device"
_PREVIEW_EVERY = 0.3  # seconds


class JobStopped(Exception):
    """A job was stopped or ran out of time; the message is shown on the page."""


@dataclass(frozen=True)
class StylePicture:
    """A picture whose style is asked for.

    Attributes:
        image: ``(3, height, width)`` uint8, of the model's size.
        mask: its labels ``(height, width)``.
        name: what the page calls it.
        regional: whether the model takes the style by regions, so that the mask matters.
    """

    image: Tensor
    mask: Tensor
    name: str
    regional: bool


@dataclass(frozen=True)
class GenerationRequest:
    """Settings of a job, made by `JobRunner.checked`.

    ``told`` is what the model is told besides the mask, by condition: a text or a `StylePicture`.
    """

    seed: int
    sampling: Sampling
    num_images: int = 1
    told: Mapping[str, str | StylePicture] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """All of them side by side, as a result records them."""
        return {"seed": self.seed, **asdict(self.sampling), "num_images": self.num_images}

    @property
    def values(self) -> dict[str, Any]:
        """``told`` as the keywords of a `MaskToImage` call."""
        found: dict[str, Any] = {}
        for name, what in self.told.items():
            found[name] = what.image if isinstance(what, StylePicture) else what
            if isinstance(what, StylePicture) and what.regional:
                found[f"{name}_mask"] = what.mask.long()
        return found

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed per image."""
        return tuple(self.seed + i for i in range(self.num_images))


@dataclass(frozen=True)
class Preview:
    """Progress of a job: ``step`` of ``steps``, and the images at that step ``(n, 3, h, w)`` uint8."""

    step: int
    steps: int
    images: Tensor


@dataclass(frozen=True)
class JobResult:
    """What a job produced.

    Attributes:
        images: ``(n, 3, h, w)`` uint8.
        mask: the mask they were sampled for, ``(h, w)``.
        seeds, names: one of each per image; the names are for display.
        settings: what reproduces the images.
        seconds: duration of the job.
        told: what the model was told besides the mask, see `GenerationRequest`.
        before: for an edit, the original image ``(3, h, w)`` uint8.
    """

    images: Tensor
    mask: Tensor
    seeds: tuple[int, ...]
    names: tuple[str, ...]
    settings: dict[str, Any]
    seconds: float
    told: Mapping[str, str | StylePicture] = field(default_factory=dict)
    before: Tensor | None = None


#: Yields previews and, at the end, the result; closing it stops the sampling at its next step.
Job = Generator[Preview | JobResult, None, None]
#: Samples images in [0, 1]; takes the callback that is called after each step.
Work = Callable[..., Tensor]


class JobRunner:
    """Runs jobs on a pipeline, one at a time.

    Args:
        pipe: the pipeline.
        timeout: seconds after which a job is stopped.
    """

    def __init__(self, pipe: MaskToImage, timeout: float = 120.0) -> None:
        self.pipe = pipe
        self.timeout = timeout
        self.solvers = [name for name in ssmgen.names("solver") if not ssmgen.build(name).adaptive]
        conditions = pipe.sampler.conditions
        kinds = {name: getattr(each, "takes", "") for name, each in conditions.items()}
        #: Names of the conditions that the page has a control for, by what they take.
        self.texts = [name for name, kind in kinds.items() if kind == "text" and name in pipe.recipe.text_encoders]
        self.styles = [name for name, kind in kinds.items() if kind == "picture"]
        self.scaled = [n for n in [*self.texts, *self.styles] if getattr(conditions[n], "dropout", 0) > 0]
        self._device = threading.Lock()
        self._stops: set[threading.Event] = set()

    def stop(self) -> None:
        """Stop the running job, if there is one, at its next step."""
        for event in tuple(self._stops):
            event.set()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of images and masks in pixels."""
        return self.pipe.recipe.size

    @property
    def guided(self) -> bool:
        """Whether the model was trained for guidance."""
        return getattr(self.pipe.sampler.conditions["mask"], "dropout", 0) > 0

    def regional(self, name: str) -> bool:
        """Whether a style is taken by regions of its mask."""
        return bool(self.pipe.sampler.conditions[name].classes)

    def checked(
        self, seed: Any, steps: Any, solver: Any, guidance: Any, num_images: Any = 1, *told: Any
    ) -> GenerationRequest:
        """A request with the values of the page's controls; raises an InvalidRequest if one is out of range.

        Args:
            seed, steps, solver, guidance, num_images: of the controls that every model has.
            *told: what the controls of `texts` and `styles` hold, then the guidance of each in `scaled`.
        """
        if solver not in self.solvers:
            raise InvalidRequest(f"The solver must be one of {', '.join(self.solvers)}.")
        scale = _number("Guidance", guidance, 0, MAX_GUIDANCE)
        if scale != 1 and not self.guided:
            raise InvalidRequest("This model was trained without guidance: leave it at 1.")
        first, steps = _whole_number("The seed", seed, 0, MAX_SEED), _whole_number("Steps", steps, 1, MAX_STEPS)
        given = self._told(told)
        sampling = self.pipe.recipe.sampling.replaced(
            steps=steps, solver=solver, guidance_scale=self._scales(scale, given, told)
        )
        count = _whole_number("The number of images", num_images, 1, MAX_IMAGES)
        return GenerationRequest(first, sampling, count, given)

    def _told(self, told: Sequence[Any]) -> dict[str, str | StylePicture]:
        """What the controls of texts and styles hold, without the empty ones."""
        found: dict[str, str | StylePicture] = {}
        for name, what in zip([*self.texts, *self.styles], told, strict=False):
            given = (_text if name in self.texts else self._style)(name, what) if what else None
            if given:
                found[name] = given
        return found

    def _style(self, name: str, given: Any) -> StylePicture:
        if not isinstance(given, dict):
            raise InvalidRequest(f"The {name} arrived incomplete: choose it again.")
        image = image_from_url(given.get("png"), self.size)
        mask = from_text(given.get("mask"), self.pipe.recipe.labels)
        if tuple(mask.shape) != self.size:
            raise InvalidRequest(f"The mask of the {name} has another size than its picture: choose it again.")
        return StylePicture(image, mask, str(given.get("name", ""))[:80], self.regional(name))

    def _scales(self, scale: float, given: Mapping[str, Any], told: Sequence[Any]) -> Any:
        """The guidance of the mask, or of each condition that has a value."""
        if len(self.pipe.sampler.conditions) == 1:
            return scale
        places = len(self.texts) + len(self.styles)
        values = dict(zip(self.scaled, told[places:], strict=False))
        scales = {name: _number(f"The guidance of {name}", value, 0, MAX_GUIDANCE) for name, value in values.items()}
        return {"mask": scale, **{name: value for name, value in scales.items() if name in given}}

    def generate(self, mask: Tensor, request: GenerationRequest) -> Job:
        """Images of a mask ``(h, w)``."""
        work = partial(self.pipe, mask, seed=request.seeds, num_images=request.num_images)
        settings = {"what": "generate", **request.settings}
        return self._run(work, request, settings, mask=mask, seeds=request.seeds)

    def redraw(
        self, image: Tensor, mask: Tensor, new_mask: Tensor, request: GenerationRequest, start: str = "noise"
    ) -> Job:
        """The image ``(3, h, w)`` of ``mask``, sampled anew where ``new_mask`` differs.

        Raises:
            InvalidRequest: the masks are equal, or the start is unknown or needs another solver.
        """
        if torch.equal(mask, new_mask):
            raise InvalidRequest("Nothing to redraw: the mask is still the picture's own. Paint on it first.")
        if start not in STARTS:
            raise InvalidRequest(f"The start must be one of {', '.join(STARTS)}.")
        if start == "inversion" and not ssmgen.build(request.sampling.solver).reversible:
            raise InvalidRequest(f"The solver {request.sampling.solver} cannot go back to the noise: choose another.")
        work = partial(edit, self.pipe, image, mask, new_mask, start=start, seed=request.seed)
        steps = request.sampling.steps * (2 if start == "inversion" else 1)
        settings = {"what": "redraw", "start": start, **request.settings, "num_images": 1}
        return self._run(work, request, settings, steps=steps, mask=new_mask, seeds=(request.seed,), before=image)

    def vary(self, image: Tensor, mask: Tensor, strength: Any, request: GenerationRequest) -> Job:
        """Variations of an image ``(3, h, w)`` of a mask; raises an InvalidRequest for a bad strength."""
        share = _number("Strength", strength, 0.05, 1)
        options = {"strength": share, "seed": request.seed, "num_images": request.num_images}
        work = partial(variations, self.pipe, image, mask, **options)
        settings = {"what": "vary", "strength": share, **request.settings}
        steps = max(1, round(request.sampling.steps * share))
        return self._run(work, request, settings, steps=steps, mask=mask, seeds=request.seeds, before=image)

    def between(self, mask: Tensor, last: Any, request: GenerationRequest) -> Job:
        """Images of a mask between the request's seed and another; raises an InvalidRequest unless they differ."""
        seeds = (request.seed, _whole_number("The other seed", last, 0, MAX_SEED))
        if seeds[0] == seeds[1]:
            raise InvalidRequest("The other seed must differ from the seed.")
        count = max(3, request.num_images)
        work = partial(interpolate, self.pipe, mask, seeds, count=count)
        names = [f"{100 * i // (count - 1)} %" for i in range(count)]
        names[0], names[-1] = (f"seed {seed}" for seed in seeds)
        settings = {"what": "between", "seeds": list(seeds), **request.settings, "num_images": count}
        return self._run(work, request, settings, names, mask=mask, seeds=(request.seed,) * count)

    def _run(
        self,
        work: Work,
        request: GenerationRequest,
        settings: dict[str, Any],
        names: Sequence[str] = (),
        steps: int = 0,
        **fields: Any,
    ) -> Job:
        """Yield previews and then the `JobResult`, whose remaining fields are ``fields``.

        Raises:
            JobStopped: the time-out was reached, or `stop` was called.
        """
        messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stop = threading.Event()
        self._stops.add(stop)
        started = time.monotonic()
        work = partial(work, output_type="pt", sampling=request.sampling, **request.values)
        steps = steps or request.sampling.steps
        threading.Thread(target=self._work, args=(work, steps, messages, stop), daemon=True).start()
        try:
            while True:
                left = started + self.timeout - time.monotonic()
                try:
                    message = messages.get(timeout=max(left, 0.01))
                except queue.Empty:
                    raise JobStopped(
                        f"Stopped after {self.timeout:.0f} seconds. Use fewer steps or images, or try again when the "
                        "machine is less busy."
                    ) from None
                if isinstance(message, Exception):
                    raise message
                if not isinstance(message, Preview):
                    break
                yield message
            names = tuple(names or (f"seed {seed}" for seed in fields["seeds"]))
            taken = time.monotonic() - started
            yield JobResult(message, names=names, settings=settings, seconds=taken, told=request.told, **fields)
        finally:
            stop.set()
            self._stops.discard(stop)

    def _work(self, work: Work, steps: int, messages: queue.SimpleQueue[Any], stop: threading.Event) -> None:
        """Sample in the job's thread; put previews and then the images, or the error, into the queue."""
        done, last_preview = 0, 0.0

        def callback(_: int, x: Tensor) -> None:
            nonlocal done, last_preview
            if stop.is_set():
                raise JobStopped("Stopped.")
            done += 1
            if time.monotonic() - last_preview >= _PREVIEW_EVERY:
                messages.put(Preview(min(done, steps), steps, to_output(self.pipe.decode(x), "uint8")))
                last_preview = time.monotonic()

        try:
            with self._device:  # a stopped job may still be in its last step
                messages.put(to_output(work(callback=callback), "uint8"))
        except Exception as error:
            messages.put(error)

    def about(self) -> str:
        """One line on the model, its device and the scan backend."""
        recipe, device = self.pipe.recipe, self.pipe.device.type
        millions = sum(p.numel() for p in self.pipe.model.parameters()) / 1e6
        scan = next((f"{n} ({s.detail})" for n, s in backends().items() if device in s.auto_for), "none")
        model = f"{recipe.model}, {millions:.1f} M parameters, {self.size[1]} x {self.size[0]} pixels"
        return f"{model}, {len(recipe.labels)} classes, on {device}; scan: {scan}."


def _text(name: str, given: Any) -> str:
    if not isinstance(given, str) or len(given) > MAX_TEXT:
        raise InvalidRequest(f"The {name} must be a text of at most {MAX_TEXT} letters.")
    return " ".join(given.split())


def _number(name: str, value: Any, least: float, most: float, wanted: str = "") -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidRequest(f"{name} must be {wanted or f'a number from {least:g} to {most:g}'}.")
    return float(value)


def _whole_number(name: str, value: Any, least: int, most: int) -> int:
    wanted = f"a whole number from {least:,} to {most:,}"
    number = _number(name, value, least, most, wanted)
    if not number.is_integer():
        raise InvalidRequest(f"{name} must be {wanted}.")
    return int(number)
