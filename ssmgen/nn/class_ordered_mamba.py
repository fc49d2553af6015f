"""A second scan that visits the tokens class by class, so that parts of a face that lie apart become neighbours.

Letters: b batch, l length (= height x width tokens), d dim, e inner width, r dt_rank, n d_state.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmgen.nn.conditioned_mamba import ConditionedMamba
from ssmgen.nn.mamba import ScanConstants
from ssmgen.nn.parts import parts_of
from ssmgen.nn.signal import Signal
from ssmgen.ops import ScanOrder, scan_order
from ssmgen.registry import passes_on, register


class ClassOrderedState(NamedTuple):
    """What a `ClassOrderedMamba` derives from the mask alone: computed once per mask, used at every step.

    Attributes:
        content, maps: as of `ConditionedState`; the maps include a row for each token's class.
        forward, inverse: the tokens class by class, and back, int64 ``(b, l)``.
        starts: 1 where a class begins in that sequence and 0 elsewhere, ``(b, l, 1)``.
        constants: of the scans; None where gradients are needed.
    """

    content: Tensor
    maps: Tensor
    forward: Tensor
    inverse: Tensor
    starts: Tensor
    constants: ScanConstants | None = None


@register("block", "class-ordered-mamba")
class ClassOrderedMamba(ConditionedMamba):
    """`ConditionedMamba` with two scans, whose results are added: along the layer's order, and class by class.

    The second scan visits the tokens of the first class in the layer's order, then those of the second class, and so
    on: both irises follow one another, and all hair is one sequence. Its C has a term that is learned for each class,
    and its step sizes one that is learned where a class begins, by which it may forget the class before. The idea is
    that of the attentive state space of MambaIRv2 (arXiv 2411.15269), which has to learn its classes.

    Args:
        dim: width of the tokens.
        num_classes: classes of the mask. A token that is told no class, as one of the null condition, is of one more.
        **ssm: other arguments of `SelectiveSSM`, without ``directions``.
    """

    #: Tells the model that the condition's signal must say the class of each token.
    needs_classes = True

    @passes_on(ConditionedMamba, "directions")
    def __init__(self, dim: int, num_classes: int, **ssm: Any) -> None:
        super().__init__(dim, directions=2, **ssm)
        self.num_classes = num_classes
        self.prompts = nn.Parameter(torch.zeros(num_classes + 1, self.ssm.d_state))
        self.reset = nn.Parameter(torch.ones(self.ssm.d_inner))
        for parameter in (self.prompts, self.reset):
            parameter.no_weight_decay = True  # type: ignore[attr-defined]

    def condition(self, signal: Signal | Tensor, size: tuple[int, int]) -> ClassOrderedState:  # type: ignore[override]
        """Everything that depends on the condition tokens ``(batch, height * width, dim)`` and their classes alone.

        Plain tokens have no class.
        """
        content, maps, constants = super().condition(signal, size)
        told = None if isinstance(signal, Tensor) else signal.classes
        classes = content.new_full(content.shape[:2], self.num_classes, dtype=torch.long) if told is None else told
        maps = maps + F.pad(self.prompts[classes], (maps.shape[-1] - self.ssm.d_state, 0)).to(maps.dtype)
        return ClassOrderedState(content, maps, *class_order(classes, self.ssm.order, size, content.dtype), constants)

    def _scan(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, states: list[Any], size: tuple[int, int]) -> Tensor:
        own = [state for state, _ in parts_of(states, u)]
        forward, inverse, starts = (torch.cat([getattr(state, name) for state in own]) for name in _ORDER)
        by_order, by_class = self.ssm.step_size(dt).chunk(2, dim=-1)
        reset = (starts * self.reset).to(by_class.dtype)  # under autocast the products are of 16 bits
        delta = torch.cat([by_order, by_class + reset], dim=-1)
        constants = states[0].constants
        path = scan_order(self.ssm.order, *size, device=u.device) if constants is None else constants.orders[0]
        return self.ssm.scan(u, delta, B, C, size, [path, ScanOrder(forward, inverse)], constants)


_ORDER = ("forward", "inverse", "starts")


def class_order(
    classes: Tensor, order: str, size: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens class by class, in ``order`` within a class.

    Args:
        classes: of the tokens, ``(b, l)``, row-major.
        order: a name that `ssmgen.ops.scan_order` takes.
        size: (height, width) in tokens.
        dtype: of the starts.

    Returns:
        The order and its inverse, ``(b, l)``; and 1 for the tokens at which a class begins, ``(b, l, 1)``.
    """
    path = scan_order(order, *size, device=classes.device)
    along = classes if path is None else classes[:, path.forward]
    place = along.argsort(dim=1, stable=True)
    forward = place if path is None else path.forward[place]
    in_turn = classes.gather(1, forward)
    begins = F.pad((in_turn[:, 1:] != in_turn[:, :-1]).to(dtype), (1, 0), value=1.0)
    inverse = forward.argsort(dim=1)
    return forward, inverse, begins.gather(1, inverse).unsqueeze(2)
