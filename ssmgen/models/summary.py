"""The cost of a model: parameters by component, operations per image and step, memory."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ssmgen.registry import build

#: Operations per state update, as Mamba estimates them: exponential (counted as one), decay, input and output.
SCAN_FLOPS = 9


@dataclass
class Summary:
    """The cost of a model at one latent size.

    Attributes:
        name: registered name of the model.
        size: side of the latent.
        batch: images at a time.
        parameters: counts by component, in the order of the model; "blocks / ..." are summed over the blocks.
        matrix_flops: floating-point operations of matrix products and convolutions per image and step.
        scan_flops: those of the selective scans.
        weight_bytes: bytes of the float32 weights.
        activation_bytes: estimated bytes of the largest set of live tensors in a step without gradients.
    """

    name: str
    size: int
    batch: int
    parameters: dict[str, int]
    matrix_flops: int
    scan_flops: int
    weight_bytes: int
    activation_bytes: int

    def lines(self) -> list[str]:
        """The summary as text."""
        rows = [f"  {name:<24}{count:>15,}" for name, count in self.parameters.items()]
        blocks = sum(count for name, count in self.parameters.items() if name.startswith("blocks / "))
        total = sum(self.parameters.values())
        adam = 4 * self.weight_bytes
        return [
            f"{self.name}: parameters by component",
            *rows,
            f"  {'all blocks':<24}{blocks:>15,}",
            f"  {'total':<24}{total:>15,}",
            f"operations per image and step, latent {self.size} x {self.size}:",
            f"  matrix products and convolutions {self.matrix_flops / 1e12:.4f} TFLOP",
            f"  selective scans                  {self.scan_flops / 1e12:.4f} TFLOP",
            f"memory, float32, batch {self.batch}:",
            f"  weights                          {self.weight_bytes / 2**30:.3f} GiB",
            f"  sampling, besides the weights    {self.activation_bytes / 2**30:.3f} GiB (estimate)",
            f"  training, without activations    {adam / 2**30:.3f} GiB (weights, gradients, AdamW)",
            f"  moving average                   {self.weight_bytes / 2**30:.3f} GiB",
        ]


def summarize(name: str, size: int | None = None, batch: int = 1) -> Summary:
    """Count a registered model on the meta device, without computing anything or allocating weights.

    Args:
        name: registered name of the model.
        size: side of the latent; that of a 256 x 256 image if None.
        batch: images at a time.

    Raises:
        ValueError: unknown name, or a size that is not a multiple of the model's patches.
    """
    with torch.device("meta"):
        model = build(name).eval()
        size = size or 256 // getattr(model, "mask_scale", 1)
        x = torch.zeros(1, model.in_channels, size, size)
        with _widest_layer(model) as widest:  # a null condition costs what a given one does
            matrix, scan = count_operations(model, x, torch.zeros(1))
        kept = sum(tensor.numel() for tensor in _tensors(model.condition(size=(size, size))))
    return Summary(
        name=name,
        size=size,
        batch=batch,
        parameters=_by_component(model),
        matrix_flops=matrix,
        scan_flops=scan,
        weight_bytes=4 * sum(p.numel() for p in model.parameters()),
        activation_bytes=4 * batch * (3 * widest[0] + kept),
    )


def count_operations(module: nn.Module, *given: Any) -> tuple[int, int]:
    """Operations of a forward pass: of matrix products and convolutions, and of selective scans.

    Scans are counted by `SCAN_FLOPS`, whatever products a backend makes of them.

    Args:
        module: any module on the meta device. Modules in it with ``scan`` and ``d_state`` are scans.
        given: its positional arguments.
    """
    with FlopCounterMode(display=False) as counter, _replaced_scans(module) as scanned, torch.no_grad():
        module(*given)
    return counter.get_total_flops(), scanned[0]


@contextmanager
def _replaced_scans(module: nn.Module) -> Iterator[list[int]]:
    """Replace each scan by a stand-in that only adds up its operations."""
    operations = [0]

    def stand_in(ssm: Any, u: Tensor, *rest: Any, **named: Any) -> Tensor:
        operations[0] += SCAN_FLOPS * u.numel() * ssm.d_state
        return torch.empty_like(u)

    scans: list[Any] = [m for m in module.modules() if all(hasattr(m, name) for name in ("scan", "d_state"))]
    for ssm in scans:
        ssm.scan = partial(stand_in, ssm)
    try:
        yield operations
    finally:
        for ssm in scans:
            del ssm.scan


@contextmanager
def _widest_layer(model: nn.Module) -> Iterator[list[int]]:
    """The largest number of input and output values of a layer; about three times as many live at that moment."""
    widest = [0]

    def look(module: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
        widest[0] = max(widest[0], sum(tensor.numel() for tensor in [*_tensors(inputs), *_tensors(outputs)]))

    handles = [m.register_forward_hook(look) for m in model.modules() if not list(m.children())]
    try:
        yield widest
    finally:
        for handle in handles:
            handle.remove()


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def _by_component(model: nn.Module) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        first, *rest = name.split(".")
        counts[f"blocks / {rest[1]}" if first == "blocks" else first] += parameter.numel()
    return dict(counts)
