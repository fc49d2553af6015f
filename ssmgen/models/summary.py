"""What a model costs: parameters by component, operations per image and step, memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssmgen.nn import CrossAttention, SelectiveSSM
from ssmgen.registry import build

# Operations of one state update: the exponential counts as one, then decay, input and output (Mamba's own estimate).
_SCAN_FLOPS = 9


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


def summarize(name: str, size: int = 32, batch: int = 1) -> Summary:
    """Count a registered model on the meta device: nothing is computed and no weights are made.

    Raises:
        ValueError: unknown name, or a size that the model's patches do not fill.
    """
    with torch.device("meta"):
        model = build(name).eval()
        x = torch.zeros(1, model.in_channels, size, size)
        mask = torch.zeros(1, size * model.mask_scale, size * model.mask_scale, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, torch.zeros(1), mask)
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
        scan_flops=sum(_SCAN_FLOPS * tokens * ssm.d_inner * ssm.d_state for ssm in _scans(model)),
        weight_bytes=4 * sum(p.numel() for p in model.parameters()),
        activation_bytes=batch * _activation_bytes(model, tokens),
    )


def _scans(model: nn.Module) -> list[SelectiveSSM]:
    return [module for module in model.modules() if isinstance(module, SelectiveSSM)]


def _by_component(model: nn.Module) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        first, *rest = name.split(".")
        counts[f"blocks / {rest[1]}" if first == "blocks" else first] += parameter.numel()
    return dict(counts)


def _activation_bytes(model: Any, tokens: int) -> int:
    """One layer's widest moment (about eight inner-width tensors), and what every layer keeps of the condition."""
    scans = _scans(model)
    crosses = [module for module in model.modules() if isinstance(module, CrossAttention)]
    widest = max((ssm.d_inner for ssm in scans), default=2 * model.head.proj.in_features)
    kept = sum(2 * ssm.d_inner + ssm.d_state for ssm in scans[1::2]) + sum(m.kv.out_features for m in crosses)
    return 4 * tokens * (8 * widest + kept)
