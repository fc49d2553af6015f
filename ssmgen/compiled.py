"""A model's step through `torch.compile`: one graph per shape, and on CUDA one thread that runs captured graphs."""

import contextvars
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

_COMPILE = (True, False, "max-autotune")


def check_compile(wanted: bool | str) -> None:
    """Reject a ``compile`` other than True, False and ``"max-autotune"`` by a `ValueError`."""
    if wanted not in _COMPILE:
        raise ValueError(f"compile must be True, False or 'max-autotune', got {wanted!r}")


class CompiledStep:
    """A model, compiled as one graph for each shape it is called with; on CUDA also captured as a CUDA graph.

    torch keeps at most ``torch.compiler.config.recompile_limit`` graphs, 8 by default, of one function, and searches
    them in turn. Here each shape has a function of its own, so the number of shapes has no limit. Each keeps its code,
    and on CUDA the memory of its graph, until this object is gone.

    A captured graph reads its inputs where they lay when it was captured, so torch copies each input there before each
    replay. Those of ``cond``, which are the same at many steps, lie in `Buffers` instead and are copied when they
    change.

    Args:
        model: called as ``model(x, t, cond=cond, **given)``, without gradients.
        device: of the model.
        autotune: time variants of kernels, and take the fastest.
    """

    def __init__(self, model: Any, device: torch.device, autotune: bool = False) -> None:
        self.model = model
        self.captured = device.type == "cuda"
        self.mode = "max-autotune" if autotune else "reduce-overhead" if self.captured else None
        self.steps: dict[Hashable, Callable[..., Tensor]] = {}
        self.buffers: dict[Hashable, Buffers] = {}

    def __call__(self, x: Tensor, t: Tensor | None, *, cond: Any = None, **given: Any) -> Tensor:
        """The model's output ``(batch, ...)``, which later calls leave as it is.

        Args:
            x, t: as the model takes them.
            cond: what does not change from step to step: tensors in nested tuples, lists and mappings. Tensors that
                were passed before are taken to have the values they had.
            given: other arguments of the model.

        Raises:
            RuntimeError: one shape needs more graphs than torch keeps, because of something other than its shape.
        """
        shape = shape_of((x, t, cond, given))
        if shape not in self.steps:
            self.steps[shape] = _compiled(self.model, self.mode)
        step = self.steps[shape]
        try:
            if not self.captured:
                return step(x, t, cond=cond, **given)
            buffers = self.buffers.setdefault(shape, Buffers())
            return _CAPTURES.run(lambda: step(x, t, cond=buffers.holding(cond), **given), x)
        except Exception as error:
            if type(error).__name__ != "FailOnRecompileLimitHit":  # of a private module of torch
                raise
            raise RuntimeError(
                f"the model was compiled {torch.compiler.config.recompile_limit} times for x {tuple(x.shape)}, and "
                "torch compiles no more: something other than a shape differs from call to call. "
                "TORCH_LOGS=recompiles names it: keep it the same, or raise torch.compiler.config.recompile_limit"
            ) from error


class Buffers:
    """Tensors that keep their place in memory, and take the values of others of the same shapes."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []
        self.sources: list[weakref.ref[Tensor]] = []

    def holding(self, value: Any) -> Any:
        """``value`` with these tensors in the place of its own, which may have any shape.

        Args:
            value: nested tuples, lists and mappings. Its tensors are copied if one of them is not the tensor that was
                copied last; anything else is passed on.
        """
        leaves, structure = tree_flatten(value)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not self.held:
            self.held = [leaf.contiguous().clone() for leaf in tensors]
            for held in self.held:
                mark_static(held)
        elif not all(source() is leaf for source, leaf in zip(self.sources, tensors, strict=True)):
            for held, leaf in zip(self.held, tensors, strict=True):
                held.copy_(leaf)
        self.sources = [weakref.ref(leaf) for leaf in tensors]
        placed = iter(self.held)
        return tree_unflatten([next(placed) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


def mark_static(tensor: Tensor) -> None:
    """Tell captured graphs that a tensor, of any shape, stays where it is in memory: they then read it there."""
    from torch._dynamo import mark_static_address  # torch has no other name for it, and importing it takes seconds

    mark_static_address(tensor)


def shape_of(value: Any) -> Hashable:
    """Shapes and dtypes of all tensors in nested tuples, lists and mappings; of anything else its type's name."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(shape_of, value))
    if isinstance(value, Mapping):
        return tuple((name, shape_of(each)) for name, each in value.items())
    return value if isinstance(value, int | str) else type(value).__qualname__


def _compiled(model: Any, mode: str | None) -> Callable[..., Tensor]:
    def step(x: Tensor, t: Tensor | None, **given: Any) -> Tensor:
        return model(x, t, **given)

    step.__code__ = step.__code__.replace()  # torch counts graphs by code object: this one is a copy
    return torch.compile(step, fullgraph=True, dynamic=False, mode=mode)


class _CaptureThread:
    """Runs captured steps, in one thread for all of the process.

    torch's CUDA graphs belong to the thread that captured them. Up to torch 2.13 or so a call from another thread, such
    as a server's, fails an assertion; later it captures once more.
    """

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(1, "ssmgen-captures")
        self.stream: Any = None  # of the last call

    def run(self, step: Callable[[], Tensor], x: Tensor) -> Tensor:
        """The output of ``step``, computed on the stream, under the autocast and with the settings of this thread.

        Args:
            step: takes no argument.
            x: any tensor on the device.
        """
        kind = x.device.type
        autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        context, stream = contextvars.copy_context(), torch.cuda.current_stream(x.device)  # torch's settings are there
        return self.executor.submit(context.run, self._run, stream, autocast, step).result()

    def _run(self, stream: Any, autocast: tuple[str, torch.dtype, bool], step: Callable[[], Tensor]) -> Tensor:
        allow_captures()
        if self.stream is not None and self.stream != stream:
            stream.wait_stream(self.stream)  # graphs share their memory
        self.stream = stream
        with torch.no_grad(), torch.cuda.stream(stream), torch.autocast(autocast[0], *autocast[1:]):
            # A captured graph writes into the same memory each time, and a solver keeps slopes of several steps.
            return step().clone()


def allow_captures() -> None:
    """Let this thread capture CUDA graphs: torch 2.11 prepares only the thread that imports its module for it."""
    from torch._inductor import cudagraph_trees

    if hasattr(cudagraph_trees, "_initialize_tls"):  # torch prepares any thread
        return
    for name, empty in (("tree_manager_containers", {}), ("tree_manager_locks", defaultdict(threading.Lock))):
        if not hasattr(cudagraph_trees.local, name):
            setattr(cudagraph_trees.local, name, empty)
            torch._C._stash_obj_in_tls(name, empty)


_CAPTURES = _CaptureThread()
