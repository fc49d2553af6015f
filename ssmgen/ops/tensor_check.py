"""The check of the tensors that go with a sequence, shared by all scans."""

from torch import Tensor

#: A tensor, or None where it is left out, and the shape that it must have.
Expected = tuple[Tensor | None, tuple[int, ...]]


def check_tensors(
    expected: dict[str, Expected], x: Tensor, name: str, beside: str, same_dtype: tuple[str, ...]
) -> None:
    """Check tensors against the scanned sequence.

    Args:
        expected: each tensor and its shape, by name.
        x: the scanned sequence, ``(batch, length, ...)``.
        name: of ``x``.
        beside: what the shapes have to fit, for the message.
        same_dtype: the names of those that must have the dtype of ``x``.

    Raises:
        ValueError: a tensor of another shape or on another device than ``x``.
        TypeError: a tensor of another dtype.
    """
    for other, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{other} must be {shape} to go with {beside}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{other} is on {tensor.device} but {name} is on {x.device}: move one of them")
        if other in same_dtype and tensor.dtype != x.dtype:
            raise TypeError(f"{other} must have {name}'s dtype {x.dtype}, got {tensor.dtype}")
