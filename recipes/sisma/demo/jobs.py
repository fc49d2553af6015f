"""Sampling jobs: each runs in a thread, reports previews, and ends when it is done, closed or out of time."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ssmgen
from recipes.sisma.demo.exchange import InvalidRequest
from ssmgen import MaskToImage, Sampling
from ssmgen.ops import backends
from ssmgen.pipeline import STARTS, edit, interpolate, variations
from ssmgen.pipeline.mask_to_image import to_output

MAX_STEPS, MAX_IMAGES, MAX_GUIDANCE, MAX_SEED = 100, 8, 10.0, 2**31 - 1
#: Name of the queue in which jobs wait for the device.
DEVICE = "device"
_PREVIEW_EVERY = 0.3  # seconds


class JobStopped(Exception):
    """A job was stopped or ran out of time; the message is shown on the page."""


@dataclass(frozen=True)
class GenerationRequest:
    """Settings of a job, made by `JobRunner.checked`."""

    seed: int
    sampling: Sampling
    num_images: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """All of them side by side, as a result records them."""
        return {"seed": self.seed, **asdict(self.sampling), "num_images": self.num_images}

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed per image."""
        return tuple(self.seed + i for i in range(self.num_images))


@dataclass(frozen=True)
class Preview:
    """Progress of a job: ``step`` of ``steps``, and the images at that step ``(n, 3, size, size)`` uint8."""

    step: int
    steps: int
    images: Tensor


@dataclass(frozen=True)
class JobResult:
    """What a job produced.

    Attributes:
        images: ``(n, 3, size, size)`` uint8.
        mask: the mask they were sampled for, ``(size, size)``.
        seeds, names: one of each per image; the names are for display.
        settings: what reproduces the images.
        seconds: duration of the job.
        before: for an edit, the original image ``(3, size, size)`` uint8.
    """

    images: Tensor
    mask: Tensor
    seeds: tuple[int, ...]
    names: tuple[str, ...]
    settings: dict[str, Any]
    seconds: float
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
        self._device = threading.Lock()
        self._stops: set[threading.Event] = set()

    def stop(self) -> None:
        """Stop the running job, if there is one, at its next step."""
        for event in tuple(self._stops):
            event.set()

    @property
    def size(self) -> int:
        """Side of images and masks in pixels."""
        return self.pipe.recipe.image_size

    @property
    def guided(self) -> bool:
        """Whether the model was trained for guidance."""
        return getattr(self.pipe.sampler.conditions["mask"], "dropout", 0) > 0

    def checked(self, seed: Any, steps: Any, solver: Any, guidance: Any, num_images: Any = 1) -> GenerationRequest:
        """A request with the values of the page's controls; raises an InvalidRequest if one is out of range."""
        if solver not in self.solvers:
            raise InvalidRequest(f"The solver must be one of {', '.join(self.solvers)}.")
        scale = _number("Guidance", guidance, 0, MAX_GUIDANCE)
        if scale != 1 and not self.guided:
            raise InvalidRequest("This model was trained without guidance: leave it at 1.")
        first, steps = _whole_number("The seed", seed, 0, MAX_SEED), _whole_number("Steps", steps, 1, MAX_STEPS)
        sampling = self.pipe.recipe.sampling.replaced(steps=steps, solver=solver, guidance_scale=scale)
        return GenerationRequest(first, sampling, _whole_number("The number of images", num_images, 1, MAX_IMAGES))

    def generate(self, mask: Tensor, request: GenerationRequest) -> Job:
        """Images of a mask ``(size, size)``."""
        work = partial(self.pipe, mask, seed=request.seeds, num_images=request.num_images)
        settings = {"what": "generate", **request.settings}
        return self._run(work, request, settings, mask=mask, seeds=request.seeds)

    def redraw(
        self, image: Tensor, mask: Tensor, new_mask: Tensor, request: GenerationRequest, start: str = "noise"
    ) -> Job:
        """The image ``(3, size, size)`` of ``mask``, sampled anew where ``new_mask`` differs.

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
        """Variations of an image ``(3, size, size)`` of a mask; raises an InvalidRequest for a bad strength."""
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
        work, steps = partial(work, output_type="pt", sampling=request.sampling), steps or request.sampling.steps
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
            yield JobResult(message, names=names, settings=settings, seconds=time.monotonic() - started, **fields)
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
        model = f"{recipe.model}, {millions:.1f} M parameters, {self.size} x {self.size} pixels"
        return f"{model}, {len(recipe.labels)} classes, on {device}; scan: {scan}."


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
