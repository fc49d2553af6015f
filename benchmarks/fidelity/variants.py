"""What can stand in the place of SISMA's Cross-Mamba. Importing registers the layers and the models."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ssmgen import register
from ssmgen.models import SDM, TokenModel
from ssmgen.nn import SPADE, SelfMamba, Signal, SPADECondition
from ssmgen.nn.parts import parts_of
from ssmgen.registry import Spec


@register("block", "second-self-mamba")
class SecondSelfMamba(nn.Module):
    """Nothing of the mask: it enters at the input alone (``mask_input=add``)."""

    def __init__(self, dim: int, order: str) -> None:
        super().__init__()
        self.mamba = SelfMamba(dim, order=order)

    def condition(self, signal: Signal, size: tuple[int, int]) -> Any:
        """The mask is ignored."""
        return None

    def forward(self, x: Tensor, states: list[Any], size: tuple[int, int]) -> Tensor:
        """Self-Mamba of ``(b, l, d)``."""
        return self.mamba(x, size)


@register("block", "concatenated-self-mamba")
class Concatenated(SecondSelfMamba):
    """Self-Mamba of the mask tokens beside the image tokens, joined by a linear map."""

    def __init__(self, dim: int, order: str) -> None:
        super().__init__(dim, order)
        self.join = nn.Linear(2 * dim, dim)

    def condition(self, signal: Signal, size: tuple[int, int]) -> Any:
        """The mask tokens as they are."""
        return signal.tokens

    def forward(self, x: Tensor, states: list[Any], size: tuple[int, int]) -> Tensor:
        """Self-Mamba of ``join([x, e])``."""
        tokens = torch.cat([own for own, _ in parts_of(states, x)])
        return self.mamba(self.join(torch.cat([x, tokens], dim=-1)), size)


@register("block", "normalised-self-mamba")
class Normalised(SecondSelfMamba):
    """Self-Mamba after a SPADE whose maps come from the mask tokens."""

    def __init__(self, dim: int, order: str) -> None:
        super().__init__(dim, order)
        self.spade = SPADE(dim, dim, hidden=dim // 6)

    def condition(self, signal: Signal, size: tuple[int, int]) -> SPADECondition:
        """SPADE's scale and shift."""
        return self.spade.condition(signal, size)

    def forward(self, x: Tensor, states: list[Any], size: tuple[int, int]) -> Tensor:
        """Self-Mamba of ``SPADE(x, e)``."""
        normed = self.spade(rearrange(x, "b (h w) d -> b d h w", h=size[0]), states)
        return self.mamba(rearrange(normed, "b d h w -> b (h w) d"), size)


@register("model", "sdm-variant")
def sdm_variant(*, patch_size: int, mask_input: str, **settings: Any) -> SDM:
    """SDM without the settings of the preset that only a stack of tokens has."""
    return SDM(**settings)


SECOND = {
    "none": "second-self-mamba",
    "concat": "concatenated-self-mamba",
    "spade": "normalised-self-mamba",
    "cross-attention": {"name": "cross-attention", "position": True},
}


@register("model", "sisma-variant")
def sisma_variant(
    *, dim: int, second: str | list[str], mixer: Spec | None = "self-mamba", **settings: Any
) -> TokenModel:
    """SISMA with ``second`` in the place of its Cross-Mamba.

    Args:
        dim: width of the tokens.
        second: none, concat, spade or cross-attention, a registered layer or several, or no-layer.
        mixer: that of every block; None where ``second`` mixes the image tokens too.
        **settings: others of `TokenModel`.
    """
    if second == "cross-attention":
        settings = {"num_heads": dim // 16, **settings}
    layers = [second] if isinstance(second, str) else second
    cross = {} if second == "no-layer" else {"mask": [SECOND.get(layer, layer) for layer in layers]}
    return TokenModel(dim=dim, mixer=mixer, cross=cross, **settings)
