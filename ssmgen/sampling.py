"""The one place where a model, an objective and a solver meet."""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ssmgen.compiled import CompiledStep, check_compile
from ssmgen.guidance import Guidance, check_scale, check_start, plans, scale_of
from ssmgen.precision import sampling_dtype
from ssmgen.precomputed import Joined, Rows, check_keeping, with_states
from ssmgen.registry import check_keywords, divided, find, make
from ssmgen.solvers.base import Solver, shifted_grid
from ssmgen.values import Value, padded_sequence, part_of, value_for

_CALL = ("x0", "sampling", "objective", "times", "progress")


class Model(Protocol):
    """What `sample` asks of a model: `ssmgen.models.ConditionalModel` is one.

    A model may also have ``conditions``, by name, each with its ``dropout``; without, it has one, ``mask``. And it may
    have ``modulation(t, vector)``: all that it derives from times ``(n,)`` and the vector of a condition, as many
    values as its ``widths`` add up to. It is then called with ``modulation=`` rows of that, and under guidance once
    with ``cond=`` a list of conditions, each for an equal part of the batch. ``join``,
    ``keep_states`` and ``kept_bytes`` are optional too, see `ssmgen.models.TokenModel`.
    """

    training: bool

    def __call__(self, x: Tensor, t: Tensor, mask: Any = None, *, cond: Any = None) -> Tensor: ...

    def condition(self, mask: Any = None, size: tuple[int, int] | None = None) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def parameters(self) -> Iterable[Tensor]: ...


class Objective(Protocol):
    """What `sample` asks of an objective.

    It may also have ``inputs(x_t, t)``, what the network is shown in their place, and ``path``, which solvers may ask.
    """

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Sampling:
    """The settings of sampling, from the command line, the page and the pipeline to the sampler.

    Attributes:
        solver: a name, a spec or a `Solver`. Of the fixed-step ones ``ab3`` had the smallest error at 25 evaluations,
            below that of 200 Euler steps (docs/performance.md).
        steps: intervals of the time grid; ``solver.nfe(steps)`` tells the evaluations.
        shift: where the grid is finer, see `ssmgen.solvers.shifted_grid`; 1 is uniform.
        guidance_scale: 1 follows the conditional model; w > 1 follows ``v_null + w (v_cond - v_null)`` and needs a
            model trained with dropout of the condition. Or one scale by condition, see `ssmgen.guidance`.
        guidance_start: guidance acts from this t on. Near the noise it mostly exaggerates contrast (Kynkaanniemi et
            al., arXiv 2404.07724, limit it in the same way). Or one start by condition: ``{"mask": 0.2}`` guides a
            style or words, whose colours are decided near the noise, from 0 on and the mask later.
        shared_noise: where the labels have a left and a right, both start from the same noise, see
            `ssmgen.noise.shared_noise`, so that they are painted more alike. Pipelines do this, which know the labels;
            other labels change nothing. A stochastic solver goes on with noise that is not shared.

    Raises:
        ValueError: a value out of range, or no such solver.
        TypeError: a solver of another type, or ``shared_noise`` that is not True or False.
    """

    solver: Any = "ab3"
    steps: int = 24
    shift: float = 1.0
    guidance_scale: Any = 1.0
    guidance_start: Any = 0.0
    shared_noise: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.solver, str | Mapping):
            find(divided(self.solver)[0], "solver")
        elif not isinstance(self.solver, Solver):
            raise TypeError(f"solver must be a name, a spec or a Solver, got {self.solver!r}")
        if not isinstance(self.steps, numbers.Integral) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"sampling steps must be a positive whole number, got {self.steps!r}")
        if not _is_number(self.shift) or self.shift <= 0:
            raise ValueError(f"shift must be a number above 0, got {self.shift!r}")
        check_scale(self.guidance_scale)
        check_start(self.guidance_start)
        if not isinstance(self.shared_noise, bool):
            raise TypeError(f"shared_noise must be True or False, got {self.shared_noise!r}")
        for name in ("steps", "shift", "guidance_scale", "guidance_start"):
            object.__setattr__(self, name, _writable(getattr(self, name), int if name == "steps" else float))

    def replaced(self, **given: Any) -> Sampling:
        """A copy with the given values; None keeps this one's.

        Raises:
            TypeError: another setting; names the closest.
            ValueError: a value out of range.
        """
        check_keywords("sampling", given, self.__dataclass_fields__)
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def for_values(self, given: Collection[str], conditions: Collection[str]) -> Sampling:
        """A copy without the scales of those of a model's ``conditions`` that are not in ``given``."""
        return replace(self, guidance_scale=scale_of(self.guidance_scale, given, conditions))

    def guidances(self, given: Sequence[str], conditions: Mapping[str, Any]) -> list[tuple[float, Guidance]]:
        """How these settings guide each part of the time, see `ssmgen.guidance.plans`.

        Args:
            given: names of the conditions that have a value.
            conditions: the model's, by name.

        Raises:
            ValueError: guidance that the model or the values do not allow.
        """
        return plans(self.guidance_scale, self.guidance_start, given, conditions)


#: Names of the settings of sampling.
SETTINGS = tuple(Sampling.__dataclass_fields__)


class Sampler:
    """A model made ready to sample: its weights in the dtype wanted, its step compiled.

    What does not change between steps is computed once per call: the conditions, and what the model derives from the
    times of the whole grid. Guidance is one batch of all its parts.

    Args:
        model: a conditional model. It runs in evaluation mode and without gradients, and its mode is restored.
        dtype: run a copy of the model with its weights in this dtype (bfloat16 reads half the memory). Parameters
            that a module names ``keep_float32`` (A_log, D and the step-size bias of the scans) keep theirs, and the
            solver works in that of x0. None runs the model itself, and so does ``"auto"`` unless bfloat16 products
            are faster on this machine (`ssmgen.precision`).
        compile: pass the model's step through `torch.compile`, as one graph; on CUDA also captured as a CUDA graph.
            The first call for a shape compiles, for a minute or so, and again where ``guidance_start`` begins; needs a
            C++ compiler on a CPU. Sequences such as texts are padded to the next power of two from 16 on, so that few
            lengths compile. Any number of shapes may be compiled; each keeps its code, and on CUDA the memory of its
            graph, as long as the sampler lives. ``"max-autotune"`` also times variants of the matrix products, which
            takes much longer than compiling alone.
        keep_states: keep all states of the scans that depend on the mask alone, those of Cross-Mamba with u = mask, so
            that no step scans them again. They take d_state times the memory of what is scanned: 403 MB for each mask
            of ``sisma-xl`` at 256 tokens in bfloat16, and a compiled sampler on CUDA keeps those of each shape.
            Computing them takes about as long as d_state scans. Results agree to rounding.

    Raises:
        ValueError: another ``compile`` or ``keep_states``, or ``keep_states=True`` for a model without ``keep_states``.
    """

    def __init__(
        self,
        model: Model,
        *,
        dtype: torch.dtype | str | None = None,
        compile: bool | str = False,
        keep_states: bool = False,
    ) -> None:
        check_compile(compile)
        check_keeping(keep_states, model)
        self.device = next(iter(model.parameters())).device
        self.dtype = sampling_dtype(dtype, self.device)
        self.model: Any = model if self.dtype is None else in_dtype(model, self.dtype)
        self.conditions: Mapping[str, Any] = dict(getattr(model, "conditions", {"mask": model}))
        self.compiled = bool(compile)
        self.step: Any = CompiledStep(self.model, self.device, compile == "max-autotune") if compile else self.model
        self.keep_states = keep_states

    def __call__(
        self,
        x0: Tensor,
        mask: Any = None,
        sampling: Sampling | None = None,
        *,
        objective: str | Objective = "flow-matching",
        times: Tensor | None = None,
        progress: Callable[[int, Tensor], None] | None = None,
        **others: Any,
    ) -> Tensor:
        """Sample.

        Args:
            x0: noise ``(batch, channels, height, width)`` in the model's space, e.g. from `initial_noise`.
            mask: value of the condition ``mask``, one per image or one for all; None samples without.
            sampling: settings; the defaults where None. Its scales of conditions without a value do not count.
            objective: a name or an objective that turns predictions into velocities.
            times: the grid itself ``(n + 1,)`` in [0, 1] instead of steps and shift. It may start later, at a picture
                that is partly noise, or fall from 1 to 0: from data to the noise it comes from.
            progress: called as ``progress(step, x)`` after each step of a fixed-step solver.
            **others: values of other conditions, and single settings that replace those of ``sampling``.

        Raises:
            ValueError: bad settings, a value that does not fit, guidance on a model trained without dropout, or states
                to keep that the model does not have or a GPU's memory does not hold.
            TypeError: neither a condition nor a setting; names the closest.
        """
        given = {"mask": mask, **others} if mask is not None else others
        check_keywords("Sampler", given, [*_CALL, *self.conditions, *SETTINGS])
        values = {
            name: value_for(name, given[name], len(x0)) for name in self.conditions if given.get(name) is not None
        }
        if self.compiled:
            values = {name: self._of_few_lengths(name, value) for name, value in values.items()}
        chosen = {name: value for name, value in given.items() if name not in self.conditions}
        settings = (sampling or Sampling()).for_values(values, self.conditions).replaced(**chosen)
        if settings.shared_noise:
            raise ValueError(
                "shared_noise needs labels, which a Sampler does not know: sample with a MaskToImage, or give "
                "x0 = ssmgen.noise.shared_noise(noise, mask, pairs of classes) without this setting"
            )
        resolved: Objective = resolve(objective, "objective")
        solver: Solver = resolve(settings.solver, "solver", path=getattr(resolved, "path", None))
        ts = shifted_grid(settings.steps, settings.shift) if times is None else _checked_times(times)
        x0 = x0.to(self.device)
        with torch.no_grad(), evaluation_mode(self.model):
            task = _Task(x0, values, settings, resolved, solver, ts.cpu())
            return self._solve(task, progress) if not solver.adaptive or len(x0) == 1 else self._one_by_one(task)

    def _solve(self, task: _Task, progress: Callable[[int, Tensor], None] | None = None) -> Tensor:
        x0, values, settings, objective, solver, ts = task
        guidances = settings.guidances(list(values), self.conditions)
        known = dict.fromkeys(tuple(each) for _, guidance in guidances for each in reversed(guidance.known))
        conds = {each: self._condition({name: values[name] for name in each}, x0) for each in known}
        if self.keep_states:
            conds = with_states(conds, self.model, self.device)
        shown = getattr(objective, "inputs", _unchanged)
        predict = self._predictor(list(conds.values()), solver.times(ts), shown)

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            guidance = next(each for start, each in reversed(guidances) if start == 0 or bool(t >= start))
            predictions = predict(x, t, [conds[tuple(each)] for each in reversed(guidance.known)])
            velocities = [objective.velocity(each.to(x.dtype), x, t) for each in predictions]
            return guidance.combine(velocities[::-1])

        return solver.solve(velocity, x0, ts, progress)

    def _one_by_one(self, task: _Task) -> Tensor:
        """Adaptive steps depend on the error of what is integrated: each image gets its own."""
        images, evaluations = [], 0
        for i in range(len(task.x0)):
            values = {name: part_of(value, slice(i, i + 1)) for name, value in task.values.items()}
            images.append(self._solve(task._replace(x0=task.x0[i : i + 1], values=values)))
            evaluations += task.solver.evaluations
        task.solver.evaluations = evaluations
        return torch.cat(images)

    def _of_few_lengths(self, name: str, value: Value) -> Value:
        return padded_sequence(value) if "lengths" in getattr(self.conditions[name], "fields", ()) else value

    def _condition(self, values: Mapping[str, Value], x0: Tensor) -> Any:
        return self.model.condition(**{**dict.fromkeys(self.conditions), **values}, size=(x0.shape[2], x0.shape[3]))

    def _predictor(
        self, conds: list[Any], times: Tensor | None, shown: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> Callable[[Tensor, Tensor, list[Any]], Iterable[Tensor]]:
        """The predictions under each condition.

        What does not change between steps is computed beforehand, for solvers that tell their ``times``.
        """
        model, timed = self.model, hasattr(self.model, "modulation")
        rows = Rows(model, conds, times, shown, self.device) if timed else None
        joined = Joined(model)

        def predict(x: Tensor, t: Tensor, parts: list[Any]) -> Iterable[Tensor]:
            given, own_t = shown(x, t.to(self.device))
            given = given if self.dtype is None else given.to(self.dtype)
            if rows is None:
                return [self.step(given, own_t.view(1), cond=cond) for cond in parts]
            row = rows.at(t, own_t, parts, x.shape[0])
            given = given.repeat(len(parts), 1, 1, 1)
            out = self.step(given, None, cond=joined(parts, len(given)), modulation=row)
            return out.chunk(len(parts))

        return predict


class _Task(NamedTuple):
    """What is integrated: noise, values of the conditions, and how."""

    x0: Tensor
    values: dict[str, Value]
    settings: Sampling
    objective: Objective
    solver: Solver
    ts: Tensor


def _unchanged(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return x, t


def sample(
    model: Model,
    x0: Tensor,
    mask: Any = None,
    *,
    dtype: torch.dtype | str | None = None,
    compile: bool | str = False,
    keep_states: bool = False,
    **settings: Any,
) -> Tensor:
    """Turn noise into data by integrating the model's velocity from t = 0 to t = 1.

    This is ``Sampler(model, dtype=dtype, compile=compile)(x0, mask, **settings)``: hold a `Sampler` to sample often.

    Args:
        model: a conditional model.
        x0, mask, settings: those of a `Sampler`'s call: ``solver``, ``steps``, ``guidance_scale``, ...
        dtype, compile, keep_states: those of `Sampler`.

    Returns:
        ``(batch, channels, height, width)`` on the device of the model, of the dtype of ``x0``.

    Raises:
        ValueError, TypeError: see `Sampler`.
    """
    return Sampler(model, dtype=dtype, compile=compile, keep_states=keep_states)(x0, mask, **settings)


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """A copy of a model with its floating-point weights in ``dtype``, save those its modules name ``keep_float32``."""
    changed = copy.deepcopy(model)
    kept = {id(m.get_parameter(name)) for m in changed.modules() for name in getattr(m, "keep_float32", ())}
    for parameter in changed.parameters():
        if parameter.is_floating_point() and id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
    return changed


def weights_dtype(model: Any) -> torch.dtype:
    """The dtype of a model's weights, that of its inputs: float32 where it has no floating-point ones.

    Parameters that a module names ``keep_float32`` do not count.
    """
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    kept = {id(m.get_parameter(name)) for m in modules for name in getattr(m, "keep_float32", ())}
    found = (p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in kept)
    return next(found, torch.float32)


def _writable(value: Any, kind: type) -> Any:
    """A number, or one for each name, of a kind that can be written as JSON: numpy's scalars cannot."""
    if isinstance(value, Mapping):
        return {name: _writable(each, kind) for name, each in value.items()}
    return value if isinstance(value, int | float) else kind(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _checked_times(times: Tensor) -> Tensor:
    if times.dim() != 1 or not bool(((times >= 0) & (times <= 1)).all()):
        raise ValueError(f"times must be (n + 1,) in [0, 1], 0 noise and 1 data, got {times.tolist()}")
    return times.float()


def resolve(given: Any, kind: str, **offered: Any) -> Any:
    """What is given, or what a name or a spec of it builds, of a kind of the registry and with what it takes."""
    if not isinstance(given, str | Mapping):
        return given
    find(divided(given)[0], kind)
    return make(given, **{name: value for name, value in offered.items() if value is not None})


@contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """Evaluation mode inside, and the former mode after it."""
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)
