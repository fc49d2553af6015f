"""Cross-Mamba for a condition of another length than the image: its scan ends in a state, which the image reads.

Letters: b batch, l image tokens, m condition tokens, d dim, e inner width, n d_state.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmgen.nn.mamba import CrossMamba, at_least_float32, check_tokens, tokens_of
from ssmgen.nn.parts import parts_of, states_of
from ssmgen.nn.signal import Signal
from ssmgen.ops import selective_scan
from ssmgen.registry import passes_on, register

# A step size before its softplus, which is exactly zero in every dtype.
_NO_STEP = -1e4
# Arguments of a CrossMamba that a sequence leaves no choice of.
_OWN = ("u", "order", "directions")


class SequenceState(NamedTuple):
    """What a `SequenceCrossMamba` derives from the condition alone: computed once, used at every step.

    Attributes:
        h: last state of the scans in both directions, added ``(b, e, n)``, float32 or float64.
        skip: ``D u``, averaged over the sequence ``(b, e)``.
    """

    h: Tensor
    skip: Tensor


@register("block", "cross-mamba-sequence")
class SequenceCrossMamba(CrossMamba):
    """Cross-Mamba whose condition is a sequence of any length, such as a text; parameters as those of `CrossMamba`.

    `CrossMamba` scans condition and content in step, which takes as many condition tokens as image tokens. Here the
    condition is scanned by itself. With its tokens e, ``u = SiLU(conv(cond_proj(e)))``, ``delta, B = linear(u)``, and h
    is the state after the last token, ``h_m`` of ``scan(u, delta, A, B)``. The scan runs in both directions and h is
    the sum, because decay leaves little of what is far from the end. The content reads that state:
    ``c, z = in_proj(x)``, ``C = linear(SiLU(conv3x3(c)))``, ``y_l = C_l h + D mean(u)``; output
    ``out_proj(LayerNorm(y) * SiLU(z))``. For the convolution, which both share, the sequence is a grid of height 1.
    Padding has delta = 0, so it does not change the state.

    Args:
        dim: width of the tokens.
        **ssm: other arguments of `SelectiveSSM`, without ``order`` and ``directions``: a sequence has its own.

    Raises:
        TypeError: one of those, or the ``u`` of `CrossMamba`.
    """

    #: Whether the condition's tokens must lie on the image's token grid.
    needs_grid = False

    @passes_on(CrossMamba, *_OWN)
    def __init__(self, dim: int, **ssm: Any) -> None:
        if refused := [name for name in _OWN if name in ssm]:
            raise TypeError(
                f"'cross-mamba-sequence' takes no {', '.join(refused)}: it scans the condition by itself, forwards and "
                "backwards"
            )
        super().__init__(dim, **ssm)

    def condition(self, signal: Signal | Tensor, size: tuple[int, int]) -> SequenceState:  # type: ignore[override]
        """Everything that depends on the condition tokens ``(batch, any length, dim)`` alone."""
        tokens = tokens_of(signal)
        valid = None if isinstance(signal, Tensor) else signal.valid
        if tokens.dim() != 3 or tokens.shape[2] != self.cond_proj.in_features:
            raise ValueError(f"cond must be (batch, tokens, {self.cond_proj.in_features}), got {tuple(tokens.shape)}")
        if valid is None:
            valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        shown = valid.unsqueeze(2)
        m = self.cond_proj(torch.where(shown, tokens, 0.0))
        u = torch.where(shown, self.ssm.mix_locally(m, (1, m.shape[1])), 0.0)
        dt, B = self.cond_x_proj(u).split([self.ssm.dt_rank, self.ssm.d_state], dim=-1)
        delta = self.ssm.step_size(dt).masked_fill(~shown, _NO_STEP)
        h = self._last_state(u, delta, B)
        skip = at_least_float32(self.ssm.D) * at_least_float32(u).sum(dim=1) / valid.sum(dim=1, keepdim=True)
        return SequenceState(h, skip.to(u.dtype))

    def forward(self, x: Tensor, cond: Any, size: tuple[int, int]) -> Tensor:
        """Mix content tokens ``(batch, height * width, dim)`` with a condition.

        Args:
            x: content tokens in row-major order.
            cond: condition tokens ``(batch, any length, dim)``, or what `condition` made of them. One of batch 1 serves
                every item of the batch; several in a list serve as many equal parts of it.
            size: (height, width) in tokens.

        Raises:
            ValueError: tokens or condition do not fit one another.
        """
        check_tokens(x, size, self.in_proj.in_features, "x")
        content, z = self.in_proj(x).chunk(2, dim=-1)
        C = self.x_proj(self.ssm.mix_locally(content, size))
        read = [
            torch.baddbmm(own.skip.unsqueeze(1).to(own.h.dtype), part.to(own.h.dtype), own.h.mT)
            for own, part in parts_of(states_of(self, cond, size), C)
        ]
        return self.ssm.finish(torch.cat(read).to(z.dtype), z)

    def _last_state(self, u: Tensor, delta: Tensor, B: Tensor) -> Tensor:
        """``(b, e, n)``, the last states of the scan forwards and backwards, added."""
        u, delta, B = (torch.cat([each, each.flip(1)]) for each in (u, delta, B))
        _, states = selective_scan(
            u,
            delta,
            -torch.exp(at_least_float32(self.ssm.A_log)),
            B,
            torch.zeros_like(B),
            delta_bias=at_least_float32(self.ssm.dt_proj.bias),
            delta_softplus=True,
            return_last_state=True,
            backend=self.ssm.backend,
        )
        forwards, backwards = states.chunk(2)
        return forwards + backwards
