"""A block as a list of layers, each behind its own AdaLN."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmgen.nn.adaln import Modulation
from ssmgen.nn.signal import Signal
from ssmgen.registry import Spec, check_keywords, divided, find, make, takes

#: A layer of a block: its attribute, its spec, and the name of the condition it reads, or None.
Layer = tuple[str, Spec, str | None]


class Block(nn.Module):
    """Layers one after the other: ``x += gate_i * layer_i(AdaLN_i(x, c))``.

    Args:
        dim: width.
        layers: triples of a key, a spec and the name of a condition or None. The key is the layer's attribute. A layer
            without a condition is called as ``layer(x, size)``, or in sampling as
            ``layer(x, size, layer.constants(size))`` if its ``forward`` takes ``constants``; one with a condition has
            ``condition(signal, size)``, what it derives from the condition alone, and is called as
            ``layer(x, states, size)``.
        gates: gate the residuals (AdaLN-Zero).
        adaln: spec of what makes the modulations: ``"adaln"``, ``{"name": "adaln", "norm": "rms"}``, or
            ``"adaln-single"``, in a model that makes the values that its blocks share.
        modulate: name of a condition to the spec of a layer that changes the input of every layer by it, behind its
            AdaLN, such as ``{"mask": "token-modulation"}``.
        **settings: for the layers that take them: ``d_state=8`` is for all of them, ``ffn_ratio=2`` for ``ratio`` of
            the layer ``ffn``.
    """

    def __init__(
        self,
        dim: int,
        layers: Sequence[Layer],
        gates: bool = True,
        adaln: Spec = "adaln",
        modulate: Mapping[str, Spec] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        check_keywords(type(self).__name__, settings, self.takes({"layers": layers}))
        self.condition_of = {key: condition for key, _, condition in layers}
        self.adaln: Any = make(adaln, dim=dim, sublayers=len(layers), gates=gates)
        if not hasattr(self.adaln, "divide"):
            raise ValueError(f"adaln must be 'adaln' or 'adaln-single', or a spec of one, got {adaln!r}")
        for key, spec, condition in layers:
            find(divided(spec)[0], "block")
            layer = make(spec, **{**offered_to(key, settings), "dim": dim})
            if hasattr(layer, "condition") != (condition is not None):
                needs = (
                    "needs a condition, as in cross={CONDITION: LAYER}" if condition is None else "takes no condition"
                )
                raise ValueError(f"layer {key!r}: {divided(spec)[0]!r} {needs}")
            self.add_module(key, layer)
            for name, change in (modulate or {}).items():
                changing = make(change, dim=dim)
                if not hasattr(changing, "condition"):
                    raise ValueError(f"modulate of {name!r}: {divided(change)[0]!r} takes no condition")
                self.add_module(_modulator(key, name), changing)
        self.modulated_by = list(modulate or ())
        #: Layers that take what they derive from weights and grid alone, see `condition`.
        self.with_constants = [
            key
            for key, _, condition in layers
            if condition is None and "constants" in inspect.signature(getattr(self, key).forward).parameters
        ]
        if len({key for key, _, _ in layers}) < len(layers):
            raise ValueError(
                f"every layer needs a key of its own, got {[key for key, _, _ in layers]}: a condition can be read by "
                "one layer of each kind"
            )

    @classmethod
    def takes(cls, arguments: Mapping[str, Any]) -> list[str]:
        """Settings that its layers take."""
        return settings_of({key: spec for key, spec, _ in arguments.get("layers", ())}, ("dim",))

    def condition(self, signals: Mapping[str, Signal | Tensor], size: tuple[int, int]) -> dict[str, Any]:
        """What each layer derives from its condition alone, by the layer's key.

        Without gradients, as in sampling, also what a layer without a condition derives from weights and grid.

        Args:
            signals: by name of the condition; plain tokens ``(b, l, d)`` will do.
            size: (height, width) of the grid in tokens.
        """
        states = {key: getattr(self, key).condition(_on(signals[name], size), size) for key, name in self.readers()}
        if not torch.is_grad_enabled():
            states |= {key: getattr(self, key).constants(size) for key in self.with_constants}
        return states

    def readers(self) -> list[tuple[str, str]]:
        """The keys of what reads a condition, each with the condition's name."""
        layers = [(key, name) for key, name in self.condition_of.items() if name is not None]
        return [*layers, *((_modulator(key, name), name) for key in self.condition_of for name in self.modulated_by)]

    def forward(self, x: Tensor, c: Tensor | list[Modulation], cond: Any, size: tuple[int, int]) -> Tensor:
        """Apply the layers.

        Args:
            x: tokens ``(b, l, d)``, row-major.
            c: conditioning vectors ``(b, d)`` or ``(1, d)``, or the modulations that ``adaln`` made of them.
            cond: a list of what `condition` returned, each for an equal part of the batch; or what it takes, or the
                tokens of the only condition.
            size: (height, width) in tokens.
        """
        modulations = self.adaln(c) if isinstance(c, Tensor) else c
        if isinstance(cond, Tensor):
            cond = {name: cond for _, name in self.readers()}
        conds = cond if isinstance(cond, list) else [self.condition(cond, size)]
        for (key, name), modulation in zip(self.condition_of.items(), modulations, strict=True):
            layer, h = getattr(self, key), modulation.norm(x)
            for changing in self.modulated_by:
                change = _modulator(key, changing)
                h = getattr(self, change)(h, [each[change] for each in conds], size)
            if name is None:
                update = layer(h, size, conds[0][key]) if key in conds[0] else layer(h, size)
            else:
                update = layer(h, [each[key] for each in conds], size)
            x = modulation.residual(x, update)
        return x


def _modulator(key: str, condition: str) -> str:
    """The attribute of what changes the input of the layer ``key`` by a condition."""
    return f"{key}_by_{condition}"


def offered_to(key: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as one part sees them: ``KEY_argument`` is its own ``argument``."""
    own = {name.removeprefix(f"{key}_"): value for name, value in settings.items() if name.startswith(f"{key}_")}
    return {**settings, **own}


def settings_of(parts: Mapping[str, Spec], decided: Sequence[str]) -> list[str]:
    """Names under which settings reach parts, see `offered_to`, without those that are decided for them."""
    names = {key: [name for name in takes(spec) or () if name not in decided] for key, spec in parts.items()}
    plain = [name for taken in names.values() for name in taken]
    return list(dict.fromkeys([*plain, *(f"{key}_{name}" for key, taken in names.items() for name in taken)]))


def _on(signal: Signal | Tensor, size: tuple[int, int]) -> Signal:
    return Signal(signal, size) if isinstance(signal, Tensor) else signal.on(size)
