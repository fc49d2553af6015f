"""Several conditions that serve equal parts of one batch, as guidance needs them.

A state is whatever a layer's ``condition`` computed: a tensor, or a named tuple of tensors and None. One of batch 1
serves every item of its part, without being copied.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def states_of(layer: Any, cond: Any, size: tuple[int, int]) -> list[Any]:
    """The states that ``cond`` holds for a layer: a list as it is, one state as a list, a tensor of tokens computed."""
    if isinstance(cond, list):
        return cond
    return [layer.condition(cond, size) if isinstance(cond, Tensor) else cond]


def parts_of(states: list[Any], *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Each state, expanded to its part of the batch, with that part of every tensor ``(batch, ...)``.

    Raises:
        ValueError: states that cannot share the batch equally, or one of another batch than its part.
    """
    if len(tensors[0]) % len(states):
        raise ValueError(f"{len(states)} conditions cannot serve equal parts of a batch of {len(tensors[0])}")
    for state, *parts in zip(states, *(tensor.chunk(len(states)) for tensor in tensors), strict=True):
        yield expanded(state, len(parts[0])), *parts


def expanded(state: Any, batch: int) -> Any:
    """A state that serves ``batch`` items.

    Raises:
        ValueError: it was made for another number of items, and not for one.
    """
    if isinstance(state, tuple):
        return type(state)(*(expanded(part, batch) for part in state))  # a named tuple
    if state is None or state.shape[0] == batch:
        return state
    if state.shape[0] != 1:
        raise ValueError(
            f"the condition was made for batch {state.shape[0]}, the content has batch {batch}: make it from as many "
            "items, or from one"
        )
    return state.expand(batch, *state.shape[1:])
