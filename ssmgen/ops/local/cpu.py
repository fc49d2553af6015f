"""The layers of `ssmgen.ops.local.layers` on a CPU: C kernels that read once, write once, and repeat to the bit.

torch's SiLU rounds differently with the number of threads: it vectorises all but the end of each thread's share.
"""

import ctypes

import torch
from torch import Tensor

from ssmgen.ops import cpu_library
from ssmgen.ops.operator import define, dense_rows, like

name = "cpu"
devices: tuple[str, ...] | None = ("cpu",)
dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
auto_for: tuple[str, ...] | None = ("cpu",)
unavailable, describe = cpu_library.unavailable, cpu_library.describe
_ROWS = 32  # csrc/cpu_kernels.c
#: A kernel's arguments, and the tensors it reads.
_Call = tuple[ctypes.Structure, dict[str, Tensor]]
_NormArgs = cpu_library.structure(
    "norm_args",
    "batch length dim bf16 x_batch x_step z_batch z_step weight_batch",
    "x z weight bias out dout dx dz dweight dbias",
    doubles="eps",
)
_ConvArgs = cpu_library.structure(
    "conv_args", "batch height width dim k bf16 x_batch x_step", "x weight bias out dout dx dweight dbias"
)
_GeluArgs = cpu_library.structure("gelu_args", "count bf16", "x out dout dx")
_EmbedArgs = cpu_library.structure("embed_args", "tokens places classes dim bf16", "rows dout dtable")


def _norm_call(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None, eps: float) -> _Call:
    batch, length, dim = x.shape
    args = _NormArgs(batch=batch, length=length, dim=dim, bf16=x.dtype == torch.bfloat16, eps=eps)
    args.weight_batch = dim if weight.shape[0] > 1 else 0
    tokens = {"x": dense_rows(x)} if z is None else {"x": dense_rows(x), "z": dense_rows(z)}
    cpu_library.set_strides(args, tokens)
    return args, tokens | {"weight": weight.contiguous(), "bias": bias.contiguous()}


def _norm(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None, eps: float) -> Tensor:
    args, given = _norm_call(x, weight, bias, z, eps)
    out = x.new_empty(x.shape)
    cpu_library.run("norm_forward", args, given | {"out": out})
    return out


def _norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args, given = _norm_call(x, weight, bias, z, eps)
    dx, dz = x.new_empty(x.shape), x.new_empty(x.shape if z is not None else (0,))
    # Partial sums for each image and _ROWS tokens.
    dweight, dbias = (weight.new_empty(args.batch, -(-args.length // _ROWS), args.dim) for _ in range(2))
    gradients = {"dx": dx, "dz": dz, "dweight": dweight, "dbias": dbias}
    cpu_library.run("norm_backward", args, given | gradients | {"dout": dout.contiguous()})
    over = (1,) if weight.shape[0] > 1 or args.batch == 1 else (0, 1)
    return dx, dweight.sum(over).view(weight.shape), dbias.sum(over).view(weight.shape), dz


def _conv_call(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> _Call:
    args = _ConvArgs(batch=x.shape[0], height=height, width=width, dim=x.shape[2], k=weight.shape[-1])
    args.bf16 = x.dtype == torch.bfloat16
    tokens = {"x": dense_rows(x)}
    cpu_library.set_strides(args, tokens)
    return args, tokens | {"weight": weight.flatten(1).t().contiguous(), "bias": bias.contiguous()}


def _conv_silu(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    args, given = _conv_call(x, weight, bias, height, width)
    out = x.new_empty(x.shape)
    cpu_library.run("conv_forward", args, given | {"out": out})
    return out


def _conv_silu_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    args, given = _conv_call(x, weight, bias, height, width)
    dx, dbias = x.new_empty(x.shape), weight.new_empty(args.batch, args.dim)
    dweight = weight.new_empty(args.batch, *given["weight"].shape)
    gradients = {"dx": dx, "dweight": dweight, "dbias": dbias}
    cpu_library.run("conv_backward", args, given | gradients | {"dout": dout.contiguous()})
    return dx, dweight.sum(0).t().reshape(weight.shape).contiguous(), dbias.sum(0)


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


_NORM = "Tensor x, Tensor weight, Tensor bias, Tensor? z, float eps"
_CONV = "Tensor x, Tensor weight, Tensor bias, int height, int width"
define("cpu_norm", _NORM, _norm, _norm_backward, like(0), (0, 1, 2, 3))
define("cpu_conv_silu", _CONV, _conv_silu, _conv_silu_backward, like(0), (0, 1, 2))
define("cpu_gelu", "Tensor x", _gelu, _gelu_backward, like(0), (0,))
define(
    "cpu_sum_rows",
    "Tensor table, Tensor rows, int classes",
    *(_sum_rows, _sum_rows_backward, lambda table, rows, _: table.new_empty(len(rows), table.shape[1]), (0,)),
)
