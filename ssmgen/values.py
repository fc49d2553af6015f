"""Values of conditions: a tensor with one item per image, or a mapping of such tensors by name.

A label map is one tensor ``(b, h, w)``. A sequence of tokens has two, ``{"tokens": (b, m, d), "lengths": (b,)}``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: One item per image in the first dimension of every tensor, or one item for all images.
Value = Tensor | Mapping[str, Tensor]


def as_value(given: Any) -> Value:
    """A value as tensors, each ``(batch, ...)``; what has no dimension becomes ``(1,)``.

    Raises:
        TypeError: text that is not encoded, or something else that torch cannot make a tensor of.
        ValueError: an empty mapping, or tensors of different batches.
    """
    if isinstance(given, Mapping):
        value = {name: as_value(each) for name, each in given.items() if each is not None}
        batch_of_value(value)  # type: ignore[arg-type]
        return value  # type: ignore[return-value]
    if isinstance(given, str) or (isinstance(given, Sequence) and any(isinstance(each, str) for each in given)):
        texts = [given] if isinstance(given, str) else list(given)
        raise TypeError(
            f"a value is tensors, got text: encode it first, build('word-vectors').encode({texts!r:.80}), with the "
            "encoder that the model was trained with"
        )
    tensor = torch.as_tensor(given)
    return tensor if tensor.dim() else tensor.unsqueeze(0)


def tensors_of_value(value: Value) -> dict[str, Tensor]:
    """The tensors ``(batch, ...)`` of a value by name; the name of a plain tensor is empty."""
    return {"": value} if isinstance(value, Tensor) else dict(value)


def mapped(function: Callable[[Tensor], Tensor], value: Value) -> Value:
    """``function`` of each tensor ``(batch, ...)`` of a value."""
    return function(value) if isinstance(value, Tensor) else {name: function(each) for name, each in value.items()}


def part_of(value: Value, part: slice) -> Value:
    """The items of a slice of the images, of a value that is one for all or one per image ``(n, ...)``."""
    return mapped(lambda each: each if len(each) == 1 else each[part], value)


def batch_of_value(value: Value) -> int:
    """Items of a value, the length of the first dimension of its tensors ``(batch, ...)``.

    Raises:
        ValueError: no tensor, or tensors of different batches.
    """
    lengths = {name: len(each) for name, each in tensors_of_value(value).items()}
    if not lengths:
        raise ValueError("the value is an empty mapping: give its tensors by name")
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"the tensors of a value have one item per image each, and here {listed}")
    return next(iter(lengths.values()))


def pad_sequences(sequences: Sequence[Tensor]) -> dict[str, Tensor]:
    """Sequences ``(m_i, d)`` as one value of n items, ``{"tokens": (n, m, d), "lengths": (n,)}``.

    They are padded with zeros to the longest.
    """
    tokens = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    return {"tokens": tokens, "lengths": torch.tensor([len(each) for each in sequences])}


def padded_sequence(value: Value, least: int = 16) -> Value:
    """A sequence, ``(b, m, d)`` or with its ``lengths``, at the next power of two from ``least`` on; zeros at the end.

    Results do not depend on padding, so sequences of many lengths take a few shapes. What does not fit is returned as
    it is, for the condition to explain.
    """
    given = {"tokens": value} if isinstance(value, Tensor) else dict(value)
    tokens = given.get("tokens")
    if tokens is None or tokens.dim() != 3:
        return value
    batch, length = tokens.shape[:2]
    lengths = given.get("lengths", torch.full((batch,), length))
    if bool((lengths > length).any()):
        return value
    missing = max(least, 1 << (length - 1).bit_length()) - length
    return {**given, "tokens": torch.nn.functional.pad(tokens, (0, 0, 0, missing)), "lengths": lengths}


def value_for(name: str, given: Any, images: int) -> Value:
    """The value of the condition ``name`` for this many images, see `as_value`: ``(images, ...)`` or ``(1, ...)``.

    Raises:
        TypeError, ValueError: see `as_value`; or another number of items. Each names the condition.
    """
    try:
        value = as_value(given)
        items = batch_of_value(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    if items not in (1, images):
        raise ValueError(
            f"give one {name}, or one per image: got {items} values for {images} images (one alone has a batch "
            f"dimension too: {name}[None])"
        )
    return value
