"""A scan with a backward of its own as a `torch.library` operator."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmgen.ops.operator import define
from ssmgen.ops.scan.inputs import ScanInputs

#: `ScanInputs` in torch's schema; an operator's arguments are these, flat, and whether to save for backward.
_ARGUMENTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? order, bool softplus, bool save"
)


def define_scan(
    name: str,
    backend: str,
    forward: Callable[[ScanInputs, bool], tuple[Tensor, Tensor, Tensor]],
    backward: Callable[[Tensor, Tensor, Tensor, ScanInputs], tuple[Tensor | None, ...]],
    saved_shape: Callable[[Tensor, Tensor], tuple[int, ...]],
    dispatch_key: str,
) -> None:
    """`ssmgen.ops.operator.define` for a scan.

    Args:
        name: of the operator.
        backend: as `selective_scan` names it, for messages.
        forward: ``(inputs, save)`` to y, the last state, and what backward needs (empty unless ``save``).
        backward: ``(dy, dlast, saved, inputs)`` to the gradients of u, delta, A, B, C, D, z, delta_bias, initial_state;
            those of inputs that are None are ignored.
        saved_shape: shape of what is saved, from u and A; float32.
        dispatch_key: torch's, for the devices it runs on.
    """

    def run_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return forward(ScanInputs(*arguments[:-1]), arguments[-1])

    def run_backward(dy: Tensor | None, dlast: Tensor | None, saved: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        inputs = ScanInputs(*arguments[:-1])
        u, A = inputs.u, inputs.A
        dy = u.new_zeros(u.shape) if dy is None else dy
        dlast = A.new_zeros(u.shape[0], *A.shape) if dlast is None else dlast
        gradients = zip(backward(dy, dlast, saved, inputs), inputs[:9], strict=True)
        return tuple(u.new_empty(0) if g is None or x is None else g for g, x in gradients)

    def fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, _, A, *_, save = arguments
        saved = A.new_empty(saved_shape(u, A) if save else (0,))
        return u.new_empty(u.shape), A.new_empty(u.shape[0], *A.shape), saved

    define(
        *(name, _ARGUMENTS, run_forward, run_backward, fake_forward, tuple(range(9))),
        refusal=f"backend {backend!r} of selective_scan is differentiable once: use backend='reference' for more",
        results=3,
        dispatch_key=dispatch_key,
    )


def run_scan(name: str, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Call a `define_scan` operator, saving for backward if needed: y ``(batch, length, dim)`` and the state."""
    save = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    y, last, _ = getattr(torch.ops.ssmgen, name)(*inputs, save)
    return y, last
