"""The work and the memory of one training step, counted without doing it.

The step runs on fake tensors, which have shapes and no values: model, objective, backward, clipping and optimiser are
those of the training loop. Every operation is recorded with its arithmetic and its bytes, and every tensor from when it
is made until it is freed. What an operation allocates inside itself is not seen, nor what an allocator rounds up.
"""

import importlib
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ssmgen.nn import embed
from ssmgen.ops.local import layers
from ssmgen.ops.scan import triton
from ssmgen.ops.scan.selective_scan import SELECTIVE_SCAN
from ssmgen.registry import build
from ssmgen.training import make_optimizer, muon

_READ_A_VALUE = torch.ops.aten._local_scalar_dense.default
_NO_WORK = {torch.ops.aten._unsafe_view.default, torch.ops.aten._reshape_alias.default}


@dataclass(frozen=True)
class Call:
    """One operation: its phase and kind, its floating-point operations or state updates, and the bytes it touches."""

    phase: str  # forward, backward or update
    kind: str  # matrix, scan forward, scan backward or other
    work: float
    bytes: int


@dataclass(frozen=True)
class StepCounts:
    """One training step of one process.

    Attributes:
        batch: examples.
        weights, gradients, optimizer: bytes of the parameters, their gradients, and the optimiser's state.
        matrices: bytes of the parameters that Muon orthogonalises; 0 for AdamW.
        block, outside: bytes of the largest block's parameters, and of those outside the blocks.
        activations: bytes that live from the forward pass to the backward.
        working: bytes of other tensors where most live, gradients left out.
        peak: the most bytes that live at once besides weights and the optimiser's state. It is less than gradients,
            activations and others together, since gradients appear while activations go.
        example: bytes of one example in a latent cache.
        calls: every operation, in order.
    """

    batch: int
    weights: int
    gradients: int
    optimizer: int
    matrices: int
    block: int
    outside: int
    activations: int
    working: int
    peak: int
    example: int
    calls: tuple[Call, ...]


def count_step(
    name: str,
    batch: int,
    size: int | None = None,
    *,
    gpu: bool = True,
    precision: str = "bf16",
    optimizer: str = "adamw",
    checkpointed: bool = False,
    **settings: Any,
) -> StepCounts:
    """Count a training step of a registered model.

    Args:
        name: registered name of the model.
        batch: examples.
        size: side of the latent; that of a 256 x 256 image if None.
        gpu: count the operations that a CUDA device would run (the Triton scan, torch's layers), else those of a CPU.
        precision: ``"bf16"`` (autocast) or ``"no"``.
        optimizer: ``"adamw"`` or ``"muon"``.
        checkpointed: keep only the input of each block, and compute the rest again in the backward pass.
        **settings: keywords for the model.

    Raises:
        ValueError, TypeError: a name, size or setting that the model rejects.
    """
    ledger = _Ledger()
    with FakeTensorMode(), _kernels(gpu), ledger:
        model, x, condition = _prepared(name, batch, size, checkpointed, settings)
        trained = make_optimizer(model, optimizer, lr=1e-4, weight_decay=0.0, precision=precision)
        before = ledger.start(model)
        loss = _forward(model, x, condition, precision)
        activations = ledger.live - before
        ledger.phase = "backward"
        loss.backward()
        del loss
        working, peak = ledger.most - before - activations, ledger.most_with_gradients - before
        ledger.phase = ""
        trained.step()  # makes its state, which later steps find
        ledger.start_update()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trained.step()
        state = _bytes(x for slots in trained.state.values() for x in slots.values() if isinstance(x, Tensor))
        matrices = _bytes(trained.param_groups[0]["params"]) if optimizer == "muon" else 0
    blocks = [_bytes(block.parameters()) for block in model.blocks]
    weights = _bytes(model.parameters())
    return StepCounts(
        batch=batch,
        weights=weights,
        gradients=_bytes(p for p in model.parameters() if p.requires_grad),
        optimizer=state,
        matrices=matrices,
        block=max(blocks),
        outside=weights - sum(blocks),
        activations=activations,
        working=max(working, ledger.most - before - state - activations, 0),
        peak=max(peak, ledger.most_with_gradients - before - state),
        example=4 * x[0].numel() + (condition["mask"][0].numel() if "mask" in condition else 0),
        calls=tuple(ledger.calls),
    )


def count_activations(
    name: str,
    batch: int,
    size: int | None = None,
    *,
    gpu: bool = True,
    precision: str = "bf16",
    optimizer: str = "adamw",
    checkpointed: bool = False,
    **settings: Any,
) -> int:
    """``activations`` of `count_step` alone, which takes a third of the time; arguments as there."""
    ledger = _Ledger()
    with FakeTensorMode(), _kernels(gpu), ledger:
        model, x, condition = _prepared(name, batch, size, checkpointed, settings)
        before = ledger.start(model)
        loss = _forward(model, x, condition, precision)
        activations = ledger.live - before
        del loss
    return activations


def _prepared(
    name: str, batch: int, size: int | None, checkpointed: bool, settings: dict[str, Any]
) -> tuple[Any, Tensor, dict[str, Tensor]]:
    model = build(name, **settings).train()
    if checkpointed:
        model.checkpoint_activations = True
    return model, *_inputs(model, batch, size)


def _forward(model: nn.Module, x: Tensor, condition: dict[str, Tensor], precision: str) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss: Tensor = build("flow-matching").loss(model, x, **condition)
    return loss


class _Ledger(TorchDispatchMode):
    """Records operations, and the bytes of all living tensors.

    Attributes:
        live, gradients: bytes now, and those among them that are gradients of parameters.
        most, most_with_gradients: the most that lived in this phase, without gradients and with them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.phase, self.live, self.gradients, self.most, self.most_with_gradients = "", 0, 0, 0, 0
        self._known: set[int] = set()

    def start(self, model: nn.Module) -> int:
        """Forget what was needed to build; bytes that live."""
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._keep_gradient)
        self.calls.clear()
        self.phase, self.most, self.most_with_gradients = "forward", self.live, self.live
        return self.live

    def start_update(self) -> None:
        """Forget the most that lived in the other phases."""
        self.phase, self.most, self.most_with_gradients = "update", 0, 0

    def _keep_gradient(self, parameter: Tensor) -> None:
        self.gradients += parameter.nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _READ_A_VALUE:  # of a check of labels, or a counter: there is no value, and none is needed
            return 0
        out = func(*args, **(kwargs or {}))
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in results:
            self._hold(x.untyped_storage())
        if self.phase and not func.is_view and func.namespace != "prim" and func not in _NO_WORK:
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            written = _written(func, args, kwargs or {}) or results
            self.calls.append(self._call(func, args, kwargs or {}, out, [*given, *written]))
        return out

    def _call(self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor]) -> Call:
        size = sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
        if func.namespace == "ssmgen" and "_scan" in func.__name__:
            backward = "_backward" in func.__name__
            u, A = (args[3], args[5]) if backward else (args[0], args[2])
            return Call(self.phase, "scan backward" if backward else "scan forward", u.numel() * A.shape[1], size)
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            return Call(self.phase, "matrix", _backward_of_convolution(*args), size)
        count = flop_registry.get(func.overloadpacket)
        if count is None:
            return Call(self.phase, "other", 0, size)
        return Call(self.phase, "matrix", count(*args, **kwargs, out_val=out), size)

    def _hold(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.most = max(self.most, self.live - self.gradients)
        self.most_with_gradients = max(self.most_with_gradients, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Arguments that an operation writes; optimisers return nothing."""
    named = zip(func._schema.arguments, args, strict=False)
    found = [given for argument, given in named if argument.is_write]
    found += [kwargs[x.name] for x in func._schema.arguments if x.is_write and x.name in kwargs]
    return [x for x in tree_leaves(found) if isinstance(x, Tensor)]


def _backward_of_convolution(gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    """Operations for the gradients of input and weight; torch's counter disregards groups, as of depthwise layers."""
    *_, (of_input, of_weight, _) = rest
    return 2 * gradient.numel() * weight[0].numel() * (of_input + of_weight)


@contextmanager
def _kernels(gpu: bool) -> Iterator[None]:
    """Choose the kernels of a GPU, and keep fake tensors out of what the process remembers.

    Fake tensors are on the CPU in both cases: those of a CUDA device have no backward pass without such a device.
    """
    with ExitStack() as stack:
        orders = importlib.import_module("ssmgen.ops.scan_order")  # the function of that name hides the module
        for module, name in ((embed, "_kept_position"), (orders, "_kept_permutation")):
            stack.enter_context(mock.patch.object(module, name, getattr(module, name).__wrapped__))
        if gpu:
            # torch's own layers: their convolution keeps one tensor more for backward than the kernel of a GPU.
            stack.enter_context(mock.patch.object(layers, "_chosen", lambda *given: "torch"))
            stack.enter_context(mock.patch.object(SELECTIVE_SCAN, "choose", lambda *given: triton))
            stack.enter_context(mock.patch.object(muon, "_BATCH", muon._GPU_BATCH))
        yield


def _inputs(model: Any, batch: int, size: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents and, where the model has one, a label map. Other conditions are null, which costs as much."""
    scale = getattr(model, "mask_scale", 1)
    size = size or 256 // scale
    condition = {}
    if "mask" in model.conditions:
        condition["mask"] = torch.zeros(batch, size * scale, size * scale, dtype=torch.int64)
    return torch.zeros(batch, model.in_channels, size, size), condition


def _bytes(tensors: Any) -> int:
    return sum(x.nbytes for x in tensors)
