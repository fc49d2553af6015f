"""The one place where a model, an objective and a solver meet."""

from __future__ import annotations

import copy
import hashlib
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ssmgen.precision import sampling_dtype
from ssmgen.registry import build, explained, find, keywords
from ssmgen.solvers.base import Solver
from ssmgen.solvers.grid import shifted_grid

if TYPE_CHECKING:
    from collections.abc import Iterator


class MaskModel(Protocol):
    """What `sample` asks of a model: `ssmgen.models.SISMA` is one.

    A model may also have ``modulation(t)``: all that it derives from times ``(n,)`` alone, as ``(n, ...)``. It is then
    called with ``modulation=`` one row of that, and under guidance once with ``cond=`` a list of two conditions, each
    for one half of the batch.
    """

    training: bool

    def __call__(self, x: Tensor, t: Tensor, mask: Tensor | None = None, *, cond: Any = None) -> Tensor: ...

    def condition(self, mask: Tensor | None, size: tuple[int, int] | None = None) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def parameters(self) -> Iterable[Tensor]: ...


class Objective(Protocol):
    """What `sample` asks of an objective."""

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor: ...


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Noise ``(len(seeds), *shape)``, float32 on the CPU, in which image i depends on ``seeds[i]`` alone.

    Every bit of a seed counts. Seeds below 2**32 go to torch's CPU generator. It (mt19937) uses the lower 32 bits of a
    seed only, so the noise of larger seeds is made from the output of SHAKE-128, a hash function whose output is as
    long as one asks for.

    Args:
        seeds: one for each image, whole numbers from 0 to 2**64 - 1.
        shape: of one image's noise, (channels, height, width).

    Raises:
        TypeError: one seed instead of a list of them, one number instead of (channels, height, width), or a seed that
            is no whole number.
        ValueError: no seeds, or one out of range.
    """
    if not isinstance(seeds, Iterable) or not isinstance(shape, Iterable):
        raise TypeError(
            f"seeds is a list, one for each image, and shape is (channels, height, width): got {seeds!r} and {shape!r}"
        )
    wanted, size = [checked_seed(seed) for seed in seeds], tuple(shape)
    if not wanted:
        raise ValueError("seeds is empty: give one for each image")
    return torch.stack([_drawn(seed, size) if seed < 2**32 else _hashed(seed, size) for seed in wanted])


def _drawn(seed: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _hashed(seed: int, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    stream = bytearray(hashlib.shake_128(seed.to_bytes(8, "little")).digest(8 * count))
    bits = torch.frombuffer(stream, dtype=torch.int64)
    # The midpoints of 2**52 equal intervals: never 0 or 1, and exact in float64.
    uniform = ((bits >> 12 & 2**52 - 1).double() + 0.5) / 2**52
    return torch.special.ndtri(uniform).float().view(shape)


def checked_seed(seed: Any) -> int:
    """A seed as an int.

    Raises:
        TypeError: no whole number; True and False are none.
        ValueError: below 0, or 2**64 and above.
    """
    wanted = f"a seed is a whole number from 0 to 2**64 - 1, got {seed!r}"
    if isinstance(seed, bool):
        raise TypeError(wanted)
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(wanted) from None
    if not 0 <= number < 2**64:
        raise ValueError(wanted)
    return number


def image_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """The seeds of ``count`` images: those given, or ``seed`` and the next ones.

    Raises:
        TypeError, ValueError: see `checked_seed`; or a list of another length.
    """
    if isinstance(seed, str) or not isinstance(seed, Sequence):
        first = checked_seed(seed)
        return [checked_seed(first + i) for i in range(count)]
    if len(seed) != count:
        raise ValueError(f"give one seed, or one per image: got {len(seed)} seeds for {count} image(s)")
    return [checked_seed(one) for one in seed]


class Sampler:
    """A model made ready to sample: its weights in the dtype wanted, its step compiled.

    What does not change between steps is computed once per call: the conditions, and what the model derives from the
    times of the whole grid. Guidance is one batch of both halves.

    Args:
        model: a mask-conditioned model. It runs in evaluation mode and without gradients, and is put back as it was.
        dtype: run a copy of the model with its weights in this dtype (bfloat16 reads half the memory). Parameters
            marked ``keep_float32`` (A_log, D and the step-size bias of the scans) keep theirs, and the solver works in
            that of x0. None runs the model itself, and so does ``"auto"`` unless bfloat16 products
            are faster on this machine (`ssmgen.precision`).
        compile: pass the model's step through `torch.compile`, as one graph; on CUDA also captured as a CUDA graph.
            The first call for a shape compiles, for a minute or so, and once more where ``guidance_start`` leaves some
            steps without guidance; needs a C++ compiler on a CPU.
    """

    def __init__(self, model: MaskModel, *, dtype: torch.dtype | str | None = None, compile: bool = False) -> None:
        self.device = next(iter(model.parameters())).device
        self.dtype = sampling_dtype(dtype, self.device)
        self.model: Any = model if self.dtype is None else in_dtype(model, self.dtype)
        self.compiled = compile
        self.step: Any = self.model
        if compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else None
            self.step = torch.compile(self.model, fullgraph=True, dynamic=False, mode=mode)

    @explained()
    def __call__(
        self,
        x0: Tensor,
        mask: Tensor | None = None,
        *,
        objective: str | Objective = "flow-matching",
        solver: str | Solver = "ab3",
        steps: int = 24,
        shift: float = 1.0,
        times: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_start: float = 0.0,
        progress: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Sample.

        Args:
            x0: noise ``(batch, channels, height, width)`` in the model's space, e.g. from `initial_noise`.
            mask: what the model takes: labels or one-hot, one per image or one for all; None samples without a mask.
            objective: a name or an objective that turns predictions into velocities.
            solver: a name or a solver. Of the fixed-step ones ``ab3`` had the smallest error at 25 evaluations, below
                that of 200 Euler steps (docs/performance.md).
            steps: intervals of the time grid; ``solver.nfe(steps)`` tells the evaluations.
            shift: where the grid is finer, see `ssmgen.solvers.shifted_grid`; 1 is uniform.
            times: the grid itself ``(n + 1,)`` in [0, 1] instead of steps and shift. It may start later, at a picture
                that is partly noise, or fall from 1 to 0: from data to the noise it comes from.
            guidance_scale: 1 follows the conditional model; w > 1 follows ``v_null + w (v_mask - v_null)`` and needs a
                model trained with mask dropout.
            guidance_start: guidance acts from this t on, the conditional model alone before it, at half the work. Near
                the noise guidance mostly exaggerates contrast (Kynkaanniemi et al., arXiv 2404.07724, limit it in the
                same way). 0 guides throughout.
            progress: called as ``progress(step, x)`` after each step of a fixed-step solver.

        Raises:
            ValueError: bad steps or shift, a mask that does not fit, a start of guidance outside [0, 1], or guidance
                on a model trained without mask dropout.
        """
        integrator: Solver = _resolve(solver, "solver")
        learned: Objective = _resolve(objective, "objective")
        ts = shifted_grid(steps, shift) if times is None else _checked_times(times)
        if mask is not None and mask.shape[0] not in (1, x0.shape[0]):
            raise ValueError(f"give one mask, or one per image: got {mask.shape[0]} masks for {x0.shape[0]} images")
        _check_guidance(self.model, mask, guidance_scale, guidance_start)
        guidance = guidance_scale, guidance_start
        x0 = x0.to(self.device)
        ts = ts.to(self.device)
        with torch.no_grad(), _evaluation_mode(self.model):
            if integrator.adaptive and x0.shape[0] > 1:
                return self._one_by_one(x0, mask, learned, integrator, ts, guidance)
            return self._solve(x0, mask, learned, integrator, ts, guidance, progress)

    def _solve(
        self,
        x0: Tensor,
        mask: Tensor | None,
        objective: Objective,
        solver: Solver,
        ts: Tensor,
        guidance: tuple[float, float],
        progress: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        size, (scale, start) = (x0.shape[2], x0.shape[3]), guidance
        conds = [self.model.condition(mask, size=size)]
        if scale != 1:
            conds.append(self.model.condition(None, size=size))
        predict = self._predictor(conds, solver.times(ts), start)

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            predictions = predict(x if self.dtype is None else x.to(self.dtype), t.view(1))
            guided, *null = (objective.velocity(each.to(x.dtype), x, t) for each in predictions)
            return null[0] + scale * (guided - null[0]) if null else guided

        return solver.solve(velocity, x0, ts, progress)

    def _predictor(
        self, conds: list[Any], times: Tensor | None, start: float
    ) -> Callable[[Tensor, Tensor], Iterable[Tensor]]:
        """The predictions under each condition, before ``start`` under the first alone.

        What does not change between steps is computed beforehand, for solvers that tell their ``times``.
        """
        model = self.model
        timed = hasattr(model, "modulation")
        rows = iter(model.modulation(times).split(1)) if timed and times is not None else None
        started = None if times is None else iter((times >= start).tolist())

        def predict(x: Tensor, t: Tensor) -> Iterable[Tensor]:
            own = conds if (bool(t >= start) if started is None else next(started)) else conds[:1]
            if not timed:
                return [self._step(x, t, cond=cond) for cond in own]
            row = model.modulation(t) if rows is None else next(rows)
            return self._step(x.repeat(len(own), 1, 1, 1), None, cond=own, modulation=row).chunk(len(own))

        return predict

    def _step(self, x: Tensor, t: Tensor | None, **given: Any) -> Tensor:
        out = self.step(x, t, **given)
        # A captured graph writes into the same memory each time, and a solver keeps slopes of several steps.
        return out.clone() if self.compiled and out.is_cuda else out

    def _one_by_one(self, x0: Tensor, mask: Tensor | None, objective: Objective, solver: Solver, *rest: Any) -> Tensor:
        """Adaptive steps depend on the error of what is integrated: each image gets its own."""
        images = []
        evaluations = 0
        for i in range(x0.shape[0]):
            own = mask if mask is None or mask.shape[0] == 1 else mask[i : i + 1]
            images.append(self._solve(x0[i : i + 1], own, objective, solver, *rest))
            evaluations += solver.evaluations
        solver.evaluations = evaluations
        return torch.cat(images)


@explained(*keywords(Sampler.__call__))
def sample(
    model: MaskModel,
    x0: Tensor,
    mask: Tensor | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    compile: bool = False,
    **settings: Any,
) -> Tensor:
    """Turn noise into data by integrating the model's velocity from t = 0 to t = 1.

    This is ``Sampler(model, dtype=dtype, compile=compile)(x0, mask, **settings)``: hold a `Sampler` to sample often.

    Args:
        model: a mask-conditioned model.
        x0, mask, settings: those of a `Sampler`'s call: ``solver``, ``steps``, ``guidance_scale``, ...
        dtype, compile: those of `Sampler`.

    Returns:
        ``(batch, channels, height, width)`` on the device of the model, of the dtype of ``x0``.

    Raises:
        ValueError: bad steps or shift, a mask that does not fit, or guidance on a model trained without mask dropout.
    """
    return Sampler(model, dtype=dtype, compile=compile)(x0, mask, **settings)


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """A copy of a model with its floating-point weights in ``dtype``, save parameters marked ``keep_float32``."""
    changed = copy.deepcopy(model)
    for parameter, original in zip(changed.parameters(), model.parameters(), strict=True):  # a copy loses the marks
        if parameter.is_floating_point() and not getattr(original, "keep_float32", False):
            parameter.data = parameter.data.to(dtype)
    return changed


def _check_guidance(model: MaskModel, mask: Tensor | None, guidance_scale: float, guidance_start: float) -> None:
    if not 0 <= guidance_start <= 1:
        raise ValueError(f"guidance_start is a time in [0, 1], 0 noise and 1 data, got {guidance_start}")
    if guidance_scale == 1:
        return
    if mask is None:
        raise ValueError(f"guidance_scale={guidance_scale} needs a mask to guide towards, got None")
    if getattr(model, "mask_dropout", 0) == 0:
        raise ValueError(
            f"guidance_scale={guidance_scale} needs a model trained with mask dropout, and this one has "
            "mask_dropout=0: use guidance_scale=1, or train with mask_dropout of about 0.1"
        )


def _checked_times(times: Tensor) -> Tensor:
    if times.dim() != 1 or not bool(((times >= 0) & (times <= 1)).all()):
        raise ValueError(f"times must be (n + 1,) in [0, 1], 0 noise and 1 data, got {times.tolist()}")
    return times.float()


def _resolve(given: Any, kind: str) -> Any:
    if not isinstance(given, str):
        return given
    find(given, kind)
    return build(given)


@contextmanager
def _evaluation_mode(model: MaskModel) -> Iterator[None]:
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)
