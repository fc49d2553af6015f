"""The layers of `ssmgen.ops.local.layers` on a CPU: C kernels with their backward, as `torch.library` operators.

torch's functions read and write a tensor for every small step, and some round differently with the number of threads
(SiLU vectorises all but the end of each thread's share). These read once, write once, and repeat to the bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmgen.ops import cpu_library

_LIBRARY = torch.library.Library("ssmgen", "FRAGMENT")
_ROWS = 32  # csrc/cpu_kernels.c


class _NormArgs(ctypes.Structure):
    _fields_ = [
        *cpu_library.structure(
            ("batch", "length", "dim", "bf16", "x_batch", "x_step", "z_batch", "z_step", "weight_batch"), ()
        ),
        ("eps", ctypes.c_double),
        *cpu_library.structure((), ("x", "z", "weight", "bias", "out", "dout", "dx", "dz", "dweight", "dbias")),
    ]


class _ConvArgs(ctypes.Structure):
    _fields_ = cpu_library.structure(
        ("batch", "height", "width", "dim", "k", "bf16", "x_batch", "x_step"),
        ("x", "weight", "bias", "out", "dout", "dx", "dweight", "dbias"),
    )


class _GeluArgs(ctypes.Structure):
    _fields_ = cpu_library.structure(("count", "bf16"), ("x", "out", "dout", "dx"))


class _EmbedArgs(ctypes.Structure):
    _fields_ = cpu_library.structure(("tokens", "places", "classes", "dim", "bf16"), ("rows", "dout", "dtable"))


def runs(x: Tensor) -> bool:
    """Whether these operators accept a tensor: float32 or bfloat16 on a CPU where the library loads."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and not cpu_library.unavailable()


def _norm_args(x: Tensor, weight: Tensor, z: Tensor | None, eps: float) -> _NormArgs:
    batch, length, dim = x.shape
    args = _NormArgs(batch=batch, length=length, dim=dim, bf16=x.dtype == torch.bfloat16, eps=eps)
    args.x_batch, args.x_step = x.stride(0), x.stride(1)
    args.weight_batch = dim if weight.shape[0] > 1 else 0
    if z is not None:
        args.z_batch, args.z_step = z.stride(0), z.stride(1)
    return args


def _norm_given(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None) -> dict[str, Tensor]:
    given = {"x": cpu_library.dense_rows(x), "weight": weight.contiguous(), "bias": bias.contiguous()}
    return given if z is None else given | {"z": cpu_library.dense_rows(z)}


def _norm(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None, eps: float) -> Tensor:
    given = _norm_given(x, weight, bias, z)
    out = x.new_empty(x.shape)
    args = _norm_args(given["x"], weight, given.get("z"), eps)
    cpu_library.run("norm_forward", args, given | {"out": out})
    return out


def _norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = _norm_given(x, weight, bias, z)
    args = _norm_args(given["x"], weight, given.get("z"), eps)
    tiles = -(-args.length // _ROWS)
    gradients = {
        "dx": x.new_empty(x.shape),
        "dweight": weight.new_empty(args.batch, tiles, args.dim),
        "dbias": weight.new_empty(args.batch, tiles, args.dim),
        "dz": x.new_empty(x.shape if z is not None else (0,)),
    }
    cpu_library.run("norm_backward", args, given | gradients | {"dout": dout.contiguous()})
    over = (1,) if weight.shape[0] > 1 or args.batch == 1 else (0, 1)
    dweight, dbias = (gradients[name].sum(over).view(weight.shape) for name in ("dweight", "dbias"))
    return gradients["dx"], dweight, dbias, gradients["dz"]


def _conv_args(x: Tensor, weight: Tensor, height: int, width: int) -> _ConvArgs:
    args = _ConvArgs(batch=x.shape[0], height=height, width=width, dim=x.shape[2], k=weight.shape[-1])
    args.bf16, args.x_batch, args.x_step = x.dtype == torch.bfloat16, x.stride(0), x.stride(1)
    return args


def _taps(weight: Tensor) -> Tensor:
    return weight.flatten(1).t().contiguous()


def _conv_silu(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    x, out = cpu_library.dense_rows(x), x.new_empty(x.shape)
    tensors = {"x": x, "weight": _taps(weight), "bias": bias.contiguous(), "out": out}
    cpu_library.run("conv_forward", _conv_args(x, weight, height, width), tensors)
    return out


def _conv_silu_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    x, taps = cpu_library.dense_rows(x), _taps(weight)
    gradients = {
        "dx": x.new_empty(x.shape),
        "dweight": weight.new_empty(x.shape[0], *taps.shape),
        "dbias": weight.new_empty(x.shape[0], x.shape[2]),
    }
    given = {"x": x, "weight": taps, "bias": bias.contiguous(), "dout": dout.contiguous()}
    cpu_library.run("conv_backward", _conv_args(x, weight, height, width), given | gradients)
    dweight = gradients["dweight"].sum(0).t().reshape(weight.shape).contiguous()
    return gradients["dx"], dweight, gradients["dbias"].sum(0)


def _gelu(x: Tensor) -> Tensor:
    x, out = x.contiguous(), x.new_empty(x.shape)
    cpu_library.run("gelu_forward", _GeluArgs(count=x.numel(), bf16=x.dtype == torch.bfloat16), {"x": x, "out": out})
    return out


def _gelu_backward(dout: Tensor, x: Tensor) -> Tensor:
    tensors = {"x": x.contiguous(), "dout": dout.contiguous(), "dx": x.new_empty(x.shape)}
    cpu_library.run("gelu_backward", _GeluArgs(count=x.numel(), bf16=x.dtype == torch.bfloat16), tensors)
    return tensors["dx"]


def _sum_rows(table: Tensor, rows: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.embedding_bag(rows, table, mode="sum")


def _sum_rows_backward(dout: Tensor, table: Tensor, rows: Tensor, classes: int) -> Tensor:
    args = _EmbedArgs(tokens=rows.shape[0], places=rows.shape[1], classes=classes, dim=table.shape[1])
    args.bf16 = dout.dtype == torch.bfloat16
    dtable = table.new_empty(table.shape, dtype=torch.float32)
    tensors = {"rows": rows.contiguous(), "dout": dout.contiguous(), "dtable": dtable}
    cpu_library.run("embed_backward", args, tensors)
    return dtable.to(table.dtype)


def _like(*indices: int) -> Callable[..., Any]:
    """A fake operator that returns tensors shaped like its arguments at ``indices``, empty where one is None."""

    def fake(*arguments: Any) -> Any:
        shaped = (arguments[i] for i in indices)
        results = tuple(arguments[indices[0]].new_empty(0) if x is None else x.new_empty(x.shape) for x in shaped)
        return results if len(results) > 1 else results[0]

    return fake


def _define(
    name: str,
    arguments: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    fake: Callable[..., Any],
    differentiated: tuple[int, ...],
) -> None:
    """Define ``ssmgen::<name>`` and ``ssmgen::<name>_backward``.

    Args:
        name: of the operator.
        arguments: in torch's schema language.
        forward: the operator.
        backward: ``(gradient of the result, *arguments)`` to the gradients of those ``differentiated``.
        fake: ``(*arguments)`` to an empty result.
        differentiated: positions of the arguments that receive a gradient.
    """
    gradients = ", ".join(["Tensor"] * len(differentiated))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.inputs = tuple(None if isinstance(x, Tensor) else (x,) for x in inputs)

    def differentiate(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if kept is None else kept[0] for kept in ctx.inputs]
        results = getattr(torch.ops.ssmgen, f"{name}_backward")(dout, *inputs)
        several = results if isinstance(results, (tuple, list)) else (results,)
        found = dict(zip(differentiated, several, strict=True))
        return tuple(found.get(i) if isinstance(x, Tensor) else None for i, x in enumerate(inputs))

    def reject_second_derivative(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"ssmgen::{name} is differentiable once: use float64, which torch's own functions compute")

    _LIBRARY.define(f"{name}({arguments}) -> Tensor")
    _LIBRARY.define(
        f"{name}_backward(Tensor dout, {arguments}) -> " + (f"({gradients})" if "," in gradients else "Tensor")
    )
    _LIBRARY.impl(name, forward, "CPU")
    _LIBRARY.impl(f"{name}_backward", backward, "CPU")
    operator = f"ssmgen::{name}"
    torch.library.register_fake(operator, fake, lib=_LIBRARY)
    torch.library.register_fake(f"{operator}_backward", _like(*(i + 1 for i in differentiated)), lib=_LIBRARY)
    torch.library.register_autograd(f"{operator}_backward", reject_second_derivative, lib=_LIBRARY)
    torch.library.register_autograd(operator, differentiate, setup_context=setup_context, lib=_LIBRARY)


_define(
    "cpu_norm",
    "Tensor x, Tensor weight, Tensor bias, Tensor? z, float eps",
    *(_norm, _norm_backward, _like(0), (0, 1, 2, 3)),
)
_define(
    "cpu_conv_silu",
    "Tensor x, Tensor weight, Tensor bias, int height, int width",
    *(_conv_silu, _conv_silu_backward, _like(0), (0, 1, 2)),
)
_define("cpu_gelu", "Tensor x", _gelu, _gelu_backward, _like(0), (0,))
_define(
    "cpu_sum_rows",
    "Tensor table, Tensor rows, int classes",
    *(_sum_rows, _sum_rows_backward, lambda table, rows, _: table.new_empty(len(rows), table.shape[1]), (0,)),
)
