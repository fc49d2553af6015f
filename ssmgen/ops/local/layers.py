"""The layers around the scan: one kernel each where there is one for the device and dtype, else torch's functions."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ssmgen.ops.backend import FLOATS, Backend
from ssmgen.ops.dispatch import Operator
from ssmgen.ops.local import cpu, dense, triton


class _Torch:
    """torch's own functions, as a `Backend`."""

    name = "torch"
    devices: tuple[str, ...] | None = None
    dtypes = FLOATS
    auto_for: tuple[str, ...] | None = None

    def unavailable(self) -> str | None:
        return None  # PyTorch runs everywhere

    def describe(self) -> str:
        return "PyTorch's own functions, any device"


_FAST: dict[str, tuple[Backend, ...]] = {"norm": (cpu,), "conv_silu": (cpu, triton), "gelu": (cpu,)}
_FAST |= {"sum_rows": (cpu, dense)}
LOCAL: tuple[Operator[Backend], ...] = tuple(Operator(name, (*fast, _Torch())) for name, fast in _FAST.items())
_BY_NAME = {operator.name: operator for operator in LOCAL}


def _chosen(name: str, x: Tensor, backend: str = "auto") -> str:
    """The backend that runs an operator for a tensor's device and dtype."""
    return _BY_NAME[name].choose(x.device.type, x.dtype, backend).name


def norm(x: Tensor, weight: Tensor, bias: Tensor, z: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """``(LayerNorm(x) weight + bias) SiLU(z)`` over the channels, computed in float32 (float64 for float64).

    LayerNorm is arXiv 1607.06450, section 3. With ``weight = 1 + scale`` and ``bias = shift`` per image it is AdaLN
    (arXiv 2212.09748); with a gate ``z``, the gated norm that follows the scan in VMamba (arXiv 2401.10166).

    Args:
        x: tokens, ``(batch, length, dim)``.
        weight, bias: ``(dim,)`` or ``(1, dim)`` for all images, or ``(batch, dim)``.
        z: gate of the shape and dtype of ``x``; no gate where None.
        eps: added to the variance.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError: shapes that do not match.
    """
    if x.dim() != 3 or (z is not None and z.shape != x.shape):
        given = "" if z is None else f" and {tuple(z.shape)}"
        raise ValueError(f"x must be (batch, length, dim), and z of its shape, got {tuple(x.shape)}{given}")
    precision = torch.promote_types(x.dtype, torch.float32)
    rows = [p.to(precision).reshape(-1, p.shape[-1]) for p in (weight, bias)]
    wanted = ((1, x.shape[2]), (x.shape[0], x.shape[2]))
    if any(tuple(p.shape) not in wanted for p in rows) or rows[0].shape != rows[1].shape:
        raise ValueError(
            f"weight and bias must both be ({x.shape[2]},) or ({x.shape[0]}, {x.shape[2]}) for x {tuple(x.shape)}, got "
            f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    weight, bias = rows
    if _chosen("norm", x) == "cpu":
        return torch.ops.ssmgen.cpu_norm(x, weight, bias, None if z is None else z.to(x.dtype), eps)
    normed = F.layer_norm(x.to(precision), x.shape[-1:], eps=eps) * weight.unsqueeze(1) + bias.unsqueeze(1)
    return (normed if z is None else normed * F.silu(z.to(precision))).to(x.dtype)


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int], *, backend: str = "auto") -> Tensor:
    """Depthwise convolution over a grid, zero-padded, then SiLU: VMamba's before the scan (arXiv 2401.10166).

    Args:
        x: tokens in row-major order, ``(batch, height * width, dim)``; may be a slice of wider rows.
        weight: ``(dim, 1, k, k)``, k odd.
        bias: ``(dim,)``.
        size: (height, width).
        backend: "auto", or one that ``backends("conv_silu")`` lists.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError: tokens that do not fill the grid, weights for other channels, or a k that the named backend does not
            take.
        RuntimeError: the named backend cannot run here, or does not take this device or dtype.
    """
    height, width = size
    if x.dim() != 3 or x.shape[1] != height * width:
        raise ValueError(f"x must be (batch, {height * width}, dim) for a grid of {size}, got {tuple(x.shape)}")
    dim, k = x.shape[2], weight.shape[-1]
    if tuple(weight.shape) != (dim, 1, k, k) or k % 2 == 0 or tuple(bias.shape) != (dim,):
        raise ValueError(
            f"weight must be ({dim}, 1, k, k) with an odd k, and bias ({dim},), for tokens of width {dim}, got "
            f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    chosen = _chosen("conv_silu", x, backend)
    if chosen == "cpu":
        return torch.ops.ssmgen.cpu_conv_silu(x, weight.float(), bias.float(), *size)
    if chosen == "triton" and (k <= triton.LARGEST_KERNEL or backend == "triton"):
        return triton.conv_silu(x, weight, bias, size)
    grid = rearrange(x, "b (h w) e -> b e h w", h=size[0])  # a channels-last view: nothing is copied
    convolved = F.conv2d(grid, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return F.silu(rearrange(convolved, "b e h w -> b (h w) e"))


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415, section 2), elementwise for any shape."""
    return torch.ops.ssmgen.cpu_gelu(x) if _chosen("gelu", x) == "cpu" else F.gelu(x, approximate="tanh")


def sum_rows(table: Tensor, rows: Tensor, classes: int, *, backend: str = "auto") -> Tensor:
    """For each token, the sum of one row per place of its patch: the embedding of a patch of labels.

    Args:
        table: ``(places * classes, dim)``.
        rows: int64 ``(tokens, places)``; place p takes one of ``p * classes ... (p + 1) * classes - 1``. Nothing checks
            this on a GPU, where reading them would wait for it.
        classes: rows per place.
        backend: "auto", or one that ``backends("sum_rows")`` lists.

    Returns:
        ``(tokens, dim)``, the table's dtype.

    Raises:
        ValueError: rows of the wrong shape or dtype, or a table of the wrong length.
        RuntimeError: the named backend cannot run here, or does not take this device or dtype.
    """
    if rows.dim() != 2 or rows.dtype != torch.int64 or table.dim() != 2 or len(table) != rows.shape[1] * classes:
        raise ValueError(
            f"rows must be int64 (tokens, places) and table (places * {classes}, dim), got {rows.dtype} "
            f"{tuple(rows.shape)} and {tuple(table.shape)}"
        )
    chosen = _chosen("sum_rows", table, backend)
    if chosen == "cpu":
        return torch.ops.ssmgen.cpu_sum_rows(table, rows, classes)
    if chosen == "dense":
        return torch.ops.ssmgen.dense_sum_rows(table, rows, classes)
    return F.embedding_bag(rows, table, mode="sum")
