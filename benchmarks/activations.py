"""Memory that a training step keeps for its backward pass: ``python -m benchmarks.activations [MODEL] [batch=4]``.

One forward and backward pass in float32 on random latents of 32 x 32, with and without ``checkpoint_activations``. The
bytes are those of the tensors that autograd keeps, without the weights; during the backward pass a checkpointed model
holds those of one block besides.
"""

from __future__ import annotations

import sys
import time

import torch

from ssmgen import build

SIDE = 32


def one_pass(name: str, batch: int, checkpointed: bool) -> tuple[int, float]:
    """Bytes kept for the backward pass, and seconds of both passes."""
    torch.manual_seed(0)
    model = build(name)
    model.checkpoint_activations = checkpointed
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    held = []  # so that no memory is freed and counted again

    def note(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    data = torch.randn(batch, model.in_channels, SIDE, SIDE)
    mask = torch.randint(0, model.num_classes, (batch, SIDE * model.mask_scale, SIDE * model.mask_scale))
    started = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = build("flow-matching").loss(model, data, mask=mask)
    held.clear()
    loss.backward()
    seconds = time.perf_counter() - started
    return sum(size for place, size in kept.items() if place not in weights), seconds


def main(argv: list[str]) -> None:
    """Print a line each."""
    name = next((word for word in argv if "=" not in word), "sisma-s")
    batch = int(next((word.partition("=")[2] for word in argv if word.startswith("batch=")), 4))
    one_pass(name, 1, False)
    for checkpointed in (False, True):
        size, seconds = one_pass(name, batch, checkpointed)
        print(f"{name}, batch {batch}, checkpoint_activations={checkpointed}: {size / 2**20:.0f} MiB, {seconds:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
