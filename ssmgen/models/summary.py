"""What a model costs: parameters by component, operations per image and step, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ssmgen.nn import SelectiveSSM
from ssmgen.registry import build

#: Operations of one state update: the exponential counts as one, then decay, input and output (Mamba's own estimate).
SCAN_FLOPS = 9


@dataclass
class Summary:
    """Cost of a model at one latent size.

    Attributes:
        name: the model's.
        size: side of the latent.
        batch: images at a time.
        parameters: by component, in the order of the model; "blocks / ..." are summed over the blocks.
        matrix_flops: floating point operations of matrix products and convolutions for one image and step.
        scan_flops: those of the selective scans.
        weight_bytes: float32 weights.
        activation_bytes: the largest set of tensors that lives during a step without gradients, estimated.
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
    """Count a registered model on the meta device: nothing is computed and no weights are made.

    Args:
        name: of the model.
        size: side of the latent; that of a 256 x 256 image where None.
        batch: images at a time.

    Raises:
        ValueError: unknown name, or a size that the model's patches do not fill.
    """
    with torch.device("meta"):
        model = build(name).eval()
        size = size or 256 // model.mask_scale
        x = torch.zeros(1, model.in_channels, size, size)
        mask = torch.zeros(1, size * model.mask_scale, size * model.mask_scale, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter, _widest_moment(model) as widest, torch.no_grad():
            model(x, torch.zeros(1), mask)
        kept = sum(tensor.numel() for tensor in _tensors(model.condition(mask)))
    counts = counter.get_flop_counts()["Global"]
    # The portable scan contracts its states by a batched product; scans are counted below. Attention's stay in.
    matrix = sum(count for op, count in counts.items() if "bmm" not in str(op) or not _scans(model))
    tokens = (size // model.patch_size) ** 2
    return Summary(
        name=name,
        size=size,
        batch=batch,
        parameters=_by_component(model),
        matrix_flops=matrix,
        scan_flops=sum(SCAN_FLOPS * tokens * ssm.d_inner * ssm.d_state for ssm in _scans(model)),
        weight_bytes=4 * sum(p.numel() for p in model.parameters()),
        activation_bytes=4 * batch * (3 * widest[0] + kept),
    )


@contextmanager
def _widest_moment(model: nn.Module) -> Iterator[list[int]]:
    """The most values that go in and out of any one layer; about three times as many live at that moment."""
    widest = [0]

    def look(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        widest[0] = max(widest[0], sum(tensor.numel() for tensor in [*_tensors(given), *_tensors(made)]))

    handles = [m.register_forward_hook(look) for m in model.modules() if not list(m.children())]
    try:
        yield widest
    finally:
        for handle in handles:
            handle.remove()


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def _scans(model: nn.Module) -> list[SelectiveSSM]:
    return [module for module in model.modules() if isinstance(module, SelectiveSSM)]


def _by_component(model: nn.Module) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        first, *rest = name.split(".")
        counts[f"blocks / {rest[1]}" if first == "blocks" else first] += parameter.numel()
    return dict(counts)
