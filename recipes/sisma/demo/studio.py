"""What the page does with a model: pictures in a thread of their own, told step by step, stopped when asked or late."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import ssmgen
from recipes.sisma.demo.masks import Refused
from ssmgen import MaskToImage
from ssmgen.ops import backends
from ssmgen.pipeline import STARTS, edit, interpolate, variations

MAX_STEPS, MAX_IMAGES, MAX_GUIDANCE, MAX_SEED = 100, 8, 10.0, 2**31 - 1
_PREVIEW_EVERY = 0.3  # seconds


@dataclass(frozen=True)
class Wish:
    """What the controls say; checked by `checked`."""

    seed: int
    steps: int
    solver: str
    guidance_scale: float
    num_images: int = 1

    @property
    def sampling(self) -> dict[str, Any]:
        return {"steps": self.steps, "solver": self.solver, "guidance_scale": self.guidance_scale}


@dataclass(frozen=True)
class Preview:
    """How far a picture is: ``step`` of ``steps``, and its images so far ``(n, 3, size, size)`` uint8."""

    step: int
    steps: int
    images: Tensor


@dataclass(frozen=True)
class Pictures:
    """What came out: images ``(n, 3, size, size)`` uint8, their seeds (or names), and what would make them again."""

    images: Tensor
    names: tuple[str, ...]
    seeds: tuple[int, ...]
    seconds: float
    settings: dict[str, Any]


#: Previews as they come and the pictures in the end; closing it stops the work at its next step.
Job = Generator[Preview | Pictures, None, None]


class Stopped(Exception):
    """The picture was given up, by its owner or for being late."""


class Studio:
    """A pipeline and the one device it has.

    Args:
        pipe: what draws.
        timeout: seconds after which a picture is given up.
    """

    def __init__(self, pipe: MaskToImage, timeout: float = 120.0) -> None:
        self.pipe = pipe
        self.timeout = timeout
        self.solvers = [name for name in ssmgen.names("solver") if not ssmgen.build(name).adaptive]
        self._device = threading.Lock()

    @property
    def size(self) -> int:
        """Side of the images and masks."""
        return self.pipe.recipe.image_size

    @property
    def guided(self) -> bool:
        """Whether the model was trained for guidance."""
        return getattr(self.pipe.model, "mask_dropout", 0) > 0

    def checked(self, seed: Any, steps: Any, solver: Any, guidance_scale: Any, num_images: Any = 1) -> Wish:
        """The controls' values.

        Raises:
            Refused: one is out of range.
        """
        if solver not in self.solvers:
            raise Refused(f"The solver must be one of {', '.join(self.solvers)}.")
        guidance = _number("Guidance", guidance_scale, 0, MAX_GUIDANCE)
        if guidance != 1 and not self.guided:
            raise Refused("This model was trained without guidance: leave it at 1.")
        return Wish(
            seed=int(_number("The seed", seed, 0, MAX_SEED, whole=True)),
            steps=int(_number("Steps", steps, 1, MAX_STEPS, whole=True)),
            solver=solver,
            guidance_scale=guidance,
            num_images=int(_number("The number of images", num_images, 1, MAX_IMAGES, whole=True)),
        )

    def generate(self, mask: Tensor, wish: Wish) -> Job:
        """Images of a mask ``(size, size)``."""
        seeds = tuple(wish.seed + i for i in range(wish.num_images))

        def work(callback: Callable[[int, Tensor], None]) -> Tensor:
            return self.pipe(
                mask, seed=seeds, num_images=len(seeds), output_type="pt", callback=callback, **wish.sampling
            )

        return self._run(work, wish.steps, seeds, {"what": "generate", **asdict(wish)})

    def redraw(self, image: Tensor, mask: Tensor, new_mask: Tensor, wish: Wish, start: str = "noise") -> Job:
        """The image ``(3, size, size)`` of a mask, with what differs in another mask drawn anew.

        Raises:
            Refused: the masks are the same.
        """
        if torch.equal(mask, new_mask):
            raise Refused("Nothing to redraw: the mask is still that of the image. Paint on it first.")
        if start not in STARTS:
            raise Refused(f"The start must be one of {', '.join(STARTS)}.")

        def work(callback: Callable[[int, Tensor], None]) -> Tensor:
            settings = {**wish.sampling, "start": start, "seed": wish.seed, "output_type": "pt"}
            return edit(self.pipe, image, mask, new_mask, callback=callback, **settings)

        steps = wish.steps * (2 if start == "inversion" else 1)
        return self._run(work, steps, (wish.seed,), {"what": "redraw", "start": start, **asdict(wish), "num_images": 1})

    def vary(self, image: Tensor, mask: Tensor, strength: Any, wish: Wish) -> Job:
        """Images near one ``(3, size, size)`` of the same mask.

        Raises:
            Refused: a strength outside [0.05, 1].
        """
        share = _number("Strength", strength, 0.05, 1)
        seeds = tuple(wish.seed + i for i in range(wish.num_images))

        def work(callback: Callable[[int, Tensor], None]) -> Tensor:
            settings = {**wish.sampling, "seed": wish.seed, "num_images": len(seeds), "output_type": "pt"}
            return variations(self.pipe, image, mask, strength=share, callback=callback, **settings)

        steps = max(1, round(wish.steps * share))
        return self._run(work, steps, seeds, {"what": "vary", "strength": share, **asdict(wish)})

    def between(self, mask: Tensor, last: Any, wish: Wish) -> Job:
        """Images of a mask from one seed to another.

        Raises:
            Refused: the seeds are the same, or out of range.
        """
        seeds = (wish.seed, int(_number("The other seed", last, 0, MAX_SEED, whole=True)))
        if seeds[0] == seeds[1]:
            raise Refused("The other seed must differ from the seed.")
        count = max(3, wish.num_images)

        def work(callback: Callable[[int, Tensor], None]) -> Tensor:
            settings = {**wish.sampling, "callback": callback, "output_type": "pt"}
            return interpolate(self.pipe, mask, seeds, count=count, **settings)

        names = [f"{100 * i // (count - 1)} %" for i in range(count)]
        names[0], names[-1] = (f"seed {seed}" for seed in seeds)
        settings = {"what": "between", "seeds": list(seeds), **asdict(wish), "num_images": count}
        return self._run(work, wish.steps, (wish.seed,) * count, settings, names)

    def _run(
        self,
        work: Callable[[Callable[[int, Tensor], None]], Tensor],
        steps: int,
        seeds: tuple[int, ...],
        settings: dict[str, Any],
        names: Sequence[str] = (),
    ) -> Job:
        """Previews as they come, and the pictures in the end.

        Closing the iterator stops the work at its next step.

        Raises:
            Stopped: it took longer than the time-out.
        """
        told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stop = threading.Event()
        started = time.monotonic()
        threading.Thread(target=self._work, args=(work, steps, told, stop), daemon=True).start()
        try:
            while True:
                left = started + self.timeout - time.monotonic()
                try:
                    news = told.get(timeout=max(left, 0.01))
                except queue.Empty:
                    raise Stopped(
                        f"Stopped after {self.timeout:.0f} seconds. Take fewer steps or images, or try again when the "
                        "machine is less busy."
                    ) from None
                if isinstance(news, Preview):
                    yield news
                elif isinstance(news, Exception):
                    raise news
                else:
                    taken = tuple(names) or tuple(f"seed {seed}" for seed in seeds)
                    yield Pictures(news, taken, seeds, time.monotonic() - started, self.pipe.sampling() | settings)
                    return
        finally:
            stop.set()

    def _work(
        self,
        work: Callable[[Callable[[int, Tensor], None]], Tensor],
        steps: int,
        told: queue.SimpleQueue[Any],
        stop: threading.Event,
    ) -> None:
        done, shown = 0, 0.0

        def callback(_: int, x: Tensor) -> None:
            nonlocal done, shown
            if stop.is_set():
                raise Stopped("Stopped.")
            done += 1
            if time.monotonic() - shown >= _PREVIEW_EVERY:
                told.put(Preview(min(done, steps), steps, _to_uint8(self.pipe.decode(x))))
                shown = time.monotonic()

        try:
            with self._device:  # what was stopped may still be at its last step
                told.put(_to_uint8(work(callback)))
        except Exception as error:
            told.put(error)

    def about(self) -> str:
        """What the model is and which scan runs it, in a line."""
        recipe, device = self.pipe.recipe, self.pipe.device.type
        millions = sum(p.numel() for p in self.pipe.model.parameters()) / 1e6
        scan = next((f"{n} ({s.detail})" for n, s in backends().items() if device in s.auto_for), "none")
        what = f"{recipe.model}, {millions:.1f} M parameters, {self.size} x {self.size} pixels"
        return f"{what}, {len(recipe.labels)} classes, on {device}; scan: {scan}."


def _number(name: str, value: Any, least: float, most: float, whole: bool = False) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    if not good or (whole and value != int(value)):
        span = f"a whole number from {least:,} to {most:,}" if whole else f"a number from {least:g} to {most:g}"
        raise Refused(f"{name} must be {span}.")
    return float(value)


def _to_uint8(images: Tensor) -> Tensor:
    return (images.float() * 255).round().to(torch.uint8).cpu()
