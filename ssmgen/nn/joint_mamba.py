"""One scan over condition and content in turn: m1, x1, m2, x2, and so on.

Letters: b batch, l length (= height x width tokens), d dim, e inner width, n d_state, k directions.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmgen.nn.mamba import ScanConstants, SelfMamba, check_tokens, condition_tokens, states_on_grid
from ssmgen.nn.parts import parts_of
from ssmgen.nn.signal import Signal
from ssmgen.ops import ScanOrder, scan_order
from ssmgen.registry import passes_on, register

# What the step sizes of the condition start with beside the usual bias, before the softplus: they are up to seven times
# as large.
_STEP = 2.0


class JointState(NamedTuple):
    """What a `JointMamba` derives from the condition alone: computed once per mask, used at every step.

    Attributes:
        u: the condition's half of the scanned sequence, ``(b, l, e)``.
        delta: its step sizes, ``(b, l, k e)``, before bias and softplus.
        B: its input maps, ``(b, l, k n)``.
        constants: of the scan; None where gradients are needed.
    """

    u: Tensor
    delta: Tensor
    B: Tensor
    constants: ScanConstants | None = None


@register("block", "joint-mamba")
class JointMamba(SelfMamba):
    """`SelfMamba` whose state every condition token updates just before the content token at its place does.

    With condition tokens e: ``m = SiLU(conv3x3(cond_proj(e)))``; ``delta, B = linear(m)``, where delta has a learned
    term that starts large. The sequence that is scanned has both in turn, and is twice as long; the state is read at
    the content alone, by the C of `SelfMamba`. It replaces the mixer of a block and its cross layer.

    Args:
        dim: width of the tokens.
        **ssm: other arguments of `SelectiveSSM`.
    """

    #: Whether the condition's tokens must lie on the image's token grid.
    needs_grid = True

    @passes_on(SelfMamba)
    def __init__(self, dim: int, **ssm: Any) -> None:
        super().__init__(dim, **ssm)
        self.cond_proj = nn.Linear(dim, self.ssm.d_inner, bias=False)
        self.cond_x_proj = nn.Linear(self.ssm.d_inner, sum(self.widths[:2]), bias=False)
        self.cond_step = nn.Parameter(torch.full((self.ssm.directions * self.ssm.d_inner,), _STEP))
        self.cond_step.no_weight_decay = True  # type: ignore[attr-defined]

    def constants(self, size: tuple[int, int]) -> ScanConstants:
        """What sampling computes once for a grid of ``size``, (height, width); the orders are those of both in turn."""
        A = self.ssm.constants(size).A
        return ScanConstants(A, self._orders(size, A.device))

    def _orders(self, size: tuple[int, int], device: torch.device) -> tuple[ScanOrder, ...]:
        return tuple(in_turn(name, size, device) for name in self.ssm.orders)

    def condition(self, signal: Signal | Tensor, size: tuple[int, int]) -> JointState:
        """Everything that depends on the condition tokens ``(batch, height * width, dim)`` alone."""
        tokens = condition_tokens(signal, size, self.cond_proj.in_features)
        m = self.ssm.mix_locally(self.cond_proj(tokens), size)
        dt, B = self.cond_x_proj(m).split(self.widths[:2], dim=-1)
        delta = self.ssm.step_size(dt)
        constants = None if torch.is_grad_enabled() else self.constants(size)
        return JointState(m, delta + self.cond_step.to(delta.dtype), B, constants)

    def forward(  # type: ignore[override]
        self, x: Tensor, cond: Tensor | JointState | list[JointState], size: tuple[int, int]
    ) -> Tensor:
        """Mix content tokens ``(batch, height * width, dim)`` with one another and with a condition on the same grid.

        Args:
            x: content tokens in row-major order.
            cond: condition tokens of the same shape, or what `condition` made of them. A condition of batch 1 serves
                every item of the batch. Several in a list serve as many equal parts of the batch.
            size: (height, width) in tokens.

        Raises:
            ValueError: tokens or condition do not fit one another.
        """
        check_tokens(x, size, self.in_proj.in_features, "x")
        states = states_on_grid(self, x, cond, size)
        content, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.ssm.mix_locally(content, size)
        dt, B, C = self.x_proj(u).split(self.widths, dim=-1)
        own = [state for state, _ in parts_of(states, u)]
        joint_u, delta, joint_B = (
            torch.cat([torch.cat([getattr(state, name) for state in own]), part], dim=1)
            for name, part in (("u", u), ("delta", self.ssm.step_size(dt)), ("B", B))
        )
        constants = states[0].constants
        orders = self._orders(size, u.device) if constants is None else constants.orders
        read = torch.cat([torch.zeros_like(C), C], dim=1)
        y = self.ssm.scan(joint_u, delta, joint_B, read, size, orders, constants)
        return self.ssm.finish(y[:, x.shape[1] :].contiguous(), z)


def in_turn(order: str, size: tuple[int, int], device: torch.device) -> ScanOrder:
    """Two grids of tokens one after the other, ``(2 l,)``, scanned in turn: a token of the first, that of the second.

    Args:
        order: the path through either grid, a name that `ssmgen.ops.scan_order` takes.
        size: (height, width) of a grid.
        device: of the result.
    """
    length, path = size[0] * size[1], scan_order(order, *size, device=device)
    first = torch.arange(length, device=device) if path is None else path.forward
    forward = torch.stack([first, first + length], dim=1).flatten()
    return ScanOrder(forward, forward.argsort())
