"""Classifier-free guidance with any number of conditions (Ho and Salimans, arXiv 2207.12598).

Each condition has its own scale, as in InstructPix2Pix (arXiv 2211.09800, equation 3): conditions are added one after
the other, ``v = v_0 + sum_k s_k (v_k - v_(k-1))``, where v_k knows the first k of them and v_0 none. Neighbours of
equal scale are added together, and those of scale 1 come first, so that one scale for all costs two evaluations and
scale 1 costs one. A condition that is placed by a label map is never added before it, because its tokens are null
there: with a scale for the label map alone, it comes last and costs one evaluation more.
"""

import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor

from ssmgen.registry import closest

#: One scale for all conditions, or one by name; those that are not named have 1.
Scale = float | Mapping[str, float]
#: The time from which guidance acts, for all conditions or by name; those that are not named are guided throughout.
Start = float | Mapping[str, float]


class Guidance(NamedTuple):
    """Which conditions each evaluation knows, fewest first, and the scale of each step from one to the next."""

    known: list[list[str]]
    scales: list[float]

    def combine(self, velocities: Sequence[Tensor]) -> Tensor:
        """The guided velocity ``(batch, ...)`` from those of `known`, in its order and each of that shape."""
        guided = velocities[0]
        for scale, fewer, more in zip(self.scales, velocities, velocities[1:], strict=False):
            guided = guided + scale * (more - fewer)
        return guided


def check_scale(scale: Any) -> None:
    """Reject an invalid scale.

    Raises:
        ValueError: not a finite number of at least 0, or not such a number for each name.
    """
    for value in scale.values() if isinstance(scale, Mapping) else [scale]:
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
            raise ValueError(f"guidance_scale must be a number at least 0, or one for each condition, got {scale!r}")


def scale_of(scale: Scale, given: Collection[str], conditions: Collection[str]) -> Scale:
    """The scale without those of ``conditions`` that are not in ``given``. Names that are no conditions stay."""
    if not isinstance(scale, Mapping):
        return scale
    return {name: scale[name] for name in scale if name in given or name not in conditions}


def check_start(start: Any) -> None:
    """Reject an invalid start.

    Raises:
        ValueError: not a time in [0, 1], or not such a time for each name.
    """
    for value in start.values() if isinstance(start, Mapping) else [start]:
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= float(value) <= 1:
            raise ValueError(
                f"guidance_start must be a time in [0, 1], 0 noise and 1 data, or one for each condition, got {start!r}"
            )


def plans(
    scale: Scale, start: Start, given: Sequence[str], conditions: Mapping[str, Any]
) -> list[tuple[float, Guidance]]:
    """The `plan` of each part of the time, from the one at whose beginning it is listed to the next; the first is 0.

    Args:
        scale: see `Scale`.
        start: see `Start`. A condition whose start has not come is followed at scale 1.
        given, conditions: see `plan`.

    Raises:
        ValueError: see `plan`, or a start for a condition that is not there.
    """
    begins = dict(start) if isinstance(start, Mapping) else dict.fromkeys(given, start)
    for name in begins:
        if name not in conditions:
            raise ValueError(f"guidance_start names no condition {name!r}{closest(name, conditions)}")
    whole = plan(scale, given, conditions)
    scales = dict(scale) if isinstance(scale, Mapping) else dict.fromkeys(given, scale)
    times = sorted({0.0, *(begins.get(name, 0.0) for name in given if scales.get(name, 1.0) != 1)})
    if len(times) == 1:
        return [(0.0, whole)]
    acting = [{name: scales[name] for name in scales if begins.get(name, 0.0) <= time} for time in times]
    return [(time, plan(some, given, conditions)) for time, some in zip(times, acting, strict=True)]


def plan(scale: Scale, given: Sequence[str], conditions: Mapping[str, Any]) -> Guidance:
    """The evaluations that a scale needs.

    Args:
        scale: see `Scale`.
        given: names of the conditions that have a value, in the model's order.
        conditions: the model's, by name; those that an evaluation leaves out need ``dropout``. One with ``placed_by``
            has an effect only in evaluations that know the label map of that name.

    Raises:
        ValueError: a scale for a condition that is not there or has no value, or whose label map has none; or an
            evaluation without a condition that the model was trained without dropout of.
    """
    by_name = dict(scale) if isinstance(scale, Mapping) else dict.fromkeys(given, scale)
    for name in by_name:
        if name not in conditions:
            raise ValueError(f"guidance_scale names no condition {name!r}{closest(name, conditions)}")
    unmet = any(name not in given and value != 1 for name, value in by_name.items())
    if unmet or (not given and not isinstance(scale, Mapping) and scale != 1):
        raise ValueError(
            f"guidance_scale={scale!r} needs a value for the guided condition: pass it, or set its scale to 1"
        )
    scales = {name: by_name.get(name, 1.0) for name in given}
    placed_by = _placing(scale, scales, conditions)
    known, steps = [list[str]()], []
    for value, names in groupby(_in_order(scales, placed_by), key=scales.__getitem__):
        known.append([*known[-1], *names])
        steps.append(value)
    planned = Guidance(known[1:], steps[1:]) if steps and steps[0] == 1 else Guidance(known, steps)
    for name in given:
        if name not in planned.known[0] and not getattr(conditions[name], "dropout", 0):
            raise ValueError(
                f"guidance_scale={scale!r} needs a model trained with dropout of {name!r}, and this one has "
                f"{name}_dropout=0: use guidance_scale=1, or train with {name}_dropout of about 0.1"
            )
    return planned


def _placing(scale: Scale, scales: Mapping[str, float], conditions: Mapping[str, Any]) -> dict[str, str]:
    """Which of the given conditions is placed by which other."""
    named = {name: getattr(conditions[name], "placed_by", None) for name in scales}
    found = {name: other for name, other in named.items() if other is not None}
    for name, other in found.items():
        if other not in scales and scales[name] != 1:
            raise ValueError(
                f"guidance_scale={scale!r} guides {name!r}, which has no place without a value for {other!r}: pass one"
            )
    return {name: other for name, other in found.items() if other in scales}


def _in_order(scales: Mapping[str, float], placed_by: Mapping[str, str]) -> list[str]:
    """The names in the order in which they are added: those of scale 1 first, but none before what places it."""
    wanted = sorted(scales, key=lambda name: scales[name] != 1)
    late = [name for name in placed_by if wanted.index(name) < wanted.index(placed_by[name])]
    ordered = [name for name in wanted if name not in late]
    for name in sorted(late, key=wanted.index):
        alike = scales[name] == scales[placed_by[name]]
        ordered.insert(ordered.index(placed_by[name]) + 1 if alike else len(ordered), name)
    return ordered
