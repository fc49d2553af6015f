"""What all models share: their conditions, the time, and what can be computed before sampling.

Letters: b batch, c channels, h x w latent (or pixel) size, d width, n times.
"""

import keyword
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssmgen.nn.parts import expanded, joined
from ssmgen.nn.patch import check_image
from ssmgen.nn.signal import Signal
from ssmgen.ops.readable import unread_values
from ssmgen.registry import check_keywords, closest

#: Arguments of models, objectives, samplers and `log_likelihood`, which conditions are passed beside.
_RESERVED = (
    *("x", "t", "cond", "modulation", "size", "model", "data", "noise", "generator", "weight", "contrasts"),
    *("x0", "sampling"),
    *("objective", "times", "progress", "solver", "steps", "shift", "guidance_scale", "guidance_start"),
    *("shared_noise", "dtype"),
    *("compile", "keep_states", "probes", "seed"),
)


class Conditioning(NamedTuple):
    """What a model computes from its conditions alone; made by `ConditionalModel.condition`, taken as ``cond=``.

    Attributes:
        grid: (height, width) in tokens it was made for.
        batch: items it was made from.
        added: tokens ``(b, l, d)`` that join the image tokens at the input, or None.
        vector: ``(b, d)`` that joins the time, or None.
        blocks: what each block's ``condition`` returned.
    """

    grid: tuple[int, int]
    batch: int
    added: Tensor | None
    vector: Tensor | None
    blocks: tuple[Any, ...]


class ConditionalModel(nn.Module, ABC):
    """Velocity model with any number of named conditions.

    A family sets ``time_embedding``, ``conditions`` and ``blocks``, and says what it makes of them: `predict`,
    `project` and `_conditioning`.

    Attributes:
        in_channels: channels of the latent (or image); the output has as many.
        patch_size: side of a token's patch in the latent.
        multiple: what height and width of the latent must be multiples of.
        mask_scale, num_classes: label pixels per latent pixel and classes of its label map, where it has one.
        checkpoint_activations: in training, keep only the input of each block and compute the block again in the
            backward pass. The gradients are the same; memory is lower and a step takes longer.
    """

    #: Beginnings of weights' names in files written earlier, and what they are now.
    renamed: Mapping[str, str] = {"mask_encoder.": "conditions.mask.encoder."}

    checkpoint_activations: bool = False
    in_channels: int
    patch_size: int
    multiple: int
    time_embedding: nn.Module
    conditions: nn.ModuleDict
    blocks: nn.ModuleList

    def set_conditions(self, conditions: Mapping[str, nn.Module]) -> None:
        """Take the conditions; what the first label map among them tells of masks becomes the model's own.

        Raises:
            ValueError: a name that is no identifier, is a keyword, or has another meaning in a call or in torch's
                modules; or a condition that is placed by something other than a label map of its classes.
        """
        for name in conditions:
            _check_name(name)
        self.conditions = nn.ModuleDict(conditions)
        placed = {name: getattr(each, "placed_by", None) for name, each in conditions.items()}
        self.placed_by = {name: other for name, other in placed.items() if other is not None}
        for name, other in self.placed_by.items():
            if not hasattr(conditions.get(other), "num_classes"):
                near = closest(other, [each for each in conditions if hasattr(conditions[each], "num_classes")])
                raise ValueError(f"condition {name!r} is placed_by {other!r}, which is no label map{near}")
            conditions[name].check_placing(conditions[other])  # type: ignore[operator]
        maps = (each for each in conditions.values() if hasattr(each, "scale") and hasattr(each, "num_classes"))
        label_map: Any = next(maps, None)
        if label_map is not None:
            self.mask_scale, self.num_classes = label_map.scale, label_map.num_classes

    @abstractmethod
    def predict(self, x: Tensor, rows: Sequence[Tensor], conds: list[Conditioning]) -> Tensor:
        """The velocity at ``x``, ``(b, ...)``, given what `project` returned, with a condition for each part of it."""

    @abstractmethod
    def project(self, c: Tensor) -> list[Tensor]:
        """What each layer makes of conditioning vectors ``(..., d)``, which are time plus conditions' vectors."""

    @abstractmethod
    def _conditioning(self, signals: dict[str, Signal], size: tuple[int, int]) -> Conditioning: ...

    @property
    @abstractmethod
    def widths(self) -> list[int]:
        """Values in each tensor that `project` returns."""

    def fsdp_units(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        """The modules whose weights are gathered together when the model is sharded; the rest is gathered at once.

        Each comes with the methods besides ``forward`` that use its weights. Children precede parents. A family that
        uses a block's weights outside the block's ``forward`` and ``condition`` overrides this.
        """
        return [(block, ("condition",)) for block in self.blocks]

    def run_block(self, i: int, *inputs: Any) -> Tensor:
        """Apply block ``i`` to ``(batch, ...)``, and checkpoint it if `checkpoint_activations` says so."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(self.blocks[i], *inputs, use_reentrant=False)
        return self.blocks[i](*inputs)

    def forward(
        self,
        x: Tensor,
        t: Tensor | None,
        mask: Any = None,
        *,
        cond: Conditioning | list[Conditioning] | None = None,
        modulation: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """Predict the velocity at ``x`` and time ``t``.

        Args:
            x: ``(b, c, h, w)``.
            t: ``(b,)``, or ``(1,)`` for one time for all; 0 is noise, 1 is data.
            mask, others: values of the conditions by name; one left out is null.
            cond: the result of `condition`, instead of values. Made from one item it serves any batch. Several in a
                list serve as many equal parts of the batch, as guidance needs it.
            modulation: what `modulation` returned for ``t`` and the conditions' vectors, ``(1 or b, values)``; ``t`` is
                then ignored and may be None.

        Returns:
            ``(b, c, h, w)``.

        Raises:
            ValueError: shapes that do not fit, a label out of range, or both values and ``cond`` given.
            TypeError: x of another dtype than the weights, a mask of the wrong dtype, or an unknown condition.
        """
        given = others if mask is None else {"mask": mask, **others}
        if given and cond is not None:
            raise ValueError(f"give either {' and '.join(given)} or cond, not both: cond was already made from values")
        self._check_dtype(x)
        check_image(x, self.in_channels, self.multiple)
        size = (x.shape[2], x.shape[3])
        if cond is None:
            cond = self.condition(size=size, **given)
        conds = cond if isinstance(cond, list) else [cond]
        grid = size[0] // self.patch_size, size[1] // self.patch_size
        part = part_of_batch(conds, x.shape[0], grid)
        return self.predict(x, self._rows(t, modulation, conds, part), conds)

    def condition(self, mask: Any = None, size: tuple[int, int] | None = None, **others: Any) -> Conditioning:
        """Everything that depends on the conditions alone, to be computed once and reused at every step.

        Without gradients it also holds what layers derive from their weights alone: make it again if weights change.

        Args:
            mask, others: values of the conditions by name, see `ssmgen.conditions`; one left out is null. In training
                each condition's ``dropout`` replaces some items by the null.
            size: (h, w) of the latent. Needed where no value tells it.

        Raises:
            ValueError, TypeError: an unknown condition, or what the condition rejects; outside of training also a value
                for a condition whose label map, which says where it lies, has none.
        """
        given = others if mask is None else {"mask": mask, **others}
        check_keywords("the model", given, self.conditions)
        given = {
            name: _named_in_errors(name, each.value_of, given[name])
            for name, each in self._named()
            if given.get(name) is not None
        }
        self._check_placed(given)
        if size is not None and (size[0] % self.multiple or size[1] % self.multiple):
            raise ValueError(f"size must be multiples of {self.multiple}, the height and width of x, got {size}")
        if size is None:
            sizes = (each.size_of(given[name]) for name, each in self._named() if given.get(name) is not None)
            size = next((found for found in sizes if found is not None), None)
        device = next(self.time_embedding.parameters()).device
        signals = self._signals(given, size, device)
        grids = [signal.grid for signal in signals.values() if signal.grid is not None]
        if size is None and not grids:
            raise ValueError("condition needs size=(height, width) of the latent: no value given here tells it")
        if size is None:
            size = grids[0][0] * self.patch_size, grids[0][1] * self.patch_size
        return self._conditioning(signals, size)

    def join(self, conds: list[Conditioning], batch: int) -> list[Conditioning]:
        """One condition in the place of several that serve equal parts of a batch, each of as many items as it has.

        Each layer then runs once for the whole batch. Conditions that serve more items than they were made from, or
        that differ in more than values, are returned as they are.
        """
        part = batch // len(conds)
        if len(conds) == 1 or any(cond.grid != conds[0].grid for cond in conds):
            return conds
        values = joined([(cond.added, cond.vector, cond.blocks) for cond in conds], part)
        return conds if values is None else [Conditioning(conds[0].grid, batch, *values)]

    @contextmanager
    def checked(self, given: Mapping[str, Any]) -> Iterator[None]:
        """Check values of conditions now; inside, the model reads no value, so that it need not wait for a GPU.

        Args:
            given: values by the names of their conditions, where they can be read at once; other entries are ignored.

        Raises:
            TypeError, ValueError: a value that does not suit its condition, which is named.
        """
        for name, each in self._named():
            if given.get(name) is not None:
                _named_in_errors(name, lambda value, each=each: each.check(each.value_of(value)), given[name])
        with unread_values():
            yield

    def modulation(self, t: Tensor, vector: Tensor | None = None) -> Tensor:
        """What all layers derive from times ``(n,)``, side by side: ``(n, values)``.

        A sampler computes it for its whole grid at once and passes rows of it to ``forward``: the weights behind it,
        over a quarter of SISMA's, are then read once and not at every step.

        Args:
            t: times.
            vector: that of a `Conditioning`, ``(m, d)``; the result is then ``(n, m, values)``.
        """
        c = self.time_embedding(t)
        c = c if vector is None else c.unsqueeze(1) + vector
        return torch.cat(self.project(c), dim=-1)

    def _signals(
        self, given: Mapping[str, Any], size: tuple[int, int] | None, device: torch.device
    ) -> dict[str, Signal]:
        """What each condition says; one that is placed by another gets the value of that one too."""
        placing: dict[str, Any] = {other: self.conditions[other] for other in self.placed_by.values() if other in given}
        keeps = {other: each.drawn(given[other], device) for other, each in placing.items()}
        signals = {}
        for name, each in self._named():
            value, other = given.get(name), self.placed_by.get(name)
            if value is not None and other in placing:
                value = _named_in_errors(name, each.placed, value, given[other], keeps[other])
            signals[name] = _named_in_errors(name, each, value, size, keeps.get(name), device)
        return signals

    def _check_placed(self, given: Mapping[str, Any]) -> None:
        """Reject a value without a place: the tokens would be null. Training drops label maps, so there they may be."""
        for name, other in self.placed_by.items():
            if name in given and other not in given and not self.training:
                raise ValueError(
                    f"condition {name!r} has a value and {other!r} has none, which says where it lies in the image: "
                    f"give {other!r} too, or leave {name!r} out"
                )

    def _named(self) -> list[tuple[str, Any]]:
        return list(self.conditions.items())

    def _rows(self, t: Tensor | None, given: Tensor | None, conds: list[Conditioning], part: int) -> Sequence[Tensor]:
        """What `project` makes of the time and the conditions' vectors, or of rows given instead."""
        batch = part * len(conds)
        if given is not None:
            widths = self.widths
            rows = given.shape[0]
            if given.dim() != 2 or given.shape[1] != sum(widths) or (rows != 1 and rows != batch):
                raise ValueError(
                    f"modulation must be ({batch}, {sum(widths)}), rows of this model's modulation(t), or (1, "
                    f"{sum(widths)}), got {tuple(given.shape)}"
                )
            return given.split(widths, dim=1)
        if t is None or t.dim() != 1 or (t.shape[0] != 1 and t.shape[0] != batch):
            shape = None if t is None else tuple(t.shape)
            raise ValueError(f"t must be ({batch},), one time per image, or (1,), got {shape}")
        c = self.time_embedding(t)
        vectors = [expanded(cond.vector, part) for cond in conds if cond.vector is not None]
        c = c + torch.cat(vectors) if vectors else c
        return self.project(c)

    def _check_dtype(self, x: Tensor) -> None:
        weights = next(self.time_embedding.parameters()).dtype
        device = x.device.type
        if x.dtype != weights and not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            raise TypeError(f"x is {x.dtype} but the model's weights are {weights}: convert one, e.g. x.to({weights})")


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(
            f"a condition cannot be called {name!r}, because that cannot be an argument: choose another name"
        )
    if name in _RESERVED:
        raise ValueError(
            f"a condition cannot be called {name!r}, an argument of calls with conditions: choose another name"
        )
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"a condition cannot be called {name!r}, an attribute of torch's modules: choose another name")


def _named_in_errors(name: str, call: Callable[..., Any], *given: Any, **more: Any) -> Any:
    """What ``call`` returns; its errors say which condition they are about."""
    try:
        return call(*given, **more)
    except (TypeError, ValueError) as error:
        raise error if name in str(error) else type(error)(f"condition {name!r}: {error}") from error


def part_of_batch(conds: list[Conditioning], batch: int, grid: tuple[int, int]) -> int:
    """How many images each condition serves.

    Raises:
        ValueError: a condition made for another batch or size.
    """
    if not conds or batch % len(conds):
        raise ValueError(f"{len(conds)} conditions cannot serve equal parts of a batch of {batch}")
    part = batch // len(conds)
    for cond in conds:
        if cond.grid != grid:
            raise ValueError(f"cond was made for {cond.grid} (height, width in tokens), x has {grid}: make it again")
        if cond.batch != 1 and cond.batch != part:  # not `in`, which torch 2.11 cannot compile for varying sizes
            raise ValueError(
                f"the condition was made for batch {cond.batch}, x has batch {part}: give one value or one each"
            )
    return part


def batch_of(signals: Mapping[str, Signal]) -> int:
    """Items that signals were made from together; those of batch 1 serve all.

    Raises:
        ValueError: two of different batches above 1.
    """
    largest = max([1, *[signal.batch for signal in signals.values()]])
    for name, signal in signals.items():
        if signal.batch != 1 and signal.batch != largest:
            raise ValueError(
                f"condition {name!r} has {signal.batch} items and another has {largest}: give one or one per image"
            )
    return largest


def total(tensors: Sequence[Tensor]) -> Tensor | None:
    """Sum of tensors ``(batch or 1, ...)``, those of batch 1 serving all; None where there are none."""
    result = None
    for tensor in tensors:
        result = tensor if result is None else result + tensor
    return result
