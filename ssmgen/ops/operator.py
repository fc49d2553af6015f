"""`torch.library` operators around fused kernels, one node each to `torch.compile`, and the rows those kernels read."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("ssmgen", "FRAGMENT")


def define(
    name: str,
    arguments: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    fake: Callable[..., Any],
    differentiated: tuple[int, ...],
    *,
    refusal: str | None = None,
    results: int = 1,
    dispatch_key: str = "CPU",
) -> None:
    """Define ``ssmgen::<name>`` and ``ssmgen::<name>_backward``.

    Args:
        name: of the operator.
        arguments: in torch's schema language.
        forward: ``(*arguments)`` to the result, or to several, the last of which is only saved for backward.
        backward: ``(gradient of the result, *arguments)`` to the gradients of those ``differentiated``. Of several
            results it takes each one's gradient or None, then the last result itself.
        fake: ``(*arguments)`` to empty results.
        differentiated: positions of the arguments that receive a gradient.
        refusal: the message where a second derivative is asked for; that of the layers around the scan where None.
        results: number of tensors that ``forward`` returns.
        dispatch_key: torch's, for the devices it runs on.
    """
    upstream = ["Tensor d0"] if results == 1 else [f"Tensor? d{i}" for i in range(results - 1)] + ["Tensor saved"]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kept = () if results == 1 else output[-1:]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)  # what is saved would get a gradient of zeros as large as itself
        ctx.save_for_backward(*kept, *(x for x in inputs if isinstance(x, Tensor)))
        ctx.inputs = tuple(None if isinstance(x, Tensor) else (x,) for x in inputs)

    def differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        given = gradients if results == 1 else (*gradients[:-1], next(saved))
        inputs = [next(saved) if kept is None else kept[0] for kept in ctx.inputs]
        found = getattr(torch.ops.ssmgen, f"{name}_backward")(*given, *inputs)
        by_position = dict(zip(differentiated, (found,) if isinstance(found, Tensor) else found, strict=True))
        return tuple(by_position.get(i) if isinstance(x, Tensor) else None for i, x in enumerate(inputs))

    def reject_second_derivative(ctx: Any, *gradients: Tensor) -> None:
        advice = f"ssmgen::{name} is differentiable once: use float64 or backend='torch', torch's own functions"
        raise RuntimeError(refusal or advice)

    fake_backward = like(*(i + len(upstream) for i in differentiated))
    _register(name, arguments, results, forward, fake, dispatch_key)
    backward_arguments = ", ".join([*upstream, arguments])
    _register(f"{name}_backward", backward_arguments, len(differentiated), backward, fake_backward, dispatch_key)
    torch.library.register_autograd(f"ssmgen::{name}_backward", reject_second_derivative, lib=_LIBRARY)
    torch.library.register_autograd(f"ssmgen::{name}", differentiate, setup_context=setup_context, lib=_LIBRARY)


def _register(
    name: str, arguments: str, results: int, run: Callable[..., Any], fake: Callable[..., Any], dispatch_key: str
) -> None:
    returned = ", ".join(["Tensor"] * results)
    _LIBRARY.define(f"{name}({arguments}) -> " + (f"({returned})" if results > 1 else returned))
    _LIBRARY.impl(name, run, dispatch_key)
    torch.library.register_fake(f"ssmgen::{name}", fake, lib=_LIBRARY)


def like(*indices: int) -> Callable[..., Any]:
    """A fake operator that returns tensors shaped like its arguments at ``indices``, empty where one is None."""

    def fake(*arguments: Any) -> Any:
        shaped = (arguments[i] for i in indices)
        results = tuple(arguments[indices[0]].new_empty(0) if x is None else x.new_empty(x.shape) for x in shaped)
        return results if len(results) > 1 else results[0]

    return fake


def dense_rows(x: Tensor) -> Tensor:
    """``x``, of any shape, if its last dimension is dense, else a contiguous copy: kernels stride over the others."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
