"""Self-Mamba and Cross-Mamba over a 2-D grid of tokens: one selective state-space core with two ways to feed it.

Letters: b batch, l length (= height x width tokens), d dim, e inner width (expand x dim), n d_state, r dt_rank,
k directions.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmgen.nn.kept_states import KeptStates, kept_states, read_states
from ssmgen.nn.parts import parts_of, states_of
from ssmgen.nn.signal import Signal
from ssmgen.nn.step_size import reset_step_size
from ssmgen.ops import ScanOrder, conv_silu, norm, scan_directions, scan_order, selective_scan
from ssmgen.registry import closest, passes_on, register

_SCANNED = ("mask", "image", "sum")


class ScanConstants(NamedTuple):
    """What a `SelectiveSSM` derives from its weights and the grid alone.

    Attributes:
        A: ``-exp(A_log)``, ``(k e, n)``, float32 or float64.
        orders: of the directions, see `ssmgen.ops.scan_order`.
    """

    A: Tensor
    orders: tuple[ScanOrder | None, ...]


ScanConstants.serves_all = True  # type: ignore[attr-defined]  # see `ssmgen.nn.parts`


class SelectiveSSM(nn.Module):
    """Core of both mixers (Mamba, arXiv 2312.00752, section 3): convolution, selective scan, norm, gate, projection.

    It owns what does not depend on where delta, B, C and u come from: the convolution, ``A_log``, ``D``, the step-size
    projection, the norm after the scan and the output projection. Initialisation follows Mamba: A = -(1..d_state) in
    every channel (S4D-real), D = 1, and a step-size bias whose softplus is log-uniform in [1e-3, 1e-1].

    With several directions the tokens are scanned in as many orders and the results added (SS2D of VMamba, arXiv
    2401.10166). Each direction has its own step sizes, A, B, C and D; they share the rest. The parameters and the
    arguments of `scan` then hold the directions side by side in their first and last dimension.

    Args:
        dim: width of the tokens.
        d_state: states per channel.
        expand: inner width as a multiple of ``dim``.
        dt_rank: rank of the step-size projection; ceil(dim / 16) where None.
        d_conv: size of the square depthwise kernel; odd.
        order: the sequence in which the grid is scanned, a name that `ssmgen.ops.scan_order` takes.
        directions: 1, 2 (``order`` and its reverse) or 4 (both also on the transposed grid), see
            `ssmgen.ops.scan_directions`.
        backend: which `selective_scan` backend runs.

    Raises:
        ValueError: a size that is not positive, an even kernel, an unknown order, or another number of directions.
    """

    #: Parameters that stay in float32 where a model samples in 16 bits.
    keep_float32 = ("A_log", "D", "dt_proj.bias")

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 16,
        expand: int = 2,
        dt_rank: int | None = None,
        d_conv: int = 3,
        order: str = "row",
        directions: int = 1,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if min(dim, d_state, expand, d_conv) < 1 or d_conv % 2 == 0:
            raise ValueError(
                f"dim, d_state, expand and d_conv must be positive and d_conv odd, got dim={dim}, d_state={d_state}, "
                f"expand={expand}, d_conv={d_conv}"
            )
        orders = scan_directions(order, directions)
        for name in orders:
            scan_order(name, 1, 1)  # an unknown order is an error here, not in the first forward
        self.d_inner = expand * dim
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.order = order
        self.directions = directions
        self.orders = orders
        self.backend = backend
        self.conv = nn.Conv2d(self.d_inner, self.d_inner, d_conv, padding=d_conv // 2, groups=self.d_inner)
        self.dt_proj = nn.Linear(self.dt_rank, directions * self.d_inner)
        self.A_log = nn.Parameter(torch.empty(directions * self.d_inner, d_state))
        self.D = nn.Parameter(torch.ones(directions * self.d_inner))
        self.out_norm = nn.LayerNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, dim, bias=False)
        for parameter in (self.A_log, self.D):
            parameter.no_weight_decay = True  # type: ignore[attr-defined]
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, d_state + 1).float().log())
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        reset_step_size(self.dt_proj.bias)

    def mix_locally(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Depthwise convolution over the grid and SiLU; ``(b, l, e)`` in row-major order, in and out."""
        bias: Tensor = self.conv.bias  # type: ignore[assignment]
        return conv_silu(x, self.conv.weight, bias, size)

    def constants(self, size: tuple[int, int]) -> ScanConstants:
        """What is computed once where weights and grid, of ``size`` (height, width), stay the same."""
        orders = tuple(scan_order(name, *size, device=self.A_log.device) for name in self.orders)
        return ScanConstants(-torch.exp(at_least_float32(self.A_log)), orders)

    def scan(
        self,
        u: Tensor,
        delta: Tensor,
        B: Tensor,
        C: Tensor,
        size: tuple[int, int],
        orders: Sequence[ScanOrder | None] | None = None,
        constants: ScanConstants | None = None,
    ) -> Tensor:
        """`selective_scan` in this layer's orders with its A, D and step-size bias, summed over the directions.

        Args:
            u: ``(b, l, e)``, row-major as all are.
            delta: ``(b, l, k e)``.
            B, C: ``(b, l, k n)``.
            size: (height, width).
            orders: of the directions, instead of the layer's own.
            constants: the result of `constants`, to compute it once; not used where gradients are needed.
        """
        A, own = self.constants(size) if constants is None or torch.is_grad_enabled() else constants
        shared = A, self.D, self.dt_proj.bias
        deltas, Bs, Cs = (x.chunk(self.directions, dim=-1) for x in (delta, B, C))
        As, Ds, biases = (at_least_float32(x).chunk(self.directions) for x in shared)
        results: list[Any] = [
            selective_scan(
                u,
                deltas[k],
                As[k],
                Bs[k],
                Cs[k],
                Ds[k],
                delta_bias=biases[k],
                delta_softplus=True,
                order=order,
                backend=self.backend,
            )
            for k, order in enumerate(own if orders is None else orders)
        ]
        return functools.reduce(torch.add, results)

    def step_size(self, dt: Tensor) -> Tensor:
        """Low-rank step sizes ``(b, l, k r)`` to ``(b, l, k e)``, without the bias, which the scan adds in float32."""
        if self.directions == 1:
            return F.linear(dt, self.dt_proj.weight)
        parts = zip(dt.chunk(self.directions, -1), self.dt_proj.weight.chunk(self.directions), strict=True)
        return torch.cat([F.linear(part, weight) for part, weight in parts], dim=-1)

    def finish(self, y: Tensor, z: Tensor) -> Tensor:
        """Scan output ``(b, l, e)`` normalised, gated by ``z`` and projected to ``(b, l, d)``."""
        return self.out_proj(norm(y, self.out_norm.weight, self.out_norm.bias, z, eps=self.out_norm.eps))


def at_least_float32(x: Tensor) -> Tensor:
    """``x``, of any shape, in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


@register("block", "cross-scan-mamba", directions=4)
@register("block", "bidirectional-mamba", directions=2)
@register("block", "self-mamba")
class SelfMamba(nn.Module):
    """Selective state-space layer whose delta, B and C all come from the content (SISMA eqs. 4 to 6).

    ``x, z = in_proj(content)``; ``x = SiLU(conv3x3(x))``; ``delta, B, C = linear(x)``;
    ``y = scan(x, delta, A, B, C) + D x``; output ``out_proj(LayerNorm(y) * SiLU(z))``.

    Args:
        dim: width of the tokens.
        **ssm: other arguments of `SelectiveSSM`.
    """

    @passes_on(SelectiveSSM)
    def __init__(self, dim: int, **ssm: Any) -> None:
        super().__init__()
        self.ssm = SelectiveSSM(dim, **ssm)
        inner = self.ssm.d_inner
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.widths = [self.ssm.directions * n for n in (self.ssm.dt_rank, self.ssm.d_state, self.ssm.d_state)]
        self.x_proj = nn.Linear(inner, sum(self.widths), bias=False)

    def constants(self, size: tuple[int, int]) -> ScanConstants:
        """What sampling computes once for a grid of ``size``, (height, width)."""
        return self.ssm.constants(size)

    def forward(self, x: Tensor, size: tuple[int, int], constants: ScanConstants | None = None) -> Tensor:
        """Mix tokens ``(batch, height * width, dim)`` in row-major order; ``size`` is (height, width) in tokens.

        ``constants`` is the result of `constants`, to compute it once; it is not used where gradients are needed.

        Raises:
            ValueError: the tokens do not fit ``size`` or the layer's width.
        """
        check_tokens(x, size, self.in_proj.in_features, "x")
        content, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.ssm.mix_locally(content, size)
        dt, B, C = self.x_proj(u).split(self.widths, dim=-1)
        y = self.ssm.scan(u, self.ssm.step_size(dt), B, C, size, constants=constants)
        return self.ssm.finish(y, z)


class CrossCondition(NamedTuple):
    """What a `CrossMamba` derives from the mask alone, row-major: computed once per mask, used at every step.

    Attributes:
        u: the mask's part of the scanned sequence ``(b, l, e)``, or None where the image alone is scanned.
        delta: step sizes ``(b, l, k e)`` before bias and softplus.
        B: input maps ``(b, l, k n)``.
        constants: of the scan; None where gradients are needed.
    """

    u: Tensor | None
    delta: Tensor
    B: Tensor
    constants: ScanConstants | None = None


@register("block", "cross-mamba")
class CrossMamba(nn.Module):
    """Selective state-space layer steered by a condition: delta and B from it, C and the gate from the content.

    SISMA eq. 7, after Mamba-ST: with mask tokens e and content x, ``m = SiLU(conv3x3(cond_proj(e)))``,
    ``delta, B = linear(m)``; ``c, z = in_proj(x)``, ``C = linear(SiLU(conv3x3(c)))`` with the same convolution;
    ``y = scan(u, delta, A, B, C) + D u``; output ``out_proj(LayerNorm(y) * SiLU(z))``. In terms of attention, C is the
    query, B the key and u the value.

    Args:
        u: the scanned sequence: ``"mask"`` (u = m, as Mamba-ST does; the default), ``"image"``
            (u = SiLU(conv3x3(c))) or ``"sum"``, both added. The scan is linear in u, so its result is then the sum of
            those of the other two.
        dim: width of the tokens.
        **ssm: other arguments of `SelectiveSSM`.
    """

    #: Whether the condition's tokens must lie on the image's token grid.
    needs_grid = True

    @passes_on(SelectiveSSM)
    def __init__(self, dim: int, *, u: str = "mask", **ssm: Any) -> None:
        super().__init__()
        if u not in _SCANNED:
            raise ValueError(f"u must be 'mask', 'image' or 'sum' (what is scanned), got {u!r}{closest(u, _SCANNED)}")
        self.u = u
        self.ssm = SelectiveSSM(dim, **ssm)
        inner, d_state = self.ssm.d_inner, self.ssm.directions * self.ssm.d_state
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.cond_proj = nn.Linear(dim, inner, bias=False)
        self.x_proj = nn.Linear(inner, d_state, bias=False)
        self.widths = [self.ssm.directions * self.ssm.dt_rank, d_state]
        self.cond_x_proj = nn.Linear(inner, sum(self.widths), bias=False)

    def condition(self, signal: Signal | Tensor, size: tuple[int, int]) -> CrossCondition:
        """Everything that depends on the condition tokens ``(batch, height * width, dim)`` alone."""
        tokens = condition_tokens(signal, size, self.cond_proj.in_features)
        m = self.ssm.mix_locally(self.cond_proj(tokens), size)
        dt, B = self.cond_x_proj(m).split(self.widths, dim=-1)
        constants = None if torch.is_grad_enabled() else self.ssm.constants(size)
        return CrossCondition(None if self.u == "image" else m, self.ssm.step_size(dt), B, constants)

    def keep(self, cond: Any, size: tuple[int, int]) -> Any:
        """What `condition` returned, with all states of the scan instead, where these depend on the mask alone.

        They are n times as large as what is scanned, see `kept_bytes`. Where u is not the mask, they depend on the
        content too, and ``cond`` is returned as it is.
        """
        return kept_states(self.ssm, cond.u, cond.delta, cond.B, size) if self.kept_bytes(cond) else cond

    def kept_bytes(self, cond: Any) -> int:
        """Bytes of the states that `keep` would compute; 0 where there are none."""
        if self.u != "mask" or not isinstance(cond, CrossCondition):
            return 0
        return cond.delta.numel() * self.ssm.d_state * cond.delta.element_size()

    def forward(
        self, x: Tensor, cond: Tensor | CrossCondition | KeptStates | list[Any], size: tuple[int, int]
    ) -> Tensor:
        """Mix content tokens ``(batch, height * width, dim)`` with a condition on the same grid.

        Args:
            x: content tokens in row-major order.
            cond: condition tokens of the same shape, or what `condition` or `keep` made of them. A condition of batch 1
                serves every item of the batch. Several in a list serve as many equal parts of the batch, without being
                copied.
            size: (height, width) in tokens.

        Raises:
            ValueError: tokens or condition do not fit one another.
        """
        check_tokens(x, size, self.in_proj.in_features, "x")
        states = states_on_grid(self, x, cond, size)
        content, z = self.in_proj(x).chunk(2, dim=-1)
        content = self.ssm.mix_locally(content, size)
        C = self.x_proj(content)
        if any(isinstance(state, KeptStates) for state in states):
            scanned = read_states(states, C)
        else:
            scanned = [
                self.ssm.scan(self._scanned(own.u, part), own.delta, own.B, C_part, size, constants=own.constants)
                for own, part, C_part in parts_of(states, content, C)
            ]
        return self.ssm.finish(scanned[0] if len(scanned) == 1 else torch.cat(scanned), z)

    def _scanned(self, m: Tensor | None, content: Tensor) -> Tensor:
        if m is None:
            return content
        return m + content if self.u == "sum" else m


def tokens_of(signal: Signal | Tensor) -> Tensor:
    """The tokens ``(b, l, d)`` of a signal.

    Raises:
        ValueError: it has none, as that of a class label.
    """
    tokens = signal if isinstance(signal, Tensor) else signal.tokens
    if tokens is None:
        raise ValueError("this layer needs a condition with tokens, got a vector alone: leave it out of cross=")
    return tokens


def tokens_on_grid(signal: Signal | Tensor) -> Tensor:
    """The tokens ``(b, l, d)`` of a signal that lie on the image's token grid.

    Raises:
        ValueError: it has none, or they lie on no grid, as those of a text.
    """
    tokens = tokens_of(signal)
    if isinstance(signal, Signal) and signal.grid is None:
        raise ValueError(
            "this layer needs a condition on the image's token grid, and this one is a sequence of its own length: "
            "read it with 'cross-mamba-sequence' or 'cross-attention'"
        )
    return tokens


def condition_tokens(signal: Signal | Tensor, size: tuple[int, int], dim: int) -> Tensor:
    """The tokens ``(b, height * width, dim)`` of a signal on a grid; a `ValueError` where it has others."""
    tokens = tokens_on_grid(signal)
    check_tokens(tokens, size, dim, "cond")
    return tokens


def states_on_grid(layer: Any, x: Tensor, cond: Any, size: tuple[int, int]) -> list[Any]:
    """The states that ``cond`` holds for a layer, see `states_of`: named tuples of tensors ``(b, l, ...)`` and None.

    Raises:
        ValueError: one was made for another number of tokens than ``x``, ``(b, l, d)``, has.
    """
    states = states_of(layer, cond, size)
    for state in states:
        check_length(next(part for part in state if part is not None), x)
    return states


def check_tokens(x: Tensor, size: tuple[int, int], dim: int, name: str) -> None:
    """Reject tokens that are not ``(batch, height * width, dim)``."""
    height, width = size
    if x.dim() != 3 or x.shape[1] != height * width or x.shape[2] != dim:
        raise ValueError(
            f"{name} must be (batch, {height * width}, {dim}) for a grid of {height} x {width} tokens of width {dim}, "
            f"got {tuple(x.shape)}"
        )


def check_length(made: Tensor, x: Tensor) -> None:
    """Reject what a condition made, ``(b, l, ...)``, for another number of tokens than those of ``x``."""
    if made.shape[1] != x.shape[1]:
        raise ValueError(
            f"the condition was made for {made.shape[1]} tokens, the content has {x.shape[1]}: make both for the same "
            "grid"
        )
