"""Several conditions that serve equal parts of one batch, as guidance needs them.

A state is whatever a layer's ``condition`` computed: a tensor, or a named tuple of tensors and None. One of batch 1
serves every item of its part, without being copied. A named tuple with ``serves_all`` depends on no condition and is
the same for all parts.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


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
    if serves_all(state):
        return state
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


def joined(states: list[Any], batch: int) -> Any:
    """Several states as one of their batches in turn; nested tuples and mappings of tensors and None.

    None where they cannot be one: a tensor is not of ``batch`` items and would have to be repeated, or something else
    than tensors differs.
    """
    flat, structures = zip(*(tree_flatten(state, is_leaf=serves_all) for state in states), strict=True)
    if any(each != structures[0] for each in structures):
        return None
    results = []
    for parts in zip(*flat, strict=True):
        first = parts[0]
        tensors = [x for x in parts if isinstance(x, Tensor)]
        if len(tensors) == len(parts) and len({(x.shape, x.dtype) for x in tensors}) == 1 and len(first) == batch:
            results.append(torch.cat(tensors))
        elif all(x is None for x in parts) or all(map(serves_all, parts)):
            results.append(first)
        else:
            return None
    return tree_unflatten(results, structures[0])


def serves_all(state: Any) -> bool:
    """Whether a state is the same for all parts of a batch."""
    return getattr(state, "serves_all", False)
