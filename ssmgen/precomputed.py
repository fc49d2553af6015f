"""What a sampler computes before the first step: rows of modulations, joined conditions, states of scans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Modulation rows of the whole time grid are computed at once up to this size, and per step beyond it.
_MOST_ROW_BYTES = 512 * 2**20
_NONE_TO_KEEP = (
    "keep_states=True needs a Cross-Mamba with u='mask', whose states depend on the mask alone, and this model has "
    "none: leave it out"
)


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


def check_keeping(wanted: bool, model: Any) -> None:
    """Reject a ``keep_states`` that is no bool, and True for a model without ``keep_states``, by a `ValueError`."""
    if not isinstance(wanted, bool):
        raise ValueError(f"keep_states must be True or False, got {wanted!r}")
    if wanted and not hasattr(model, "keep_states"):
        raise ValueError(_NONE_TO_KEEP)


def with_states(conds: Mapping[Any, Any], model: Any, device: torch.device) -> dict[Any, Any]:
    """Conditions with the states of the scans that depend on them alone, which no step then computes.

    Raises:
        ValueError: there are no such states, or those of a GPU do not fit into its memory.
    """
    needed = sum(map(model.kept_bytes, conds.values()))
    if not needed:
        raise ValueError(_NONE_TO_KEEP)
    if (free := free_memory(device)) is not None and needed > free:
        raise ValueError(
            f"the states of this call take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of the GPU's memory are "
            "free: sample fewer masks in one call, or leave out keep_states"
        )
    return {name: model.keep_states(cond) for name, cond in conds.items()}


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a GPU, those that torch holds without using them included; None for a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
