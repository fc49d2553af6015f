"""`torch.library` operators around the forward and backward of a fused scan: one node each to `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmgen.ops.scan.backend import ScanInputs

_LIBRARY = torch.library.Library("ssmgen", "FRAGMENT")
#: `ScanInputs` in torch's schema; an operator's arguments are these, flat.
_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, "
    "Tensor? initial, Tensor? order, bool softplus"
)
_GRADIENTS = 9  # of all inputs before the order


def define_scan(
    name: str,
    backend: str,
    forward: Callable[[ScanInputs, bool], tuple[Tensor, Tensor, Tensor]],
    backward: Callable[[Tensor, Tensor, Tensor, ScanInputs], tuple[Tensor, ...]],
    saved_shape: Callable[[Tensor, Tensor], tuple[int, ...]],
    dispatch_key: str,
) -> None:
    """Define the operators ``ssmgen::<name>`` and ``ssmgen::<name>_backward``.

    Args:
        name: of the operator.
        backend: as `selective_scan` names it, for messages.
        forward: ``(inputs, save)`` to y, the last state, and what backward needs (empty unless ``save``).
        backward: ``(dy, dlast, saved, inputs)`` to the gradients of u, delta, A, B, C, D, z, delta_bias, initial_state.
        saved_shape: shape of what is saved, from u and A; float32.
        dispatch_key: torch's, for the devices it runs on.
    """

    def run_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return forward(ScanInputs(*arguments[:-1]), arguments[-1])

    def run_backward(dy: Tensor, dlast: Tensor, saved: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return backward(dy, dlast, saved, ScanInputs(*arguments))

    def fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, _, A, *_, save = arguments
        saved = A.new_empty(saved_shape(u, A) if save else (0,))
        return u.new_empty(u.shape), A.new_empty(u.shape[0], *A.shape), saved

    def differentiate(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        *tensors, saved = ctx.saved_tensors
        u, A = tensors[0], tensors[2]
        dy = u.new_zeros(u.shape) if dy is None else dy
        dlast = A.new_zeros(u.shape[0], *A.shape) if dlast is None else dlast
        gradients = getattr(torch.ops.ssmgen, f"{name}_backward")(dy, dlast, saved, *tensors, ctx.softplus)
        kept = (None if x is None else gradient for x, gradient in zip(tensors[:-1], gradients, strict=True))
        return *kept, None, None, None  # order, softplus and save have none

    def reject_second_derivative(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"backend {backend!r} of selective_scan is differentiable once: use backend='reference' for more"
        )

    gradients = ", ".join(["Tensor"] * _GRADIENTS)
    _LIBRARY.define(f"{name}({_INPUTS}, bool save) -> (Tensor, Tensor, Tensor)")
    _LIBRARY.define(f"{name}_backward(Tensor dy, Tensor dlast, Tensor saved, {_INPUTS}) -> ({gradients})")
    _LIBRARY.impl(name, run_forward, dispatch_key)
    _LIBRARY.impl(f"{name}_backward", run_backward, dispatch_key)
    operator = f"ssmgen::{name}"
    torch.library.register_fake(operator, fake_forward, lib=_LIBRARY)
    torch.library.register_fake(f"{operator}_backward", _fake_backward, lib=_LIBRARY)
    torch.library.register_autograd(f"{operator}_backward", reject_second_derivative, lib=_LIBRARY)
    torch.library.register_autograd(operator, differentiate, setup_context=_setup_context, lib=_LIBRARY)


def run_scan(name: str, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Call an operator made by `define_scan`, saving for backward only where a gradient is required."""
    save = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    y, last, _ = getattr(torch.ops.ssmgen, name)(*inputs, save)
    return y, last


def _fake_backward(dy: Tensor, dlast: Tensor, saved: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs = ScanInputs(*arguments)
    u, A = inputs.u, inputs.A
    whole = (x.new_empty(x.shape) for x in inputs[:5])
    dD, dbias = A.new_empty(u.shape[2]), A.new_empty(u.shape[2])
    dz = u.new_empty(u.shape if inputs.z is not None else (0,))
    return *whole, dD, dz, dbias, A.new_empty(u.shape[0], *A.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # what is saved would get a gradient of zeros as large as itself
    ctx.save_for_backward(*tensors, output[2])
