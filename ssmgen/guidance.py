"""Classifier-free guidance with any number of conditions (Ho and Salimans, arXiv 2207.12598).

Each condition has its own scale, as in InstructPix2Pix (arXiv 2211.09800, equation 3): conditions are added one after
the other, ``v = v_0 + sum_k s_k (v_k - v_(k-1))``, where v_k knows the first k of them and v_0 none. Neighbours of
equal scale are added together, and those of scale 1 come first, so that one scale for all costs two evaluations and
scale 1 costs one.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor

from ssmgen.registry import closest

#: One scale for all conditions, or one by name; those that are not named have 1.
Scale = float | Mapping[str, float]


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


def plan(scale: Scale, given: Sequence[str], conditions: Mapping[str, Any]) -> Guidance:
    """The evaluations that a scale needs.

    Args:
        scale: see `Scale`.
        given: names of the conditions that have a value, in the model's order.
        conditions: the model's, by name; those that an evaluation leaves out need ``dropout``.

    Raises:
        ValueError: a scale for a condition that is not there or has no value, or one whose model was trained without
            dropout of it.
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
    for name, value in scales.items():
        dropout = getattr(conditions[name], "dropout", 0)
        if value != 1 and not dropout:
            raise ValueError(
                f"guidance_scale={scale!r} needs a model trained with dropout of {name!r}, and this one has "
                f"{name}_dropout=0: use guidance_scale=1, or train with {name}_dropout of about 0.1"
            )
    ordered = sorted(scales, key=lambda name: scales[name] != 1)
    known, steps = [list[str]()], []
    for value, names in groupby(ordered, key=scales.__getitem__):
        known.append([*known[-1], *names])
        steps.append(value)
    return Guidance(known[1:], steps[1:]) if steps and steps[0] == 1 else Guidance(known, steps)
