"""Small examples of whatever is registered: arguments to build it with, and values to call it with.

The tests of contracts find new names by themselves. A name needs a line here only if its arguments or inputs are called
otherwise than those of its neighbours; the failing test says so.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmgen import build, registry
from ssmgen.values import Value, mapped

BATCH, GRID = 3, (3, 5)

#: Arguments of blocks and conditions, by their names.
ARGUMENTS = {
    **dict(dim=16, num_heads=2, d_state=4, num_classes=5, num_labels=4, patch_size=2, in_channels=3, out_channels=3),
    **dict(channels=8, width=6),
}
#: What single blocks and conditions need beside or instead.
SPECIAL_ARGUMENTS: dict[str, dict[str, Any]] = {"spade": dict(hidden=6, groups=2), "label-map": dict(scale=4)}


def tokens(seed: int = 0, width: int = 16) -> Tensor:
    return torch.randn(BATCH, GRID[0] * GRID[1], width, generator=torch.Generator().manual_seed(seed))


def image(channels: int) -> Tensor:
    return torch.randn(BATCH, channels, 2 * GRID[0], 2 * GRID[1], generator=torch.Generator().manual_seed(2))


def maps(channels: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(BATCH, channels, *size, generator=torch.Generator().manual_seed(4))


def labels(classes: int, size: tuple[int, ...]) -> Tensor:
    return torch.randint(0, classes, (BATCH, *size), generator=torch.Generator().manual_seed(3))


#: What blocks are called with, by the names of the parameters of ``forward`` that have no default.
INPUTS: dict[str, Callable[[], Any]] = {
    "x": tokens,
    "tokens": tokens,
    "cond": lambda: tokens(seed=1),
    "c": lambda: tokens(seed=2)[:, 0],
    "shared": lambda: tokens(seed=2, width=48)[:, 0],
    "t": lambda: torch.tensor([0.1, 0.5, 0.8]),
    "mask": lambda: labels(5, (2 * GRID[0], 2 * GRID[1])),
    "size": lambda: GRID,
}
#: What single blocks take instead.
SPECIAL_INPUTS: dict[str, dict[str, Callable[[], Any]]] = {
    "spade": {"x": lambda: image(8), "cond": lambda: image(5).softmax(1)},
    "patchify": {"x": lambda: image(3)},
}
#: A value for a batch by the condition's name, for a latent of ``size``: a tensor or a mapping of named tensors.
VALUES: dict[str, Callable[[Any, tuple[int, int]], Value]] = {
    "label-map": lambda each, size: labels(each.num_classes, (size[0] * each.scale, size[1] * each.scale)),
    "one-hot-map": lambda each, size: labels(each.num_classes, size),
    "class-label": lambda each, size: labels(each.num_labels, ()),
    "dense-map": lambda each, size: maps(each.channels, (size[0] * each.scale, size[1] * each.scale)),
    "token-sequence": lambda each, size: tokens(width=each.width)[:, :1],  # padded ones: test_token_sequence.py
    "placed-sequence": lambda each, size: {
        **{"tokens": tokens(width=each.width), "lengths": torch.tensor([4, 15, 1])},
        "target": labels(5, (2 * size[0], 2 * size[1])),
    },
    "style-image": lambda each, size: {"latents": maps(each.in_channels, (4, 6)), "mask": labels(5, (8, 12))},
}


def small(name: str, **more: Any) -> Any:
    """A block or condition, built small."""
    taken, entry = registry.takes(name) or (), registry.find(name)
    given = {key: value for key, value in (ARGUMENTS | SPECIAL_ARGUMENTS.get(name, {})).items() if key in taken}
    missing = [key for key in registry._required(entry.builder) if key not in entry.defaults | given]
    if missing:
        pytest.fail(f"{name!r} needs {', '.join(missing)}: add a small value to ARGUMENTS in tests/examples.py")
    return build(name, **given | more)


def inputs(name: str, block: torch.nn.Module) -> dict[str, Any]:
    """What a block is called with, by name: tensors ``(BATCH, ...)`` and the size of the grid."""
    parameters = inspect.signature(block.forward).parameters.values()
    needed = [each.name for each in parameters if each.default is inspect.Parameter.empty]
    known = INPUTS | SPECIAL_INPUTS.get(name, {})
    if unknown := [key for key in needed if key not in known]:
        pytest.fail(f"{name!r} is called with {', '.join(unknown)}: add an example to INPUTS in tests/examples.py")
    return {key: known[key]() for key in needed}


def value(condition: torch.nn.Module, size: tuple[int, int]) -> Any:
    """A value of a condition for ``BATCH`` images."""
    names = [name for name in registry.names("condition") if registry.find(name).builder is type(condition)]
    if not set(names) & set(VALUES):
        pytest.fail(f"no value of {' or '.join(names)}: add how to make one to VALUES in tests/examples.py")
    return next(VALUES[name](condition, size) for name in names if name in VALUES)


def item(given: Any, i: int) -> Any:
    """Image ``i`` of an input, as a batch of one; a size stays."""
    return given if isinstance(given, tuple) else mapped(lambda tensor: tensor[i : i + 1], given)


def repeated(given: Any, batch: int) -> Any:
    """The first image of a value, ``batch`` times."""
    return mapped(lambda tensor: tensor[:1].expand(batch, *tensor.shape[1:]), given)


def cast(given: Any, dtype: torch.dtype) -> Any:
    """An input whose floating tensors have another dtype; a size stays."""
    if isinstance(given, tuple):
        return given
    return mapped(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, given)


def leaves(out: Any) -> list[Tensor]:
    """The tensors of an output or a signal."""
    if isinstance(out, Tensor):
        return [out]
    parts = out.values() if isinstance(out, Mapping) else out if isinstance(out, list | tuple) else ()
    return [leaf for part in parts for leaf in leaves(part)]
