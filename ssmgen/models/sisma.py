"""SISMA: semantic image synthesis with Self-Mamba and Cross-Mamba blocks (arXiv 2509.17651).

Letters: b batch, l tokens, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ssmgen.models.conditioned import MaskConditioned
from ssmgen.nn import AdaLNZero, CrossCondition, CrossMamba, FeedForward, Modulation, SelfMamba
from ssmgen.ops import SCAN_ORDERS
from ssmgen.registry import register


@register("block", "sisma-block")
class SISMABlock(nn.Module):
    """Self-Mamba, Cross-Mamba and feed-forward, each after its own AdaLN and behind its own gate.

    ``x += g1 SelfMamba(AdaLN1(x, c)); x += g2 CrossMamba(AdaLN2(x, c), e); x += g3 FFN(AdaLN3(x, c))``.

    Args:
        dim: width.
        d_state, expand, dt_rank, d_conv, order, backend: of both Mamba layers, see `ssmgen.nn.SelectiveSSM`.
        u: the sequence the Cross-Mamba scans, ``"mask"`` or ``"image"``.
        ffn_ratio: inner width of the feed-forward.
        gates: gate the residuals (AdaLN-Zero).
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 16,
        expand: int = 2,
        dt_rank: int | None = None,
        d_conv: int = 3,
        order: str = "row",
        u: str = "mask",
        ffn_ratio: float = 4.0,
        gates: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.adaln = AdaLNZero(dim, sublayers=3, gates=gates)
        self.self_mamba = SelfMamba(
            dim, d_state=d_state, expand=expand, dt_rank=dt_rank, d_conv=d_conv, order=order, backend=backend
        )
        self.cross_mamba = CrossMamba(
            dim, d_state=d_state, expand=expand, dt_rank=dt_rank, d_conv=d_conv, order=order, u=u, backend=backend
        )
        self.ffn = FeedForward(dim, ffn_ratio)

    def condition(self, tokens: Tensor, size: tuple[int, int]) -> CrossCondition:
        """What the block derives from the mask tokens alone, see `CrossMamba.condition`."""
        return self.cross_mamba.condition(tokens, size)

    def forward(
        self,
        x: Tensor,
        c: Tensor | list[Modulation],
        cond: Tensor | CrossCondition | list[CrossCondition],
        size: tuple[int, int],
    ) -> Tensor:
        """One block.

        Args:
            x: tokens ``(b, l, d)``, row-major.
            c: conditioning vectors ``(b, d)`` or ``(1, d)``, or the three modulations ``adaln`` made of them.
            cond: mask tokens, or what was made of them, see `CrossMamba`.
            size: (height, width) in tokens.
        """
        first, second, third = self.adaln(c) if isinstance(c, Tensor) else c
        x = first.residual(x, self.self_mamba(first.norm(x), size))
        x = second.residual(x, self.cross_mamba(second.norm(x), cond, size))
        return third.residual(x, self.ffn(third.norm(x)))


@register("model", "sisma-debug", dim=32, depth=2, in_channels=3, mask_scale=1)
@register("model", "sisma-mini", dim=96, depth=3, d_state=4, gates=False)
@register("model", "sisma-s", dim=384, depth=12)
@register("model", "sisma-b", dim=768, depth=12)
@register("model", "sisma-l", dim=768, depth=24)
@register("model", "sisma-xl", dim=1024, depth=24)
class SISMA(MaskConditioned):
    """Velocity model of `SISMABlock`s.

    The 24 blocks of ``sisma-xl`` have 799,162,368 parameters, the paper's 799 M.

    Args:
        dim: width of the tokens.
        depth: number of blocks; block i scans in ``orders[i % len(orders)]``.
        d_state, expand, dt_rank, d_conv: of every Mamba layer, see `ssmgen.nn.SelectiveSSM`.
        ffn_ratio: inner width of the feed-forwards.
        orders: scan orders to cycle through, from `ssmgen.ops.SCAN_ORDERS`.
        u: the sequence the Cross-Mamba scans, ``"mask"`` or ``"image"``.
        gates: AdaLN-Zero gates on the residuals.
        backend: which `ssmgen.ops.selective_scan` backend runs.
        **settings: those of `MaskConditioned`.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        d_state: int = 16,
        expand: int = 2,
        dt_rank: int | None = None,
        d_conv: int = 3,
        ffn_ratio: float = 4.0,
        orders: Sequence[str] = SCAN_ORDERS,
        u: str = "mask",
        gates: bool = True,
        backend: str = "auto",
        **settings: Any,
    ) -> None:
        if not orders:
            raise ValueError("orders must not be empty: name at least one scan order, e.g. orders=['row']")

        def block(i: int) -> nn.Module:
            return SISMABlock(
                dim,
                d_state=d_state,
                expand=expand,
                dt_rank=dt_rank,
                d_conv=d_conv,
                order=orders[i % len(orders)],
                u=u,
                ffn_ratio=ffn_ratio,
                gates=gates,
                backend=backend,
            )

        super().__init__(block, dim=dim, depth=depth, **settings)
