"""What the fused scans share: `torch.library` operators around a forward and a backward.

An operator is one node to `torch.compile`, whatever runs inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("ssmgen", "FRAGMENT")
_TENSORS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, "
    "Tensor? initial, Tensor? order, bool softplus"
)

#: (u, delta, A, B, C, D, z, bias, initial, order): what a kernel reads.
_Maybe = Tensor | None
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, _Maybe, _Maybe, _Maybe, _Maybe, _Maybe]


def define_scan(
    name: str,
    backend: str,
    forward: Callable[[Inputs, bool, bool], tuple[Tensor, Tensor, Tensor]],
    backward: Callable[[Tensor, Tensor, Tensor, Inputs, bool], tuple[Tensor, ...]],
    saved_shape: Callable[[Tensor, Tensor], tuple[int, ...]],
    dispatch_key: str,
) -> None:
    """Define the operators ``ssmgen::<name>`` and ``ssmgen::<name>_backward``.

    Args:
        name: of the operator.
        backend: as `selective_scan` names it, for messages.
        forward: ``(inputs, softplus, save)`` to y, the last state, and what backward needs (empty unless ``save``).
        backward: ``(dy, dlast, saved, inputs, softplus)`` to the gradients of u, delta, A, B, C, D, z, bias, initial.
        saved_shape: shape of what is saved, from u and A; float32.
        dispatch_key: torch's, for the devices it runs on.
    """

    def fake_forward(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Any,
        z: Any,
        bias: Any,
        initial: Any,
        order: Any,
        softplus: bool,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        saved = A.new_empty(saved_shape(u, A) if save else (0,))
        return u.new_empty(u.shape), A.new_empty(u.shape[0], *A.shape), saved

    def fake_backward(
        dy: Tensor,
        dlast: Tensor,
        saved: Tensor,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Any,
        z: Any,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        made = (x.new_empty(x.shape) for x in (u, delta, A, B, C))
        dD, dbias = A.new_empty(u.shape[2]), A.new_empty(u.shape[2])
        dz = u.new_empty(u.shape if z is not None else (0,))
        return *made, dD, dz, dbias, A.new_empty(u.shape[0], *A.shape)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.softplus, _ = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)  # what is saved would get a gradient of zeros as large as itself
        ctx.save_for_backward(*tensors, output[2])

    def differentiate(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        *inputs, saved = ctx.saved_tensors
        u, A = inputs[0], inputs[2]
        dy = u.new_zeros(u.shape) if dy is None else dy
        dlast = A.new_zeros(u.shape[0], *A.shape) if dlast is None else dlast
        gradients = getattr(torch.ops.ssmgen, f"{name}_backward")(dy, dlast, saved, *inputs, ctx.softplus)
        kept = (None if x is None else gradient for x, gradient in zip(inputs[:-1], gradients, strict=True))
        return *kept, None, None, None  # order, softplus and save have none

    def refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"backend {backend!r} of selective_scan is differentiable once: use backend='reference' for more"
        )

    def run_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, softplus, save = arguments
        return forward(tuple(inputs), softplus, save)

    def run_backward(dy: Tensor, dlast: Tensor, saved: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *inputs, softplus = arguments
        return backward(dy, dlast, saved, tuple(inputs), softplus)

    gradients = ", ".join(["Tensor"] * 9)
    _LIBRARY.define(f"{name}({_TENSORS}, bool save) -> (Tensor, Tensor, Tensor)")
    _LIBRARY.define(f"{name}_backward(Tensor dy, Tensor dlast, Tensor saved, {_TENSORS}) -> ({gradients})")
    _LIBRARY.impl(name, run_forward, dispatch_key)
    _LIBRARY.impl(f"{name}_backward", run_backward, dispatch_key)
    operator, its_backward = f"ssmgen::{name}", f"ssmgen::{name}_backward"
    torch.library.register_fake(operator, fake_forward, lib=_LIBRARY)
    torch.library.register_fake(its_backward, fake_backward, lib=_LIBRARY)
    torch.library.register_autograd(its_backward, refuse_second_derivative, lib=_LIBRARY)
    torch.library.register_autograd(operator, differentiate, setup_context=setup_context, lib=_LIBRARY)


def run_scan(name: str, inputs: Inputs, softplus: bool) -> tuple[Tensor, Tensor]:
    """Call an operator made by `define_scan`, saving for backward only where a gradient is asked for."""
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, last, _ = getattr(torch.ops.ssmgen, name)(*inputs, softplus, save)
    return y, last
