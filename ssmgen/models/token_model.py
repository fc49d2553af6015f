"""The stack shared by all token-based model families: patchify, blocks, AdaLN head, unpatchify.

Letters: b batch, c channels, h x w latent (or pixel) size, l tokens, d width.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmgen.models.conditional import ConditionalModel, Conditioning, batch_of, total
from ssmgen.nn import AdaLNZero, Block, Patchify, PositionEmbedding, TimeEmbedding, Unpatchify
from ssmgen.nn.block import Layer, offered_to, settings_of
from ssmgen.nn.signal import Signal
from ssmgen.ops import SCAN_ORDERS, scan_order
from ssmgen.registry import Spec, check_keywords, closest, divided, find, keywords, make

_MASK = {"mask": "label-map"}

# What the model sets for the AdaLN of every block alike; ``gates`` is an argument of the model.
_DECIDED_OF_ADALN = ("dim", "sublayers", "gates")

# More blocks are a slip, and building them would take minutes.
_DEEPEST = 1000


class TokenModel(ConditionalModel):
    """Velocity model of a stack of `Block`s, each: mixer, then one layer per entry of ``cross``, then a feed-forward.

    Args:
        dim: width of the tokens.
        depth: number of blocks.
        mixer: spec of the layer that mixes the image tokens, or several, which the blocks take in turn. None is
            without, where a layer of ``cross`` mixes them.
        cross: name of a condition to the spec of the layer that reads it, or to several, which read it in turn.
        conditions: name to spec; one label map called ``mask`` where None.
        add: conditions whose tokens are added to the image tokens at the input.
        in_channels: channels of the latent (or image); the output has as many.
        patch_size: side of a token's patch in the latent.
        orders: scan orders that the blocks with a scan take in turn, names of `ssmgen.ops.scan_order`.
        gates: AdaLN-Zero gates on the residuals.
        time_scale: what t is multiplied by before its sinusoids.
        ffn: spec of the feed-forward of every block; None is without.
        **settings: for the parts that take them: ``d_state=8`` for every layer with that argument, ``ffn_ratio=2`` for
            ``ratio`` of the feed-forwards, ``mask_dropout=0.1`` for ``dropout`` of the condition ``mask``.
            ``mask_input="add"`` is ``add=("mask",)``, and ``"none"`` is without. ``adaln`` and ``modulate`` are
            those of `Block`.

    Raises:
        ValueError: an empty stack, a condition that is not used, or a name that is no condition.
        TypeError: a setting that no part takes; names the closest.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        mixer: Spec | Sequence[Spec | None] | None,
        cross: Mapping[str, Spec | Sequence[Spec]] | None = None,
        conditions: Mapping[str, Spec] | None = None,
        add: Sequence[str] = (),
        in_channels: int = 4,
        patch_size: int = 2,
        orders: Sequence[str] = SCAN_ORDERS,
        gates: bool = True,
        time_scale: float = 1000.0,
        ffn: Spec | None = "feed-forward",
        **settings: Any,
    ) -> None:
        super().__init__()
        named, cross = _MASK if conditions is None else conditions, cross or {}
        parts = {"mixer": mixer, "cross": cross, "conditions": named, "ffn": ffn, "modulate": settings.get("modulate")}
        check_keywords(type(self).__name__, settings, self.takes(parts))
        mixers, adaln, modulate = _listed(mixer), settings.pop("adaln", "adaln"), settings.pop("modulate", None) or {}
        _check_stack(depth, mixers, cross, orders)
        _check_adaln(adaln)
        self.add = _added(named, add, settings)
        self.in_channels, self.patch_size, self.multiple = in_channels, patch_size, patch_size
        _check_width(dim, patch_size, in_channels)
        self.patchify = Patchify(in_channels, dim, patch_size)
        self.position = PositionEmbedding(dim)
        self.time_embedding = TimeEmbedding(dim, scale=time_scale)
        given = {"dim": dim, "patch_size": patch_size, "in_channels": in_channels}
        _check_conditions(named, given)
        self.set_conditions({name: make(spec, **offered_to(name, settings) | given) for name, spec in named.items()})
        keys = {key for each in mixers for key, _, _ in _layers(each, cross, "feed-forward")}
        read = [*(name for name, _ in _readers(cross)), *modulate]
        _check_names(self.conditions, read, self.add, keys)
        _check_widths(self.conditions, [*read, *self.add], dim)
        self.blocks = nn.ModuleList()
        scanning = 0
        for i in range(depth):
            layers = _layers(mixers[i % len(mixers)], cross, ffn)
            own = {**settings, "order": orders[scanning % len(orders)]}
            known = Block.takes({"layers": layers})
            scanning += "order" in known  # a block that scans nothing takes no order from the others
            taken = {name: own[name] for name in own if name in known}
            self.blocks.append(Block(dim, layers, gates, adaln, modulate, **taken))
            _check_grids(self.conditions, self.blocks[i])
            _ask_for_classes(self.conditions, self.blocks[i])
        first: Any = self.blocks[0]
        shares = hasattr(first.adaln, "shares")
        self.shared_adaln = AdaLNZero(dim, first.adaln.sublayers, gates) if shares else None
        self.head_adaln: Any = AdaLNZero(dim, sublayers=1, gates=False, norm=first.adaln.kind)
        self.head = Unpatchify(dim, in_channels, patch_size)

    @classmethod
    def takes(cls, arguments: Mapping[str, Any]) -> list[str]:
        """Names of the settings accepted by the parts in ``arguments``."""
        named = arguments.get("conditions")
        named = _MASK if named is None else named
        mixers, cross = _listed(arguments.get("mixer", ())), arguments.get("cross") or {}
        modulate = arguments.get("modulate") or {}
        for key, parts in (("conditions", named), ("cross", cross), ("modulate", modulate)):
            if not isinstance(parts, Mapping):
                raise TypeError(f"{key} maps a condition's name to a spec, got {parts!r}: write {key}={{'mask': ...}}")
        readers = [spec for _, spec in _readers(cross)]
        layers = [*(mixer for mixer in mixers if mixer is not None), *readers, *modulate.values()]
        for kind, specs in (("block", layers), ("condition", list(named.values()))):
            for spec in specs:
                find(divided(spec)[0], kind)
        ffn = arguments.get("ffn", "feed-forward")
        parts = {key: spec for mixer in mixers for key, spec, _ in _layers(mixer, cross, ffn)}
        decided = ("dim", "order", "patch_size", "in_channels")
        return [*settings_of({**named, **parts}, decided), *(f"{name}_input" for name in named), "adaln", "modulate"]

    def grids(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """The token grid that each block works on: the model's. A family whose blocks differ overrides it."""
        return [grid] * len(self.blocks)

    def stack(self, tokens: Tensor, run: Callable[[int, Tensor], Tensor], grid: tuple[int, int]) -> Tensor:
        """How tokens go through the blocks: one after the other. A family with another way overrides it.

        Args:
            tokens: ``(b, l, d)``, row-major.
            run: ``run(i, tokens)`` applies block i on the grid that `grids` names for it.
            grid: (height, width) of the model's grid.
        """
        for i in range(len(self.blocks)):
            tokens = run(i, tokens)
        return tokens

    def predict(self, x: Tensor, rows: Sequence[Tensor], conds: list[Conditioning]) -> Tensor:
        """See `ConditionalModel.predict`."""
        tokens = self.patchify(x).to(x.dtype)  # under autocast the residual stream stays float32
        grid = conds[0].grid
        tokens = self.position(tokens, grid)
        if self.add:
            parts = zip(tokens.chunk(len(conds)), conds, strict=True)
            tokens = torch.cat([part + own.added for part, own in parts])  # type: ignore[operator]
        grids = self.grids(grid)

        def run(i: int, tokens: Tensor) -> Tensor:
            block: Any = self.blocks[i]
            return self.run_block(i, tokens, block.adaln.divide(rows[i]), [cond.blocks[i] for cond in conds], grids[i])

        tokens = self.stack(tokens, run, grid)
        (head,) = self.head_adaln.divide(rows[-1])
        return self.head(head.norm(tokens), grid)

    def _conditioning(self, signals: dict[str, Signal], size: tuple[int, int]) -> Conditioning:
        grid = size[0] // self.patch_size, size[1] // self.patch_size
        added = total([tokens for name in self.add if (tokens := signals[name].tokens) is not None])
        vector = total([signal.vector for signal in signals.values() if signal.vector is not None])
        blocks: list[Any] = list(self.blocks)
        states = tuple(block.condition(signals, own) for block, own in zip(blocks, self.grids(grid), strict=True))
        return Conditioning(grid, batch_of(signals), added, vector, states)

    def keep_states(self, cond: Conditioning) -> Conditioning:
        """``cond`` with all states of the scans that depend on it alone, see `CrossMamba.keep`."""
        grids = self.grids(cond.grid)
        kept = tuple(
            {key: layer.keep(state, grid) if hasattr(layer, "keep") else state for key, layer, state in states}
            for states, grid in zip(self._states(cond), grids, strict=True)
        )
        return cond._replace(blocks=kept)

    def kept_bytes(self, cond: Conditioning) -> int:
        """Bytes of the states that `keep_states` adds."""
        layers = [(layer, state) for states in self._states(cond) for _, layer, state in states]
        return sum(layer.kept_bytes(state) for layer, state in layers if hasattr(layer, "kept_bytes"))

    def _states(self, cond: Conditioning) -> list[list[tuple[str, Any, Any]]]:
        """By block: the keys of what reads a condition, the layers, and what they derived from it."""
        pairs = zip(self.blocks, cond.blocks, strict=True)
        return [[(key, getattr(block, key), state) for key, state in states.items()] for block, states in pairs]

    def project(self, c: Tensor) -> list[Tensor]:
        """Modulations of every block and of the head, side by side."""
        shared = c if self.shared_adaln is None else self.shared_adaln.project(c)
        blocks: list[Any] = list(self.blocks)
        return [*(block.adaln.project(shared) for block in blocks), self.head_adaln.project(c)]

    def fsdp_units(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        """Every block, and its AdaLN by itself: `project` uses it before the first block runs."""
        blocks: list[Any] = list(self.blocks)
        return [shard for block in blocks for shard in ((block.adaln, ("project",)), (block, ("condition",)))]

    @property
    def widths(self) -> list[int]:
        """Values of each AdaLN."""
        blocks: list[Any] = list(self.blocks)
        return [*(block.adaln.width for block in blocks), self.head_adaln.width]


def _listed(specs: Any, what: str = "mixer") -> Sequence[Any]:
    if not isinstance(specs, str | Mapping | Sequence) and not (specs is None and what == "mixer"):
        raise TypeError(f"{what} must be a spec or a list of specs, got {specs!r}")
    return specs if isinstance(specs, Sequence) and not isinstance(specs, str) else [specs]


def _readers(cross: Mapping[str, Spec | Sequence[Spec]]) -> list[tuple[str, Spec]]:
    """The layers that read a condition, each with the condition's name."""
    return [(name, spec) for name, specs in cross.items() for spec in _listed(specs, f"cross of {name!r}")]


def _layers(mixer: Spec | None, cross: Mapping[str, Any], ffn: Spec | None) -> list[Layer]:
    """A block's layers, each named after what it is, and after its condition too where two are alike."""
    names = [divided(spec)[0] for _, spec in _readers(cross)]
    layers: list[Layer] = [] if mixer is None else [(_key(mixer), mixer, None)]
    for condition, spec in _readers(cross):
        alike = names.count(divided(spec)[0]) > 1
        layers.append((f"{_key(spec)}_{condition}" if alike else _key(spec), spec, condition))
    return layers if ffn is None else [*layers, ("ffn", ffn, None)]


def _key(spec: Spec) -> str:
    return divided(spec)[0].replace("-", "_")


def _added(conditions: Mapping[str, Spec], add: Sequence[str], settings: dict[str, Any]) -> tuple[str, ...]:
    """Conditions that are added at the input; takes the settings that say so out of ``settings``."""
    if isinstance(add, str):
        raise TypeError(f"add is a list of conditions' names, got {add!r}: write add=[{add!r}]")
    chosen = dict.fromkeys(add, True)
    for name in conditions:
        word = settings.pop(f"{name}_input", None)
        if word not in (None, "none", "add"):
            near = closest(str(word), ("none", "add"))
            raise ValueError(f"{name}_input must be 'none' or 'add', got {word!r}{near}")
        if word is not None:
            chosen[name] = word == "add"
    return tuple(name for name, wanted in chosen.items() if wanted)


def check_depth(depth: int) -> None:
    """Reject a number of blocks that is none, by a `ValueError`."""
    if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= _DEEPEST:
        raise ValueError(f"depth must be a whole number from 1 to {_DEEPEST}, got {depth!r}")


def _check_stack(depth: int, mixers: Sequence[Spec | None], cross: Mapping[str, Any], orders: Sequence[str]) -> None:
    check_depth(depth)
    if not 1 <= len(mixers) <= depth:
        raise ValueError(f"mixer must be one spec, or up to one for each of the {depth} blocks, got {len(mixers)}")
    if None in mixers and not _readers(cross):
        raise ValueError("mixer=None leaves the image tokens unmixed: give cross= a layer that mixes them")
    if not isinstance(orders, Sequence) or isinstance(orders, str) or not orders:
        raise ValueError(f"orders must be a list of at least one scan order, e.g. orders=['row'], got {orders!r}")
    for order in orders:
        scan_order(order, 1, 1)  # raises where it is unknown


def _check_conditions(named: Mapping[str, Spec], decided: Mapping[str, Any]) -> None:
    """Conditions are as wide as the tokens and lie on their grid."""
    for name, spec in named.items():
        own = divided(spec)[1]
        for key in ("dim", "patch_size"):
            wanted = decided[key]
            if own.get(key, wanted) != wanted:
                raise ValueError(
                    f"condition {name!r} has {key}={own[key]!r} and the model {wanted}: leave {key} out of {spec!r}"
                )


def _check_widths(conditions: nn.ModuleDict, used: Sequence[str], dim: int) -> None:
    for name in used:
        width = getattr(conditions[name], "token_width", None)
        if width not in (None, dim):
            raise ValueError(f"condition {name!r} gives tokens of width {width}, and the model's have {dim}")


def _check_adaln(adaln: Spec) -> None:
    for name in divided(adaln)[1]:
        if name in _DECIDED_OF_ADALN:
            raise ValueError(f"adaln has no {name!r} of its own, the model decides it: leave it out of {adaln!r}")


def _check_grids(conditions: nn.ModuleDict, block: Any) -> None:
    """A layer that reads tokens on the image's grid does not get a sequence."""
    for key, name in block.readers():
        on_grid = getattr(conditions[name], "on_grid", True)
        if not on_grid and getattr(getattr(block, key), "needs_grid", False):
            raise ValueError(
                f"layer {key!r} reads tokens on the image's grid, and condition {name!r} is a sequence: read it with "
                "'cross-mamba-sequence' or 'cross-attention'"
            )


def _ask_for_classes(conditions: nn.ModuleDict, block: Any) -> None:
    """Tell a label map that a layer reads the classes of its tokens."""
    for key, name in block.readers():
        if getattr(getattr(block, key), "needs_classes", False):
            if not hasattr(conditions[name], "gives_classes"):
                raise ValueError(f"layer {key!r} reads the classes of a label map, and condition {name!r} is none")
            asked, known = getattr(getattr(block, key), "num_classes", None), conditions[name].num_classes
            if asked not in (None, known):
                raise ValueError(
                    f"layer {key!r} has num_classes={asked}, and condition {name!r} has {known}: leave it out"
                )
            conditions[name].gives_classes = True  # type: ignore[assignment]


def _check_names(conditions: nn.ModuleDict, read: Sequence[str], add: Sequence[str], layers: set[str]) -> None:
    """Every condition reaches something that can use it, and no name has two meanings.

    Args:
        conditions: by name.
        read: those that a layer reads.
        add: those that are added at the input.
        layers: keys of the layers of all blocks.
    """
    for name in [*read, *add]:
        if name not in conditions:
            raise ValueError(f"no condition {name!r}{closest(name, conditions)} There are: {', '.join(conditions)}.")
        if "tokens" not in conditions[name].gives:  # type: ignore[operator]
            raise ValueError(f"condition {name!r} gives no tokens: leave it out of cross= and add=")
        if name in add and not getattr(conditions[name], "on_grid", True):
            raise ValueError(
                f"condition {name!r} is a sequence and lies on no grid: give it a layer in cross=, not add="
            )
    for name, condition in conditions.items():
        if name in layers or any(own.startswith(f"{name}_") for own in keywords(TokenModel.__init__)):
            raise ValueError(f"a condition cannot be called {name!r}: its settings would clash with another part's")
        unread = name not in read and name not in add
        if unread and ("vector" not in condition.gives or getattr(condition, "needs_reader", False)):  # type: ignore[operator]
            raise ValueError(f"condition {name!r} is not used: give it a layer in cross=, or name it in add=")


def _check_width(dim: int, patch_size: int, channels: int) -> None:
    if not isinstance(dim, int) or dim < 1:
        raise ValueError(f"dim must be a positive whole number, got {dim!r}")
    values = patch_size**2 * channels
    if dim < 2 * values:
        warnings.warn(
            f"width {dim} is under twice the {values} values (patch_size^2 x channels) that each token carries: the "
            "tokens are too narrow for the noise part of the velocity, and training stalls. Use a smaller patch or "
            "a larger dim.",
            stacklevel=4,
        )
