"""What a sampler computes before the first step: rows of modulations, joined conditions, states of scans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Modulation rows of the whole time grid are computed at once up to this size, and per step beyond it.
_MOST_ROW_BYTES = 512 * 2**20
# What part of a GPU's memory the kept states of scans may take. A compiled sampler holds them up to four times: each
# condition's, those of all conditions together, and the buffers of its graphs with guidance and without.
_MOST_STATES = 1 / 8


class Rows:
    """Modulation rows by time: of the whole grid where the times are known and the rows fit, else per step.

    Args:
        model: has ``modulation``.
        conds: what it made of the conditions.
        times: ``(n,)``, or None where they are not known beforehand.
        shown: turns x and times into what the network is given.
        device: of the model.
    """

    def __init__(self, model: Any, conds: list[Any], times: Tensor | None, shown: Any, device: torch.device) -> None:
        self.model = model
        self.tables: dict[int, Tensor] = {}
        self.places: dict[float, int] = {}
        if times is None:
            return
        _, own_times = shown(torch.zeros(len(times), 1, 1, 1, device=device), times.to(device))
        alike = conds[:1] if _vector(conds[0]) is None else conds
        count = sum(1 if vector is None else len(vector) for vector in map(_vector, alike))
        if count * len(times) * 4 * sum(model.widths) <= _MOST_ROW_BYTES:
            self.places = {time: place for place, time in enumerate(times.tolist())}
            self.tables = {id(cond): self._rows(own_times, cond) for cond in alike}

    def at(self, t: Tensor, own_t: Tensor, parts: list[Any], batch: int) -> Tensor:
        """Rows ``(1, values)``, or ``(parts x batch, values)`` where conditions have vectors."""
        place = self.places.get(float(t)) if self.places else None
        alike = _vector(parts[0]) is None
        found = [
            self._rows(own_t.view(1), cond)[0] if place is None else self.tables[id(cond)][place]
            for cond in (parts[:1] if alike else parts)
        ]
        return found[0] if alike else torch.cat([rows.expand(batch, -1) for rows in found])

    def _rows(self, times: Tensor, cond: Any) -> Tensor:
        """``(n, 1 or m, values)``."""
        vector = _vector(cond)
        return self.model.modulation(times).unsqueeze(1) if vector is None else self.model.modulation(times, vector)


def _vector(cond: Any) -> Tensor | None:
    return getattr(cond, "vector", None)


class Joined:
    """Lists of conditions that serve parts of one batch, each made into one condition where nothing is repeated by it.

    A layer then runs once for all of them.
    """

    def __init__(self, model: Any) -> None:
        self.join: Callable[[list[Any], int], list[Any]] = getattr(model, "join", lambda conds, batch: conds)
        self.found: dict[tuple[int, ...], list[Any]] = {}

    def __call__(self, conds: list[Any], batch: int) -> list[Any]:
        """The conditions ``conds`` for a batch, which are the same objects at each step."""
        key = tuple(map(id, conds))
        if key not in self.found:
            self.found[key] = self.join(conds, batch)
        return self.found[key]


def check_keeping(wanted: bool | str, model: Any) -> None:
    """Reject a ``keep_states`` other than True, False and ``"auto"``, and True where no layer has states to keep.

    Raises:
        ValueError: says what is expected, or which layers have such states.
    """
    if wanted not in (True, False, "auto"):
        raise ValueError(f"keep_states must be True, False or 'auto', got {wanted!r}")
    layers = model.modules() if isinstance(model, torch.nn.Module) else ()
    if wanted is True and not any(getattr(layer, "keeps", False) for layer in layers):
        raise ValueError(
            "keep_states=True needs a Cross-Mamba with u='mask', whose states depend on the mask alone, and this model "
            "has none: leave it out"
        )


def with_states(conds: Mapping[Any, Any], model: Any, wanted: bool | str, device: torch.device) -> dict[Any, Any]:
    """Conditions with the states of the scans that depend on them alone, which no step then computes.

    The states take n times the bytes of what is scanned. ``"auto"`` keeps them on a GPU if they fit, and not on a CPU,
    whose scan takes no longer than reading them.
    """
    if not (hasattr(model, "keep_states") and conds) or wanted is False or (wanted == "auto" and device.type != "cuda"):
        return dict(conds)
    needed = sum(map(model.kept_bytes, conds.values()))
    if wanted == "auto" and needed > _MOST_STATES * memory_of(device):
        return dict(conds)
    return {name: model.keep_states(cond) for name, cond in conds.items()}


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a CUDA device."""
    return torch.cuda.get_device_properties(device).total_memory
