"""Self-Mamba that a condition on the image's grid takes part in: one scan in the place of Self- and Cross-Mamba.

Letters: b batch, l length (= height x width tokens), d dim, e inner width, r dt_rank, n d_state, k directions.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmgen.nn.mamba import ScanConstants, SelfMamba, check_tokens, condition_tokens, states_on_grid
from ssmgen.nn.parts import parts_of
from ssmgen.nn.signal import Signal
from ssmgen.registry import passes_on, register


class ConditionedState(NamedTuple):
    """What a `ConditionedMamba` derives from the condition alone: computed once per mask, used at every step.

    Attributes:
        content: joins the projected content and its gate, ``(b, l, 2 e)``.
        maps: joins step sizes (of low rank), B and C, ``(b, l, k (r + 2 n))``.
        constants: of the scan; None where gradients are needed.
    """

    content: Tensor
    maps: Tensor
    constants: ScanConstants | None = None


@register("block", "conditioned-mamba")
class ConditionedMamba(SelfMamba):
    """`SelfMamba` to each of whose projections the condition adds a term, so that one scan serves both.

    With content x and condition tokens e: ``c, z = in_proj(x) + cond_proj(e)``; ``u = SiLU(conv3x3(c))``;
    ``delta, B, C = linear(u) + cond_x_proj(e)``; ``y = scan(u, delta, A, B, C) + D u``; output
    ``out_proj(LayerNorm(y) * SiLU(z))``. What the condition adds to z and to delta, B and C starts at zero: at first
    the condition is only added to what is scanned. It replaces the mixer of a block and its cross layer.

    Args:
        dim: width of the tokens.
        **ssm: other arguments of `SelectiveSSM`.
    """

    #: Whether the condition's tokens must lie on the image's token grid.
    needs_grid = True

    @passes_on(SelfMamba)
    def __init__(self, dim: int, **ssm: Any) -> None:
        super().__init__(dim, **ssm)
        self.cond_proj = nn.Linear(dim, 2 * self.ssm.d_inner, bias=False)
        self.cond_x_proj = nn.Linear(dim, sum(self.widths), bias=False)
        with torch.no_grad():
            self.cond_proj.weight[self.ssm.d_inner :].zero_()
            self.cond_x_proj.weight.zero_()

    def condition(self, signal: Signal | Tensor, size: tuple[int, int]) -> ConditionedState:
        """Everything that depends on the condition tokens ``(batch, height * width, dim)`` alone."""
        tokens = condition_tokens(signal, size, self.cond_proj.in_features)
        constants = None if torch.is_grad_enabled() else self.constants(size)
        return ConditionedState(self.cond_proj(tokens), self.cond_x_proj(tokens), constants)

    def forward(  # type: ignore[override]
        self, x: Tensor, cond: Tensor | ConditionedState | list[ConditionedState], size: tuple[int, int]
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
        content, z = with_states(self.in_proj(x), states, "content").chunk(2, dim=-1)
        u = self.ssm.mix_locally(content, size)
        dt, B, C = with_states(self.x_proj(u), states, "maps").split(self.widths, dim=-1)
        return self.ssm.finish(self._scan(u, dt, B, C, states, size), z)

    def _scan(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, states: list[Any], size: tuple[int, int]) -> Tensor:
        """Scan ``u`` with step sizes of low rank ``dt``; a subclass may do so in another order."""
        return self.ssm.scan(u, self.ssm.step_size(dt), B, C, size, constants=states[0].constants)


def with_states(x: Tensor, states: list[Any], name: str) -> Tensor:
    """``x``, ``(b, l, ...)``, plus the field ``name`` of each state on its part of the batch."""
    parts = [part + getattr(own, name) for own, part in parts_of(states, x)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
