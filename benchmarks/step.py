"""A training step beside its bare matrix products: ``python -m benchmarks.step [quick|faces] [precision=no|bf16]``.

The products of one step, forward, backward and the optimiser's, are recorded with their shapes, strides and dtypes and
done again on other numbers. A step cannot be faster than they are; what it takes more is pointwise work and overhead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import measure, medians, show
from recipes.sisma.presets import preset
from ssmgen import build
from ssmgen.training import make_optimizer
from ssmgen.training.launch import keep_freed_memory

CHANNELS, FACTOR = {"quick": 4, "faces": 16}, {"quick": 4, "faces": 8}
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}


class Products(TorchDispatchMode):
    """Keeps the calls of matrix products, with tensors like those they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            given = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]  # clone keeps dense strides
            self.calls.append(partial(func, *given, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def training_step(name: str, precision: str) -> Callable[[], None]:
    """One step of a preset on random latents and masks of large patches."""
    config = preset(name)
    torch.manual_seed(0)
    settings = {"in_channels": CHANNELS[name], "mask_scale": FACTOR[name], "num_classes": 19}
    model = build(config.model, **settings, **config.model_args)
    optimizer = make_optimizer(
        model, config.train.optimizer, config.train.lr, config.train.weight_decay, precision=precision
    )
    objective = build("flow-matching", t_sampling=config.t_sampling)
    side = config.image_size // FACTOR[name]
    x = torch.randn(config.train.batch_size, CHANNELS[name], side, side)
    mask = torch.randint(0, 19, (config.train.batch_size, 1, 8, 8), dtype=torch.uint8)
    mask = mask.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, 0]
    weight = torch.ones(config.train.batch_size, 1, side, side)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = objective.loss(model, x, weight=weight, mask=mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def products_of(step: Callable[[], None]) -> Callable[[], None]:
    """The matrix products of a step and nothing else."""
    with Products() as products:
        step()

    def again() -> None:
        for call in products.calls:
            call()

    return torch.no_grad()(again)


def main(argv: list[str]) -> None:
    """Print the times of a step and of its products."""
    name = next((word for word in argv if "=" not in word), "quick")
    precisions = [word.partition("=")[2] for word in argv if word.startswith("precision=")] or ["no", "bf16"]
    keep_freed_memory()
    for precision in precisions:
        step = training_step(name, precision)
        times = measure({"step": step, "its matrix products": products_of(step)}, rounds=15)
        show(f"{name}, precision={precision}, {torch.get_num_threads()} threads", times, "its matrix products")
        print(f"  {medians(times)['step'] / medians(times)['its matrix products']:.2f} times its products")


if __name__ == "__main__":
    main(sys.argv[1:])
