"""Count the kernels that a compiled step of sampling launches, without a GPU: ``python tests/count_launches.py``.

Inductor lowers and fuses the step for an H100 whose properties are told to it, on fake tensors, and is stopped before
it writes code. Each node that it schedules is one launch, whether a fused kernel, a product or a convolution; the
kernels of our own operators are counted by calling these without launching. A model of all blocks would take minutes:
those of depth 1 and 2 tell how many launches a block adds.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._functorch.config as functorch_config
from fake_gpu import fake_tensors, like, on_fake_gpu
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_map_only

import ssmgen
from ssmgen.ops.scan import triton
from ssmgen.ops.scan.inputs import ScanInputs
from ssmgen.sampling import in_dtype

_PROPERTIES: dict[str, Any] = {"major": 9, "multi_processor_count": 132, "warp_size": 32}
_PROPERTIES |= dict(regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024)
H100 = SimpleNamespace(name="H100", minor=0, total_memory=80 * 2**30, **_PROPERTIES)


class _Counted(Exception):
    pass


@contextmanager
def _told_of_an_h100() -> Iterator[None]:
    """What Inductor asks a driver for."""
    hints = DeviceProperties(type="cuda", index=0, cc=90, **_PROPERTIES)
    with ExitStack() as stack:
        for target, name, value in (
            (DeviceProperties, "create", lambda device: hints),
            (CudaInterface, "get_device_properties", lambda device=None: H100),
            (CudaInterface, "is_bf16_supported", lambda *given, **more: True),
            (torch.cuda, "get_device_properties", lambda device=None: H100),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "current_device", lambda: 0),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        for module in [sys.modules[name] for name in sys.modules if re.fullmatch(r"ssmgen\.ops\.\w+\.triton", name)]:
            stack.enter_context(mock.patch.object(module, "unavailable", lambda: None))
        stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", lambda *given: True))
        stack.enter_context(config.patch(compile_threads=1, fx_graph_cache=False))
        stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        yield


def launches(depth: int, *, guided: bool, keep: bool, side: int = 32) -> Counter[str]:
    """Launches of a step of ``sisma-xl`` with so many blocks, batch 1, bfloat16, by what is launched.

    Args:
        depth: blocks.
        guided: with a second condition for guidance.
        keep: with kept states of the Cross-Mamba.
        side: of the latent; 32 has 256 tokens.
    """
    found: Counter[str] = Counter()

    def count(graph: Any) -> None:
        graph.init_wrapper_code()
        graph._update_scheduler()
        for node in graph.scheduler.nodes:
            inner = node.node
            if isinstance(node, NopKernelSchedulerNode) or type(inner).__name__ == "MultiOutput":
                continue
            operator = str(getattr(inner, "op_overload", None) or "")
            if operator.startswith("ssmgen."):
                continue
            kind = operator.split(".")[1] if node.is_extern() else "reduction" if node.is_reduction() else "pointwise"
            found[kind] += 1
        for node in graph.module.graph.nodes:
            if str(node.target).startswith("ssmgen."):
                found[str(node.target).split(".")[1]] += _launches_of(node)
        raise _Counted

    with torch.device("meta"):
        model: Any = in_dtype(ssmgen.build("sisma-xl", depth=depth, mask_dropout=0.1).eval(), torch.bfloat16)
    torch.compiler.reset()
    with (
        fake_tensors() as mode,
        torch.no_grad(),
        _told_of_an_h100(),
        mock.patch.object(GraphLowering, "codegen", count),
    ):
        _take_a_step(on_fake_gpu(model, mode), mode, guided, keep, side, found)
    return found


def _take_a_step(model: Any, mode: Any, guided: bool, keep: bool, side: int, found: Counter[str]) -> None:
    with mode:
        labels = side * model.mask_scale
        cond = model.condition(torch.empty(1, model.num_classes, labels, labels, device="cuda", dtype=torch.bfloat16))
        cond = model.keep_states(cond) if keep else cond
        conds = [cond, tree_map_only(torch.Tensor, lambda x: like(x, mode), cond)] if guided else [cond]
        rows, x = model.modulation(torch.empty(1, device="cuda")), torch.empty(1, 4, side, side, device="cuda")
        x = x.to(torch.bfloat16).repeat(len(conds), 1, 1, 1)
        try:
            step = torch.compile(model, fullgraph=True, dynamic=False)
            step(x, None, cond=model.join(conds, len(x)), modulation=rows)
        except Exception as error:
            if "_Counted" not in repr(error):  # torch wraps it
                raise


def _launches_of(node: Any) -> int:
    """Launches of an operator of ours: those of the scan are counted, all others launch one kernel."""
    if not str(node.target).startswith("ssmgen.triton_scan"):
        return 1
    with unset_fake_temporarily():
        given = [_real(x.meta["val"]) if isinstance(x, torch.fx.Node) else x for x in node.args]
    with unset_fake_temporarily(), mock.patch.object(triton, "launch") as launch:
        triton._forward(ScanInputs(*given[:-1]), given[-1])
    return launch.call_count


def _real(fake: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU without its values: where it lies in memory counts too."""
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype)


def per_step(depth: int, **settings: Any) -> tuple[int, Counter[str]]:
    """Launches of a step with ``depth`` blocks, and those of one block."""
    one, two = (launches(count, **settings) for count in (1, 2))
    block = two - one
    return one.total() + (depth - 1) * block.total(), block


def main() -> None:
    """Print the launches of a step of ``sisma-xl``."""
    for guided in (True, False):
        for keep in (False, True):
            total, block = per_step(24, guided=guided, keep=keep)
            named = f"guidance: {'yes' if guided else 'no'}, states kept: {'yes' if keep else 'no'}"
            print(f"{named}: {total} launches a step, {block.total()} a block: {dict(block)}", flush=True)


if __name__ == "__main__":
    main()
